"""Train a tiny LLaMA with DeepSpeed on the CPU and save checkpoints as the trainer does."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from convert_parts import ITEM_TOKENS, VOCABULARY, save_tokenizer, tiny_llama
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator


def main(argv: list[str]) -> None:
    """STAGE OUTPUT [--tied] [--lora], in each process of a job."""
    import deepspeed

    parser = argparse.ArgumentParser()
    parser.add_argument("stage", type=int)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--lora", action="store_true")
    args = parser.parse_args(argv)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see finetune.py
    deepspeed.init_distributed(dist_backend="gloo")
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": args.stage, "stage3_gather_16bit_weights_on_model_save": False},
        "zero_force_ds_cpu_optimizer": False,
    }
    arguments = TrainingArguments(
        str(args.output),
        per_device_train_batch_size=2,
        max_steps=2,
        save_steps=1 if args.stage == 2 else 2,
        bf16=True,
        use_cpu=True,
        deepspeed=settings,
        report_to=[],
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    if arguments.process_index == 0:
        save_tokenizer(args.output / "tokenizer", ITEM_TOKENS)
    torch.distributed.barrier()
    rows = VOCABULARY + len(ITEM_TOKENS)
    model = tiny_llama(rows, args.tied)
    if args.lora:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["embed_tokens", "lm_head"])
        model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    data = [{"input_ids": (ids := torch.randint(0, rows, (9,))), "labels": ids} for _ in range(8)]
    tokenizer = AutoTokenizer.from_pretrained(args.output / "tokenizer")
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, data_collator=default_data_collator
    )
    trainer.train()
    trainer.model_wrapped.eval()
    with torch.no_grad():  # under ZeRO-3 every rank takes part in the forward pass
        logits = trainer.model_wrapped(input_ids=torch.arange(40)[None]).logits.float()
    if arguments.process_index == 0:
        torch.save(logits, args.output / "logits.pt")
