"""The command-line flags, one definition each, in groups that the scripts share. Names and defaults are the original's."""

from __future__ import annotations

import argparse

from tasks import TASKS
from utils import UserError

LORA_TARGETS = "q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the module's docstring as written, and the default of every flag."""


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help starts with `description` (a script's docstring)."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def add_global(parser: argparse.ArgumentParser) -> None:
    """Seed, base model, output folder."""
    group = parser.add_argument_group("global")
    group.add_argument("--seed", type=int, default=42, help="seed of every random choice")
    group.add_argument("--base_model", default="./llama-7b/", help="causal LM: a local folder or a hub id")
    group.add_argument("--output_dir", default="./ckpt/", help="where checkpoints and the final model go")


def add_data(parser: argparse.ArgumentParser) -> None:
    """Dataset, index file, history format, tasks, prompt sampling."""
    group = parser.add_argument_group("data")
    add_dataset(group)
    group.add_argument("--tasks", default=",".join(TASKS), help="training tasks, separated by commas")
    group.add_argument("--max_his_len", type=int, default=20, help="items of history in a prompt; -1: all")
    group.add_argument("--add_prefix", action="store_true", help='number the items of a history: "1. …"')
    group.add_argument("--his_sep", default=", ", help="text between the items of a history")
    group.add_argument(
        "--no_eos",
        action="store_true",
        help="no end-of-sequence token in training samples and in scores: the same in training and test",
    )
    group.add_argument("--only_train_response", action="store_true", help="loss on the response only, not the prompt")
    group.add_argument(
        "--train_prompt_sample_num",
        default="1,1,1,1,1,1",
        help="per task: how often a sample occurs in an epoch, each time with another template",
    )
    group.add_argument(
        "--train_data_sample_num",
        default="0,0,0,100000,0,0",
        help="per task: draw so many samples, once and without replacement; 0: all",
    )
    group.add_argument(
        "--longest_history_only",
        action="store_true",
        help="seqrec, fusionseqrec: train on each user's longest history alone, not on every prefix of it; with the loss on "
        "the whole text every item of a history is still predicted, once an epoch",
    )
    group.add_argument("--valid_prompt_id", type=int, default=0, help="template of the validation (--no-sample_valid)")
    group.add_argument(
        "--sample_valid",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="validate each user with randomly drawn templates",
    )
    group.add_argument("--valid_prompt_sample_num", type=int, default=2, help="templates per user in the validation")
    add_prompt_file(group)


def add_dataset(group: argparse._ActionsContainer) -> None:
    """Where the dataset's files are."""
    group.add_argument("--data_path", default="", help="folder that holds <dataset>/")
    group.add_argument("--dataset", default="Games", help="name of the dataset, and of its folder")
    group.add_argument("--index_file", default=".index.json", help="ending of the index file: <dataset><index_file>")


def add_prompt_file(group: argparse._ActionsContainer) -> None:
    """`--prompt_file`, alone."""
    group.add_argument(
        "--prompt_file",
        metavar="F",
        help="templates from F: JSON, or Python (which is run) with sft_prompt and all_prompt; this repository's if absent",
    )


def add_train(parser: argparse.ArgumentParser) -> None:
    """Optimiser, schedule, LoRA, precision, DeepSpeed."""
    group = parser.add_argument_group("training")
    add = group.add_argument
    add(
        "--init_item_tokens",
        metavar="NPY",
        help="item embeddings, (items, dim): a new token's row starts as the mean of its items'; drawn at random if absent",
    )
    add("--optim", default="adamw_torch", help="a transformers optimiser name (adamw_torch, adamw_bnb_8bit, …)")
    add("--epochs", type=float, default=4, help="passes over the training samples")
    add("--learning_rate", type=float, default=2e-5, help="peak learning rate")
    add("--per_device_batch_size", type=int, default=8, help="samples per process and step")
    add("--gradient_accumulation_steps", type=int, default=2, help="batches per optimiser step")
    add("--logging_step", type=int, default=10, help="optimiser steps between two lines of the log")
    add("--model_max_length", type=int, default=2048, help="longer samples are cut, in tokens")
    add("--weight_decay", type=float, default=0.01, help="decoupled weight decay of AdamW")
    add(
        "--resume_from_checkpoint",
        metavar="PATH",
        help="go on from a checkpoint-N folder (auto: the newest one), or with --lora begin with an adapter's weights",
    )
    add("--warmup_ratio", type=float, default=0.01, help="share of the steps in which the learning rate rises")
    add("--lr_scheduler_type", default="cosine", help="a transformers schedule name")
    add("--save_and_eval_strategy", default="epoch", choices=("epoch", "steps"), help="when to evaluate and save")
    add("--save_and_eval_steps", type=int, default=1000, help="optimiser steps between saves (strategy steps)")
    add("--fp16", action="store_true", help="mixed precision in float16")
    add("--bf16", action="store_true", help="mixed precision in bfloat16")
    add("--deepspeed", default="./config/ds_z3_bf16.json", help="DeepSpeed configuration; none: plain DDP")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute activations")
    add("--max_steps", type=int, default=-1, help="stop after so many optimiser steps; -1: by --epochs")
    add(
        "--packing",
        action="store_true",
        help="lay a batch's samples end to end instead of padding them: same loss, faster",
    )
    add(
        "--eval_ranking",
        type=int,
        default=0,
        metavar="N",
        help="rank all items for N validation users at each evaluation",
    )
    add(
        "--select_by", default="loss", choices=("loss", "hit@10", "ndcg@10"), help="what the best checkpoint is best in"
    )
    add("--save_total_limit", type=int, default=5, help="newest checkpoints kept, and always the best one")
    add("--report_to", default="tensorboard", help="trackers by commas (tensorboard, wandb, …), or none")
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--lora", action="store_true", help="train an adapter instead of all weights")
    lora.add_argument("--lora_r", type=int, default=8, help="rank")
    lora.add_argument("--lora_alpha", type=int, default=32, help="scale: alpha / rank")
    lora.add_argument("--lora_dropout", type=float, default=0.05, help="dropout before the adapter")
    lora.add_argument("--lora_target_modules", default=LORA_TARGETS, help="modules with an adapter, by commas")
    lora.add_argument("--lora_modules_to_save", default="embed_tokens,lm_head", help="modules trained whole, by commas")
    lora.add_argument(
        "--train_new_rows_only",
        action="store_true",
        help="of embeddings and head train the item tokens' rows alone, instead of --lora_modules_to_save",
    )
    lora.add_argument("--load_in_4bit", action="store_true", help="QLoRA: base weights in 4 bits (bitsandbytes)")
    lora.add_argument("--load_in_8bit", action="store_true", help="base weights in 8 bits (bitsandbytes)")


def add_test(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, prompts, beams, metrics, results."""
    group = parser.add_argument_group("test")
    add = group.add_argument
    add("--ckpt_path", default="", help="checkpoint folder, or the adapter's with --lora")
    add("--lora", action="store_true", help="the checkpoint is a LoRA adapter of --base_model")
    add("--filter_items", action="store_true", help="kept from the original; every result is an existing item anyway")
    add("--results_file", default="./results/test-ddp.json", help="where metrics go; predictions go beside it")
    add("--test_batch_size", type=batch_size, default=1, help="users per batch (per process), or auto")
    add("--num_beams", type=int, default=20, help="beams, and ranked items per user")
    add("--sample_num", type=int, default=-1, help="test so many users, drawn by the seed; -1: all")
    add("--gpu_id", type=int, default=0, help="GPU of a single process")
    add("--test_prompt_ids", default="0", help="template numbers by commas, or all")
    add("--metrics", default="hit@1,hit@5,hit@10,ndcg@5,ndcg@10", help="hit@k and ndcg@k, by commas")
    add("--test_task", default="SeqRec", help="SeqRec, ItemSearch or FusionSeqRec, in any case")
    add("--restart", action="store_true", help="throw away the predictions of an earlier, different or cut-off run")


def batch_size(text: str) -> int | str:
    """A positive number, or `auto`. Used as an argparse type."""
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor auto")
    return int(text)


def comma_list(text: str) -> list[str]:
    """The parts of a comma-separated text, without blanks."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_tasks(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """`(task, train_prompt_sample_num, train_data_sample_num)` for each task named by `args`.

    Raises:
        UserError: an unknown or repeated task, lists of different lengths, or a number that is none.
    """
    tasks = [task.lower() for task in comma_list(args.tasks)]
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"--tasks: unknown task {task!r}; known: {', '.join(TASKS)}")
        if tasks.count(task) > 1:
            raise UserError(f"--tasks: {task} is named twice")
    if not tasks:
        raise UserError("--tasks names no task")
    numbers = {}
    for flag in ("train_prompt_sample_num", "train_data_sample_num"):
        parts = comma_list(getattr(args, flag))
        if len(parts) != len(tasks):
            raise UserError(f"--{flag} has {len(parts)} numbers, but --tasks names {len(tasks)} tasks")
        if not all(part.isdigit() for part in parts):
            raise UserError(f"--{flag}: {getattr(args, flag)!r} is not a list of whole numbers from 0")
        numbers[flag] = [int(part) for part in parts]
    if 0 in numbers["train_prompt_sample_num"]:
        raise UserError("--train_prompt_sample_num must be 1 or more; leave a task out with --tasks")
    return list(zip(tasks, numbers["train_prompt_sample_num"], numbers["train_data_sample_num"], strict=True))
