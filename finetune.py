"""Fine-tune a causal LM on the six LC-Rec tasks: full weights or LoRA, under torchrun with DeepSpeed, DDP or one process.

    torchrun --nproc_per_node=8 --master_port=23324 finetune.py --base_model huggyllama/llama-7b --output_dir ./ckpt/Games/ \\
        --dataset Games --data_path ./data --per_device_batch_size 8 --gradient_accumulation_steps 2 \\
        --learning_rate 5e-5 --epochs 4 --weight_decay 0.01 --save_and_eval_strategy epoch \\
        --deepspeed ./config/ds_z3_bf16.json --bf16 --only_train_response --index_file .index.json
    python finetune.py --base_model ./models/tiny-ml-100k --output_dir ./ckpt/ml-100k-plain --dataset ml-100k \\
        --data_path ./data --deepspeed none                            # one process
    torchrun --nproc_per_node=8 lora_finetune.py …                     # = finetune.py --lora: an adapter

`<output_dir>/` holds the consolidated model when this ends, `checkpoint-N/` on the way, `run.json` (all arguments, versions,
hashes of the data), `train.log` and TensorBoard's files in `runs/`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# torch keeps a compiled bfloat16 product for each shape it meets on the CPU, and batches come in many: memory without end
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

import torch

from arguments import add_data, add_global, add_train, comma_list, make_parser, parse_tasks, style_flags
from collator import TrainCollator
from data import RecData, load_data
from folders import check_space, disk_full_is_said
from item_rows import WORDS
from item_vectors import ItemSwap, read_item_vectors
from processes import join_for_training, leave, on_main
from prompt_style import PromptStyle
from provenance import notes_of
from quiet import silence_libraries
from resume import find_resume
from run_folder import FINAL, LOG, PREPARED, RECORD, TENSORBOARD, RunFolder, RunRecord, model_fingerprint
from samples import TaskValidSet, TrainSet, ValidSet, check_lengths
from tasks import TASKS
from tokenising import item_token_ids
from training_settings import (
    check_choices,
    check_optimizer,
    check_trackers,
    complete_deepspeed,
    read_deepspeed,
    zero_stage,
)
from utils import UserError, is_main, regular_file, run_main, say, set_seed, sha256, versions, world_size

OWN_TENSORBOARD_DIR = "TENSORBOARD_LOGGING_DIR" in os.environ  # else each run of this process gets its own below


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as that needs no file of the dataset."""
    parser = make_parser(__doc__)
    for add in (add_global, add_data, add_train):
        add(parser)
    args = parser.parse_args(argv)
    _, copies, drawn = zip(*training_tasks(args), strict=True)
    args.train_prompt_sample_num, args.train_data_sample_num = ",".join(map(str, copies)), ",".join(map(str, drawn))
    if args.fp16 and args.bf16:
        raise UserError("--fp16 and --bf16 exclude each other")
    if args.fp16 and not torch.cuda.is_available():
        raise UserError("--fp16 needs a GPU; use --bf16 or neither on the CPU")
    silence_libraries()
    check_choices(args.optim, args.lr_scheduler_type)
    check_trackers(args.report_to)
    if args.deepspeed.lower() == "none":
        args.deepspeed = None
    stage = zero_stage(deepspeed_of(args))
    for flag in ("init_item_tokens", "swap_by", "prompt_file"):
        if getattr(args, flag) and (flag, getattr(args, flag)) != ("init_item_tokens", WORDS):
            try:
                regular_file(getattr(args, flag))
            except UserError as error:
                raise UserError(f"--{flag} {error}") from None
    if args.swap_items and not args.swap_by and args.init_item_tokens in (None, "", WORDS):
        raise UserError("--swap_items needs item embeddings: --swap_by F.npy")
    if args.swap_by and not args.swap_items:
        raise UserError("--swap_by does nothing without --swap_items")
    if args.new_rows_learning_rate is not None and (args.deepspeed or args.lora):
        raise UserError("--new_rows_learning_rate goes with whole weights and --deepspeed none alone")
    if args.overwrite_output_dir and args.resume_from_checkpoint == "auto":
        raise UserError("--overwrite_output_dir and --resume_from_checkpoint auto: begin anew or go on, not both")
    if args.select_by != "loss" and not args.eval_ranking:
        raise UserError(f"--select_by {args.select_by} needs --eval_ranking N")
    if args.train_new_rows_only and not args.lora:
        raise UserError("--train_new_rows_only freezes the other weights: add --lora")
    if (args.load_in_4bit or args.load_in_8bit) and not args.lora:
        raise UserError("--load_in_4bit and --load_in_8bit freeze the base weights: add --lora")
    if (args.load_in_4bit or args.load_in_8bit) and stage == 3:
        raise UserError(
            f"--deepspeed {args.deepspeed}: ZeRO-3 cannot part quantised weights; use --deepspeed none or a ds_z2 file"
        )
    return args


def training_tasks(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """The mixture that the flags name: `(task, copies an epoch, samples drawn or 0 for all)`."""
    return parse_tasks(args.tasks, args.train_prompt_sample_num, args.train_data_sample_num)


def load_datasets(args: argparse.Namespace, style: PromptStyle) -> tuple[RecData, TrainSet, ValidSet]:
    """The checked data, the mixture of training tasks and the validation set (seqrec)."""
    tasks = training_tasks(args)
    user_parts = frozenset().union(*(TASKS[name].splits["train"].user_parts for name, _, _ in tasks))
    data = load_data(args.data_path, args.dataset, args.index_file, user_parts)
    train = TrainSet(
        data,
        style.prompts,
        tasks,
        style.form,
        args.seed,
        longest_history_only=args.longest_history_only,
        history_windows=args.history_windows,
        swap=item_swap(args, len(data.titles)),
    )
    valid = ValidSet(
        data,
        style.prompts,
        style.form,
        args.seed,
        prompt_num=args.valid_prompt_sample_num,
        prompt_id=None if args.sample_valid else args.valid_prompt_id,
    )
    return data, train, valid


def item_swap(args: argparse.Namespace, n_items: int) -> ItemSwap | None:
    """What `--swap_items` asks for."""
    if not args.swap_items:
        return None
    flag = "swap_by" if args.swap_by else "init_item_tokens"
    return ItemSwap(read_item_vectors(Path(getattr(args, flag)), n_items, f"--{flag}"), args.swap_items)


def deepspeed_of(args: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed configuration that the flags name, checked against them; {} without one."""
    precisions = {name for name in ("bf16", "fp16") if getattr(args, name)}
    return read_deepspeed(args.deepspeed, args.per_device_batch_size, args.gradient_accumulation_steps, precisions)


def first_evaluation(args: argparse.Namespace) -> float:
    """Epochs or steps before the first evaluation, as the strategy counts; the original's unless `--eval_delay` says it."""
    if args.eval_delay is not None:
        return args.eval_delay
    return 1 if args.save_and_eval_strategy == "epoch" else 2000


def training_arguments(args: argparse.Namespace) -> Any:
    """transformers' TrainingArguments for our flags. Activates DeepSpeed: what is loaded after it may be partitioned."""
    from transformers import TrainingArguments

    if not OWN_TENSORBOARD_DIR:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(args.output_dir) / TENSORBOARD)
    training = TrainingArguments(
        output_dir=args.output_dir,
        seed=args.seed,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.per_device_batch_size,
        per_device_eval_batch_size=args.per_device_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        warmup_steps=args.warmup_ratio,  # below 1: a share of all steps
        lr_scheduler_type=args.lr_scheduler_type,
        optim=args.optim,
        max_grad_norm=1.0,
        fp16=args.fp16,
        bf16=args.bf16,
        use_cpu=not torch.cuda.is_available(),
        deepspeed=complete_deepspeed(deepspeed_of(args), Path(args.output_dir) / PREPARED),
        activation_checkpointing=args.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=args.logging_step,
        eval_strategy=args.save_and_eval_strategy,
        save_strategy=args.save_and_eval_strategy,
        eval_steps=args.save_and_eval_steps,
        save_steps=args.save_and_eval_steps,
        eval_delay=first_evaluation(args),
        save_total_limit=args.save_total_limit,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{args.select_by}",
        greater_is_better=args.select_by != "loss",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False if world_size() > 1 else None,
        report_to=comma_list(args.report_to),
        disable_tqdm=not (is_main() and sys.stderr.isatty()),
    )
    if training.n_gpu > 1:  # one process on a machine with several GPUs uses one of them, not nn.DataParallel
        training._n_gpu = 1
    return training


def load_for_training(
    args: argparse.Namespace, folder: Path, training: Any, item_tokens: list[str], adapter: Path | None
) -> tuple[Any, Any]:
    """The model that the flags ask for, with an adapter (from `adapter`) if it is one, and its tokenizer."""
    from modeling import load_tokenizer
    from packing import PACKED
    from trainable import LoraShape, load_trainable

    tokenizer = load_tokenizer(folder, args.model_max_length)
    shape = LoraShape(
        args.lora_r,
        args.lora_alpha,
        args.lora_dropout,
        comma_list(args.lora_target_modules),
        comma_list(args.lora_modules_to_save),
        tokenizer.convert_tokens_to_ids(item_tokens) if args.train_new_rows_only else None,
    )
    model = load_trainable(
        folder,
        shape if args.lora else None,
        adapter,
        bits=4 if args.load_in_4bit else 8 if args.load_in_8bit else None,
        compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        attention=PACKED if args.packing else None,
        dropout=args.dropout,
        gradient_checkpointing=args.gradient_checkpointing,
        zero3_bf16=args.bf16 and bool(args.deepspeed) and training.hf_deepspeed_config.is_zero3(),
    )
    if args.lora:
        model.peft_config["default"].base_model_name_or_path = args.base_model  # what test.py --lora is given
    return model, tokenizer


def describe_run(args: argparse.Namespace, data: RecData, train: TrainSet, valid: ValidSet) -> RunRecord:
    """What the run is made of."""
    files = dict(data.files)
    for flag in ("prompt_file", "deepspeed", "init_item_tokens", "swap_by"):
        if getattr(args, flag) and getattr(args, flag) != WORDS:
            files[flag] = Path(getattr(args, flag))
    return RunRecord(
        argv=sys.argv,
        arguments=vars(args),
        processes=world_size(),
        base_model=on_main(lambda: model_fingerprint(args.base_model)),
        samples={"train": train.counts(), "valid": len(valid)},
        files={name: {"path": str(path), "sha256": sha256(path)} for name, path in files.items()},
        versions=versions(),
        made=notes_of(data.folder, data.name, args.index_file),
    )


@dataclass
class Run:
    """Everything that a fine-tuning run is made of, ready to train."""

    args: argparse.Namespace
    folder: RunFolder
    style: PromptStyle
    data: RecData
    train_set: TrainSet
    valid_set: ValidSet
    training: Any
    model: Any
    tokenizer: Any
    trainer: Any
    checkpoint: Path | None


def prepare(args: argparse.Namespace, trainer_of: Callable[[Run], Any] | None = None) -> Run:
    """Check the input, grow the base model's vocabulary, load the model on every process.

    Args:
        trainer_of: makes the trainer of a run; default `make_trainer`. (DeepSpeed allows a process a single one.)

    Raises:
        UserError: whatever is wrong with files or flags, before anything expensive begins.
    """
    silence_libraries()
    from trainable import parameter_report

    join_for_training(bool(args.deepspeed))
    set_seed(args.seed)
    folder, style = RunFolder(args.output_dir), PromptStyle.of_flags(**style_flags(args))
    data, train_set, valid_set = load_datasets(args, style)
    say("training samples: " + ", ".join(f"{name} {n:,}" for name, n in train_set.counts().items()))
    facts = describe_run(args, data, train_set, valid_set)
    checkpoint, adapter = on_main(lambda: begin(args, folder, facts, data))
    training = training_arguments(args)
    model, tokenizer = load_for_training(args, folder / PREPARED, training, data.item_tokens, adapter)
    check_optimizer(training, model)
    say(parameter_report(model, len(data.item_tokens)))
    sample = train_set[0]
    say(f"first sample: {json.dumps(sample['prompt'] + sample['response'], ensure_ascii=False)[:600]}")
    run = Run(args, folder, style, data, train_set, valid_set, training, model, tokenizer, None, checkpoint)
    run.trainer = (trainer_of or make_trainer)(run)
    if is_main() and (checkpoint is None or folder.record() is None):
        if checkpoint is None and args.overwrite_output_dir and folder.record() is not None:
            folder.set_aside()
        facts.write(folder.path)
    return run


def begin(
    args: argparse.Namespace, folder: RunFolder, facts: RunRecord, data: RecData
) -> tuple[Path | None, Path | None]:
    """On the main process: clear up, find where to go on (`find_resume`), and write the base model with the item tokens."""
    from modeling import prepare_base

    folder.path.mkdir(parents=True, exist_ok=True)
    folder.refuse_base_model(args.base_model)
    folder.clear_partial()
    checkpoint, adapter = find_resume(args.resume_from_checkpoint, args.lora, folder.path)
    if checkpoint is None:
        folder.refuse_if_taken(args.overwrite_output_dir)
    if checkpoint is not None and (before := RunFolder(checkpoint.parent).record()):
        before.check_same(facts, checkpoint.parent / RECORD)
    with disk_full_is_said(folder / PREPARED, "the base model with the item tokens"):
        prepare_base(
            args.base_model,
            folder / PREPARED,
            data.item_tokens,
            args.seed,
            args.model_max_length,
            args.packing,
            start=(args.init_item_tokens, data) if args.init_item_tokens else None,
            tokenisation=args.tokenisation,
        )
    return checkpoint, adapter


def make_trainer(run: Run) -> Any:
    """The trainer, its collator and its log."""
    from transformers import PrinterCallback, ProgressCallback

    from callbacks import Bar, Epochs, Replacing, RunLog
    from training import RecTrainer, checkpoint_bytes, code_weights
    from unlikelihood import Unlikelihood
    from valid_ranking import Ranking

    check_space(run.folder.path, 2 * checkpoint_bytes(run.model), "a checkpoint and the final model need")
    args, tasks = run.args, list(dict.fromkeys([*run.train_set.names, "seqrec"]))
    ranking = None
    if args.eval_ranking > 0:
        ranking = Ranking(
            run.valid_set,
            run.tokenizer,
            args.eval_ranking,
            args.per_device_batch_size,
            args.seed,
            no_eos=args.no_eos,
        )
    collator = TrainCollator(
        run.tokenizer, args.model_max_length, args.only_train_response, args.packing, tasks, args.no_eos
    )
    check_lengths(run.train_set, run.valid_set, collator)
    unlikelihood = None
    if args.unlikelihood:
        unlikelihood = Unlikelihood(item_token_ids(run.tokenizer, run.data), args.unlikelihood)
    trainer = RecTrainer(
        model=run.model,
        args=run.training,
        tasks=tasks,
        task_set=task_samples(run),
        ranking=ranking,
        loss_average=args.loss_average,
        weights=code_weights(run.data.indices, run.tokenizer, args.last_code_weight),
        unlikelihood=unlikelihood,
        train_dataset=run.train_set,
        eval_dataset=run.valid_set,
        data_collator=collator,
        processing_class=run.tokenizer,
        callbacks=[Epochs(run.train_set), RunLog(run.folder / LOG), Replacing(run.folder)],
        beside_checkpoint=lambda folder: run.style.save(folder, run.data),
    )
    if args.new_rows_learning_rate is not None:
        from row_rate import RowRate

        ids = run.tokenizer.convert_tokens_to_ids(run.data.item_tokens)
        trainer.add_callback(RowRate(run.model, ids, args.new_rows_learning_rate / args.learning_rate))
    for chatty in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(chatty)
    if sys.stderr.isatty():
        trainer.add_callback(Bar)
    return trainer


def task_samples(run: Run) -> TaskValidSet | None:
    """The samples of the validation loss by task, or None if there is no task but seqrec."""
    others = [name for name in run.train_set.names if name != "seqrec"]
    if not others or run.args.eval_task_samples <= 0:
        return None
    valid = run.valid_set
    return TaskValidSet(run.data, valid.prompts, others, valid.form, run.args.seed, run.args.eval_task_samples)


def save_final(run: Run) -> None:
    """Consolidate the trained weights into the run's folder itself, whatever the DeepSpeed configuration gathers.

    Raises:
        UserError: weights are not finite, or the disk is full.
    """
    from modeling import full_state

    model = run.trainer.accelerator.unwrap_model(run.trainer.model_wrapped)
    state = full_state(model)
    on_main(lambda: write_final(run, model, state))


def write_final(run: Run, model: Any, state: dict[str, torch.Tensor] | None) -> None:
    """On the main process: write the weights `state`, then put all in place."""
    from modeling import save_model

    assert state is not None  # the others have none
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in state and not torch.isfinite(state[name]).all():
            raise UserError(
                f"{name} is not finite after the last step: there is no model to save; lower --learning_rate"
            )
    temporary = run.folder / FINAL
    with disk_full_is_said(temporary, "the final model"):
        if run.args.lora:
            model.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)
            run.tokenizer.save_pretrained(temporary)
        else:
            save_model(model, run.tokenizer, temporary, state)
        run.style.save(temporary, run.data)
    run.folder.finish()
    say(f"{run.folder.path}: the trained model")


def main(argv: list[str] | None = None) -> None:
    """Prepare, train, save the model."""
    args = parse(argv)
    folder = RunFolder(args.output_dir)
    with folder.held() if is_main() else contextlib.nullcontext():
        try:
            run = prepare(args)
            run.trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
            if not any("eval_loss" in row for row in run.trainer.state.log_history):
                say("note: no evaluation fell within the run (--eval_delay), so the model is that of the last step")
            save_final(run)
        except BaseException:
            if is_main():
                folder.give_up()
            raise
    leave()


if __name__ == "__main__":
    run_main(main)
