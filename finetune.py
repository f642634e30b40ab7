"""Fine-tune a causal LM on the six LC-Rec tasks: full weights or LoRA, under torchrun with DeepSpeed, DDP or one process.

    torchrun --nproc_per_node=8 --master_port=23324 finetune.py --base_model huggyllama/llama-7b --output_dir ./ckpt/Games/ \\
        --dataset Games --data_path ./data --per_device_batch_size 8 --gradient_accumulation_steps 2 \\
        --learning_rate 5e-5 --epochs 4 --weight_decay 0.01 --save_and_eval_strategy epoch \\
        --deepspeed ./config/ds_z3_bf16.json --bf16 --only_train_response --index_file .index.json
    python finetune.py --base_model ./models/tiny --dataset ml-100k --data_path ./data --deepspeed none   # one process

`<output_dir>/` holds the consolidated model when this ends, `checkpoint-N/` on the way, `run.json` (all arguments, versions,
hashes of the data), `train.log` and TensorBoard's files in `runs/`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# torch keeps a compiled bfloat16 product for each shape it meets on the CPU, and batches come in many: memory without end
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

import torch

from arguments import add_data, add_global, add_train, comma_list, make_parser, parse_tasks
from collator import TrainCollator
from data import RecData, load_data
from prompt import load_prompts
from samples import TaskValidSet, TrainSet, ValidSet
from tasks import TASKS, HistoryFormat
from utils import (
    UserError,
    is_main,
    local_rank,
    read_json,
    run_main,
    say,
    set_seed,
    sha256,
    versions,
    world_size,
    write_json,
)

# flags that may differ when a run goes on; all others are its identity
FREE_ON_RESUME = {
    *(
        "resume_from_checkpoint",
        "overwrite_output_dir",
        "output_dir",
        "data_path",
        "base_model",
        "deepspeed",
        "prompt_file",
        "init_item_tokens",
    ),
    *("logging_step", "report_to", "save_total_limit", "gradient_checkpointing", "eval_task_samples"),
}
OWN_TENSORBOARD_DIR = "TENSORBOARD_LOGGING_DIR" in os.environ  # else each run of this process gets its own below
PREPARED = "base_with_item_tokens"  # folder in output_dir, removed at the end


def quiet() -> None:
    """Silence what libraries say about themselves on every step, and progress bars where there is no terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*past_key_values.*|.*use_cache=True.*|.*lr_scheduler.step.*")
    for name in ("bitsandbytes", "DeepSpeed", "deepspeed", "accelerate", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as that needs no file of the dataset."""
    parser = make_parser(__doc__)
    for add in (add_global, add_data, add_train):
        add(parser)
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace the run that --output_dir holds")
    parser.add_argument(
        "--eval_task_samples",
        type=int,
        default=100,
        metavar="N",
        help="samples of each task but seqrec whose loss is logged at each evaluation; 0: none",
    )
    args = parser.parse_args(argv)
    parse_tasks(args)
    if args.fp16 and args.bf16:
        raise UserError("--fp16 and --bf16 exclude each other")
    if args.fp16 and not torch.cuda.is_available():
        raise UserError("--fp16 needs a GPU; use --bf16 or neither on the CPU")
    for flag in ("per_device_batch_size", "gradient_accumulation_steps", "epochs", "logging_step"):
        if getattr(args, flag) <= 0:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be above 0")
    quiet()
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    for flag, choices in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        known = [choice.value for choice in choices]
        if getattr(args, flag) not in known:
            raise UserError(f"--{flag} {getattr(args, flag)}: unknown; known: {', '.join(known)}")
    if args.deepspeed.lower() == "none":
        args.deepspeed = None
    elif not Path(args.deepspeed).is_file():
        raise UserError(f"--deepspeed {args.deepspeed}: no such file (none: plain DDP)")
    if args.init_item_tokens and not Path(args.init_item_tokens).is_file():
        raise UserError(f"--init_item_tokens {args.init_item_tokens}: no such file")
    if args.select_by != "loss" and not args.eval_ranking:
        raise UserError(f"--select_by {args.select_by} needs --eval_ranking N")
    if args.train_new_rows_only and not args.lora:
        raise UserError("--train_new_rows_only freezes the other weights: add --lora")
    if (args.load_in_4bit or args.load_in_8bit) and not args.lora:
        raise UserError("--load_in_4bit and --load_in_8bit freeze the base weights: add --lora")
    if (args.load_in_4bit or args.load_in_8bit) and zero_stage(args.deepspeed) == 3:
        raise UserError(
            f"--deepspeed {args.deepspeed}: ZeRO-3 cannot part quantised weights; use --deepspeed none or a ds_z2 file"
        )
    return args


def zero_stage(deepspeed: str | None) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 without one."""
    config = read_json(deepspeed) if deepspeed else {}
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return zero.get("stage", 0) if isinstance(zero, dict) else 0


def start_processes(args: argparse.Namespace) -> None:
    """Join the process group: nccl on GPUs, gloo on the CPU; one process alone plays a group of one for DeepSpeed."""
    cpu = not torch.cuda.is_available()
    if cpu:
        say("note: no CUDA device; running on the CPU")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if args.deepspeed:
        if "RANK" not in os.environ:
            with socket.socket() as server:  # any free port: several runs may share a machine
                server.bind(("127.0.0.1", 0))
                port = str(server.getsockname()[1])
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update(alone)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it builds
            import deepspeed

            if cpu:
                # an all-reduce in C++, compiled on the first run: ZeRO has no use for it, it needs a compiler, and a process
                # that is killed while it compiles leaves a lock on which every later run waits for ever
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            # before TrainingArguments: zero.Init would otherwise see a single process on a machine without CUDA
            deepspeed.init_distributed(dist_backend="gloo" if cpu else "nccl", verbose=False)
    elif world_size() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo" if cpu else "nccl")
    if not cpu:
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"{local_rank() + 1} processes on this machine, but {torch.cuda.device_count()} GPUs: one GPU each"
            )
        torch.cuda.set_device(local_rank())


def load_datasets(args: argparse.Namespace) -> tuple[RecData, TrainSet, ValidSet]:
    """The checked data, the mixture of training tasks and the validation set (seqrec)."""
    tasks = parse_tasks(args)
    user_parts = frozenset().union(*(TASKS[name].splits["train"].user_parts for name, _, _ in tasks))
    data = load_data(args.data_path, args.dataset, args.index_file, user_parts)
    prompts = load_prompts(args.prompt_file)
    form = HistoryFormat(args.max_his_len, args.add_prefix, args.his_sep)
    train = TrainSet(data, prompts, tasks, form, args.seed, longest_history_only=args.longest_history_only)
    valid = ValidSet(
        data,
        prompts,
        form,
        args.seed,
        prompt_num=args.valid_prompt_sample_num,
        prompt_id=None if args.sample_valid else args.valid_prompt_id,
    )
    return data, train, valid


def check_output(args: argparse.Namespace, folder: Path) -> None:
    """Refuse to overwrite another run. Raises UserError."""
    if args.resume_from_checkpoint or not folder.is_dir():
        return
    there = [name for name in ("config.json", "adapter_config.json") if (folder / name).exists()]
    there += [path.name for path in folder.glob("checkpoint-*")]
    if not there:
        return
    if not args.overwrite_output_dir:
        raise UserError(
            f"{folder} holds a run already ({there[0]}); go on with --resume_from_checkpoint auto, "
            "replace it with --overwrite_output_dir, or choose another --output_dir"
        )


def remove_run(folder: Path) -> None:
    """Remove what a run of this script and the conversion of its checkpoints write, and nothing else."""
    names = (
        "checkpoint-*",
        "final-checkpoint-*",
        "runs",
        "run.json",
        "train.log",
        "*.safetensors",
        "*.safetensors.index.json",
    )
    names += ("config.json", "generation_config.json", "adapter_config.json", "README.md", "training_args.bin")
    names += (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
    )
    for path in {path for name in names for path in folder.glob(name)}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def deepspeed_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """The DeepSpeed configuration, its `auto` buckets and thresholds never below what a small model needs.

    transformers derives them from the hidden size alone, so that a model of 128 dimensions would talk in crumbs of 16,384
    numbers. From about 3,000 dimensions on these are transformers' own values.
    """
    if not args.deepspeed:
        return None
    config = read_json(args.deepspeed)
    if not isinstance(config, dict):
        raise UserError(f"{args.deepspeed}: must be an object")
    from transformers import AutoConfig

    prepared = AutoConfig.from_pretrained(Path(args.output_dir) / PREPARED).get_text_config()
    square, zero = prepared.hidden_size**2, config.get("zero_optimization", {})
    values = {
        "reduce_bucket_size": max(square, 10**7),
        "stage3_prefetch_bucket_size": max(int(0.9 * square), 10**7),
        "stage3_param_persistence_threshold": max(10 * prepared.hidden_size, 10**5),
    }
    zero.update({key: value for key, value in values.items() if zero.get(key) == "auto"})
    return config


def training_arguments(args: argparse.Namespace) -> Any:
    """transformers' TrainingArguments for our flags. Activates DeepSpeed: what is loaded after it may be partitioned."""
    from transformers import TrainingArguments

    if not OWN_TENSORBOARD_DIR:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(args.output_dir) / "runs")
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
        deepspeed=deepspeed_config(args),
        activation_checkpointing=args.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=args.logging_step,
        eval_strategy=args.save_and_eval_strategy,
        save_strategy=args.save_and_eval_strategy,
        eval_steps=args.save_and_eval_steps,
        save_steps=args.save_and_eval_steps,
        eval_delay=1 if args.save_and_eval_strategy == "epoch" else 2000,
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


def load_trainable(
    args: argparse.Namespace, folder: Path, training: Any, item_tokens: list[str], adapter: Path | None = None
) -> tuple[Any, Any]:
    """The model in float32 with the item tokens, as a whole or with an adapter (from `adapter`), and its tokenizer."""
    from modeling import attach_lora, load_adapter, load_model, load_tokenizer

    tokenizer = load_tokenizer(folder, args.model_max_length)
    more: dict[str, Any] = {}
    if args.packing:
        import packing

        more["attn_implementation"] = packing.PACKED
    if args.load_in_4bit or args.load_in_8bit:
        from transformers import BitsAndBytesConfig

        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=args.load_in_4bit,
            load_in_8bit=args.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        )
    model = load_model(folder, torch.float32, **more)
    model.config.use_cache = False
    if args.lora:
        if args.load_in_4bit or args.load_in_8bit:
            from peft import prepare_model_for_kbit_training

            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
        elif args.gradient_checkpointing:
            model.enable_input_require_grads()
        zero3 = bool(args.deepspeed) and training.hf_deepspeed_config.is_zero3()
        new = tokenizer.convert_tokens_to_ids(item_tokens) if args.train_new_rows_only else None
        model = attach_lora(model, args, zero3_bf16=zero3 and args.bf16, new_rows=new)
        model.peft_config["default"].base_model_name_or_path = args.base_model  # what test.py --lora is given
        if adapter is not None:
            load_adapter(model, adapter)
    return model, tokenizer


def fingerprint(base_model: str) -> str:
    """What tells one local base model from another: the hash of its configuration and its weights' names and sizes."""
    folder = Path(base_model)
    if not folder.is_dir():
        return base_model
    weights = sorted(
        (p.name, p.stat().st_size) for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".gguf")
    )
    config = sha256(folder / "config.json") if (folder / "config.json").is_file() else ""
    return hashlib.sha256(f"{config}{weights}".encode()).hexdigest()


def record(args: argparse.Namespace, data: RecData, train: TrainSet, valid: ValidSet) -> dict[str, Any]:
    """What the run is made of, for `run.json`."""
    files = dict(data.files)
    for flag in ("prompt_file", "deepspeed", "init_item_tokens"):
        if getattr(args, flag):
            files[flag] = Path(getattr(args, flag))
    return {
        "arguments": vars(args),
        "processes": world_size(),
        "base_model": fingerprint(args.base_model),
        "samples": {"train": train.counts(), "valid": len(valid)},
        "files": {name: {"path": str(path), "sha256": sha256(path)} for name, path in files.items()},
        "versions": versions(),
    }


def check_same_run(old: dict[str, Any], new: dict[str, Any], where: Path) -> None:
    """Refuse to go on with a run whose data or settings have changed since.

    Args:
        old, new: what `record` gives.
        where: the file that `old` comes from.

    Raises:
        UserError: names the first flag or file that differs.
    """
    for flag, value in new["arguments"].items():
        before = old["arguments"].get(flag, value)
        if flag not in FREE_ON_RESUME and before != value:
            raise UserError(
                f"--{flag} is {value!r}, but the run to go on with had {before!r} ({where}); "
                "use the same command, or begin another run in another --output_dir"
            )
    if old["processes"] != new["processes"]:
        raise UserError(f"{new['processes']} processes, but the run to go on with had {old['processes']} ({where})")
    if old["base_model"] != new["base_model"]:
        raise UserError(
            f"--base_model {new['arguments']['base_model']} is not the model that the run began with ({where})"
        )
    if set(old["files"]) != set(new["files"]):
        names = ", ".join(sorted(set(old["files"]) ^ set(new["files"])))
        raise UserError(f"only one of the two runs uses {names} ({where}); use the same command, or begin anew")
    for name, file in new["files"].items():
        if old["files"][name]["sha256"] != file["sha256"]:
            raise UserError(
                f"{file['path']} has changed since the run began ({where}); put the old file back, or begin anew"
            )


def find_resume(args: argparse.Namespace, folder: Path) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from, and the adapter to begin with, as `--resume_from_checkpoint` says (at most one of them).

    Raises:
        UserError: the path is neither, or the checkpoint would run foreign code when loaded.
    """
    from convert.scan import check_checkpoint
    from training import checkpoints

    if args.resume_from_checkpoint is None:
        return None, None
    if args.resume_from_checkpoint == "auto":
        found = checkpoints(folder)
        say(f"resuming from {found[-1]}" if found else f"{folder}: no checkpoint yet, starting from the beginning")
        path = found[-1] if found else None
    else:
        path = Path(args.resume_from_checkpoint)
        if args.lora and (path / "adapter_config.json").is_file() and not (path / "trainer_state.json").is_file():
            check_checkpoint(path)
            return None, path
        if not (path / "trainer_state.json").is_file():
            raise UserError(
                f"--resume_from_checkpoint {path}: neither a complete checkpoint-N folder (no trainer_state.json) "
                "nor, with --lora, an adapter (no adapter_config.json)"
            )
    if path is not None:
        check_checkpoint(path)
    return path, None


def save_final(trainer: Any, tokenizer: Any, folder: Path, lora: bool) -> None:
    """Consolidate the trained weights into `folder` itself, whatever the DeepSpeed configuration gathers."""
    from modeling import full_state, save_model
    from training import barrier, disk_full_is_said

    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    state = full_state(model)
    if is_main():
        temporary, mode = folder / ".final", (folder / "run.json").stat().st_mode
        with disk_full_is_said(temporary, "the final model"):
            if lora:
                model.save_pretrained(temporary, state_dict=state, save_embedding_layers=False)
                tokenizer.save_pretrained(temporary)
            else:
                save_model(model, tokenizer, temporary, state)
        shutil.rmtree(folder / PREPARED, ignore_errors=True)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name.endswith("config.json")):
            path.chmod(mode)  # safetensors makes its files private
            path.replace(folder / path.name)  # the configurations last: without them nothing loads
        temporary.rmdir()
        say(f"{folder}: the trained model")
    barrier()


@dataclass
class Run:
    """Everything that a fine-tuning run is made of, ready to train."""

    args: argparse.Namespace
    folder: Path
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
    quiet()
    from modeling import parameter_report, prepare_base
    from training import barrier, disk_full_is_said

    start_processes(args)
    set_seed(args.seed)
    folder = Path(args.output_dir)
    data, train_set, valid_set = load_datasets(args)
    say("training samples: " + ", ".join(f"{name} {n:,}" for name, n in train_set.counts().items()))
    check_output(args, folder)
    checkpoint, adapter = find_resume(args, folder)
    facts = record(args, data, train_set, valid_set)
    if checkpoint is not None and (checkpoint.parent / "run.json").is_file():
        check_same_run(read_json(checkpoint.parent / "run.json"), facts, checkpoint.parent / "run.json")
    barrier()
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        clear_partial(folder)
        with (
            removed_if_empty(folder),
            disk_full_is_said(folder / PREPARED, "the base model with the item tokens"),
        ):
            prepare_base(
                args.base_model,
                folder / PREPARED,
                data.item_tokens,
                args.seed,
                args.model_max_length,
                args.packing,
                start=(Path(args.init_item_tokens), data) if args.init_item_tokens else None,
            )
        if args.overwrite_output_dir and not args.resume_from_checkpoint:
            remove_run(folder)
        if checkpoint is None or not (folder / "run.json").is_file():
            write_json(folder / "run.json", facts)
    barrier()
    training = training_arguments(args)
    model, tokenizer = load_trainable(args, folder / PREPARED, training, data.item_tokens, adapter)
    say(parameter_report(model, len(data.item_tokens)))
    sample = train_set[0]
    say(f"first sample: {json.dumps(sample['prompt'] + sample['response'], ensure_ascii=False)[:600]}")
    run = Run(args, folder, data, train_set, valid_set, training, model, tokenizer, None, checkpoint)
    run.trainer = (trainer_of or make_trainer)(run)
    return run


def make_trainer(run: Run) -> Any:
    """The trainer, its collator and its log."""
    from transformers import PrinterCallback, ProgressCallback

    from training import Bar, Epochs, Ranking, RecTrainer, RunLog, check_space, checkpoint_bytes

    check_space(run.folder, 2 * checkpoint_bytes(run.model), "a checkpoint and the final model need")
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
    trainer = RecTrainer(
        model=run.model,
        args=run.training,
        tasks=tasks,
        task_set=task_samples(run),
        ranking=ranking,
        train_dataset=run.train_set,
        eval_dataset=run.valid_set,
        data_collator=TrainCollator(
            run.tokenizer, args.model_max_length, args.only_train_response, args.packing, tasks, args.no_eos
        ),
        processing_class=run.tokenizer,
        callbacks=[Epochs(run.train_set), RunLog(run.folder / "train.log")],
    )
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


@contextlib.contextmanager
def removed_if_empty(folder: Path) -> Any:
    """If the block fails, leave no empty `folder` behind."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def clear_partial(folder: Path) -> None:
    """Remove what an earlier process was writing when it was killed."""
    for path in [*folder.glob(".*.partial"), folder / ".final"]:
        shutil.rmtree(path, ignore_errors=True)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run = prepare(args)
    run.trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    save_final(run.trainer, run.tokenizer, run.folder, args.lora)


if __name__ == "__main__":
    run_main(main)
