"""The command-line flags: one definition each, with its range and its role, in groups that the scripts share.

Names and defaults are the original's. A value that is out of range is one line and exit status 2, like every other mistake.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

from flag_values import SEEDS, batch_size, file_name, folder_name, plain_name, real, steps_or_all, whole
from tasks import TASKS
from utils import UserError

LORA_TARGETS = "q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj"


class Role(Enum):
    """What a flag means for a run that goes on and for a model that is tested.

    RESULT: it changes what is found, so a run that goes on must have the same.
    TRAINING: as RESULT in training; a test takes it and does nothing with it.
    FREE: how a run goes, where things are, or a file that is compared by its content.
    """

    RESULT = "result"
    TRAINING = "training"
    FREE = "free"


# ---- flags ----


@dataclass(frozen=True)
class Flag:
    """One flag.

    Args:
        kind: turns the text into a value and checks it; None: a switch (with `--no-…` where the default is on).
    """

    name: str
    default: Any
    help: str
    kind: Callable[[str], Any] | None = str
    role: Role = Role.RESULT
    choices: tuple[str, ...] | None = None
    metavar: str | None = None

    def add_to(self, group: argparse._ActionsContainer) -> None:
        """Define it on a parser or one of its groups."""
        name = f"--{self.name}"
        if self.kind is not None:
            more: Any = {"type": self.kind, "choices": self.choices, "metavar": self.metavar}
            group.add_argument(name, default=self.default, help=self.help, **more)
        elif self.default:
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=True, help=self.help)
        else:
            group.add_argument(name, action="store_true", help=self.help)


GLOBAL = (
    Flag("seed", 42, "seed of every random choice", SEEDS),
    Flag("base_model", "./llama-7b/", "causal LM: a local folder or a hub id", folder_name, Role.FREE),
    Flag("output_dir", "./ckpt/", "where checkpoints and the final model go", folder_name, Role.FREE),
)
DATASET = (
    Flag("data_path", "", "folder that holds <dataset>/", role=Role.FREE),
    Flag("dataset", "Games", "name of the dataset, and of its folder", plain_name),
    Flag("index_file", ".index.json", "ending of the index file: <dataset><index_file>", role=Role.FREE),
)
# How a model is asked. It must be asked as it was trained, so these are saved beside its weights (prompt_style.py).
PROMPT = (
    Flag("max_his_len", 20, "items of history in a prompt; -1 or 0: all", whole(-1)),
    Flag("add_prefix", False, 'number the items of a history: "1. …"', None),
    Flag("his_sep", ", ", "text between the items of a history"),
    Flag(
        "no_eos",
        False,
        "no end-of-sequence token in training samples and in scores",
        None,
    ),
    Flag(
        "prompt_file",
        None,
        "templates from F: JSON, or Python (which is run) with sft_prompt and all_prompt; this repository's if absent",
        role=Role.FREE,
        metavar="F",
    ),
)
MIXTURE = (
    Flag("tasks", ",".join(TASKS), "training tasks, separated by commas", role=Role.TRAINING),
    Flag("only_train_response", False, "loss on the response only, not the prompt", None, Role.TRAINING),
    Flag(
        "train_prompt_sample_num",
        None,
        "per task: how often a sample occurs in an epoch, each time with another template; if absent, once",
        role=Role.TRAINING,
    ),
    Flag(
        "train_data_sample_num",
        None,
        "per task: draw so many samples, once and without replacement; 0: all; if absent, 100000 of fusionseqrec and all of "
        "the others",
        role=Role.TRAINING,
    ),
    Flag(
        "longest_history_only",
        False,
        "seqrec, fusionseqrec: train on each user's longest history alone, not on every prefix of it; with the loss on "
        "the whole text every item of a history is still predicted, once an epoch",
        None,
        Role.TRAINING,
    ),
    Flag(
        "history_windows",
        False,
        "seqrec: train on all of each training part, in pieces of max_his_len + 1 items, cut at other places in each epoch; "
        "with the loss on the whole text every item is predicted once an epoch",
        None,
        Role.TRAINING,
    ),
    Flag(
        "swap_items",
        0.0,
        "seqrec: share of the training items that an item like them (by --swap_by) stands for, drawn in each epoch",
        real(0, below=1),
        Role.TRAINING,
    ),
    Flag(
        "swap_by",
        None,
        "file of item embeddings (items, dim) that tells which items are alike; that of --init_item_tokens if absent",
        role=Role.FREE,
        metavar="NPY",
    ),
    Flag("valid_prompt_id", 0, "template of the validation (--no-sample_valid)", whole(0), Role.TRAINING),
    Flag("sample_valid", True, "validate each user with randomly drawn templates", None, Role.TRAINING),
    Flag("valid_prompt_sample_num", 2, "templates per user in the validation", whole(1), Role.TRAINING),
)
TRAIN = (
    Flag(
        "init_item_tokens",
        None,
        "start of a new token's row: words, from the model's own rows for its items' titles, or a file of item embeddings, "
        "(items, dim); drawn at random if absent",
        role=Role.FREE,
        metavar="words|NPY",
    ),
    Flag(
        "new_rows_learning_rate",
        None,
        "peak learning rate of the item tokens' rows, as that of all other weights if absent",
        real(0, below=1e12, above_low=True),
    ),
    Flag(
        "last_code_weight",
        1.0,
        "weight of the tokens of an index's last level in the training loss, beside 1 of all others",
        real(0, below=1e6, above_low=True),
    ),
    Flag(
        "unlikelihood",
        0.0,
        "weight of a second term in the training loss, against items that stand in the sample already; for data in which "
        "nobody takes an item twice",
        real(0, below=1e6),
    ),
    Flag("optim", "adamw_torch", "a transformers optimiser name (adamw_torch, adamw_bnb_8bit, …)"),
    Flag("epochs", 4, "passes over the training samples", real(0, below=1e6, above_low=True)),
    Flag("learning_rate", 2e-5, "peak learning rate", real(0, below=1e12, above_low=True)),
    Flag("per_device_batch_size", 8, "samples per process and step", whole(1)),
    Flag("gradient_accumulation_steps", 2, "batches per optimiser step", whole(1)),
    Flag(
        "loss_average",
        "batch",
        "the loss of an optimiser step: batch, the original's, is the plain mean of each batch's mean over its own "
        "labelled tokens; token is one mean over all labelled tokens of the step, in which long answers weigh more",
        choices=("batch", "token"),
    ),
    Flag("logging_step", 10, "optimiser steps between two lines of the log", whole(1), Role.FREE),
    Flag("model_max_length", 2048, "longer samples are cut, in tokens", whole(1)),
    Flag(
        "tokenisation",
        "base",
        "text around item tokens: base, as the base model's tokenizer cuts it today; 2023, as LLaMA's cut it then, with "
        "which the paper's checkpoints were trained (a LLaMA base only); paper: 2023 for a LLaMA base, else base",
        choices=("base", "2023", "paper"),
    ),
    Flag("weight_decay", 0.01, "decoupled weight decay of AdamW", real(0, below=1e12)),
    Flag(
        "dropout",
        0.0,
        "in training, share dropped of embeddings and branches; not for pretrained models",
        real(0, below=1),
    ),
    Flag(
        "resume_from_checkpoint",
        None,
        "go on from a checkpoint-N folder (auto: the newest one), or with --lora begin with an adapter's weights",
        role=Role.FREE,
        metavar="PATH",
    ),
    Flag("warmup_ratio", 0.01, "share of the steps in which the learning rate rises", real(0, below=1)),
    Flag("lr_scheduler_type", "cosine", "a transformers schedule name"),
    Flag("save_and_eval_strategy", "epoch", "when to evaluate and save", choices=("epoch", "steps")),
    Flag("save_and_eval_steps", 1000, "optimiser steps between saves (strategy steps)", whole(1)),
    Flag(
        "eval_delay",
        None,
        "before the first evaluation, in epochs (strategy epoch; 1 if absent) or optimiser steps (strategy steps; 2000)",
        real(0),
    ),
    Flag("fp16", False, "mixed precision in float16 (GPUs)", None),
    Flag("bf16", False, "mixed precision in bfloat16", None),
    Flag("deepspeed", "./config/ds_z3_bf16.json", "DeepSpeed configuration; none: plain DDP", role=Role.FREE),
    Flag("gradient_checkpointing", True, "recompute activations", None, Role.FREE),
    Flag("max_steps", -1, "stop after so many optimiser steps; -1: by --epochs", steps_or_all),
    Flag("packing", False, "lay a batch's samples end to end instead of padding them: same loss, faster", None),
    Flag("eval_ranking", 0, "rank all items for N validation users at each evaluation; 0: none", whole(0), metavar="N"),
    Flag(
        "eval_task_samples",
        100,
        "samples of each task but seqrec whose loss is logged at each evaluation; 0: none",
        whole(0),
        Role.FREE,
        metavar="N",
    ),
    Flag("select_by", "loss", "what the best checkpoint is best in", choices=("loss", "hit@10", "ndcg@10")),
    Flag("save_total_limit", 5, "newest checkpoints kept, and always the best one", whole(1), Role.FREE),
    Flag("report_to", "tensorboard", "trackers by commas (tensorboard, wandb, …), or none", role=Role.FREE),
    Flag("overwrite_output_dir", False, "replace the run that --output_dir holds", None, Role.FREE),
)
LORA = (
    Flag("lora", False, "train an adapter instead of all weights", None),
    Flag("lora_r", 8, "rank", whole(1, 2**16 - 1)),
    Flag("lora_alpha", 32, "scale: alpha / rank", whole(1, 2**16 - 1)),
    Flag("lora_dropout", 0.05, "dropout before the adapter", real(0, below=1)),
    Flag("lora_target_modules", LORA_TARGETS, "modules with an adapter, by commas"),
    Flag("lora_modules_to_save", "embed_tokens,lm_head", "modules trained whole, by commas"),
    Flag(
        "train_new_rows_only",
        False,
        "of embeddings and head train the item tokens' rows alone, instead of --lora_modules_to_save",
        None,
    ),
    Flag("load_in_4bit", False, "QLoRA: base weights in 4 bits (bitsandbytes)", None),
    Flag("load_in_8bit", False, "base weights in 8 bits (bitsandbytes)", None),
)
MODEL = (
    Flag("ckpt_path", "", "checkpoint: a folder or a hub id; the adapter's with --lora", role=Role.FREE),
    Flag("lora", False, "the checkpoint is a LoRA adapter of --base_model", None),
    Flag("gpu_id", 0, "GPU of a single process", whole(0), Role.FREE),
    Flag(
        "dtype",
        "auto",
        "auto: bfloat16 on a GPU, float32 on the CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    ),
    Flag(
        "allow_other_index",
        False,
        "go on although the index file gives items other indices than the model was trained with",
        None,
        Role.FREE,
    ),
)
TEST = (
    Flag("filter_items", False, "kept from the original; every result is an existing item anyway", None, Role.FREE),
    Flag("results_file", "./results/test-ddp.json", "where metrics go; predictions go beside it", file_name, Role.FREE),
    Flag("test_batch_size", 1, "users per batch (per process), or auto", batch_size, Role.FREE),
    Flag("num_beams", 20, "beams, and ranked items per user", whole(1)),
    Flag("sample_num", -1, "test so many users, drawn by the seed; -1: all", steps_or_all),
    Flag("test_prompt_ids", "0", "template numbers by commas, or all", role=Role.FREE),
    Flag("metrics", "hit@1,hit@5,hit@10,ndcg@5,ndcg@10", "hit@k and ndcg@k, by commas", role=Role.FREE),
    Flag("test_task", "SeqRec", "SeqRec, ItemSearch or FusionSeqRec, in any case", role=Role.FREE),
    Flag(
        "restart",
        False,
        "begin anew; results of an earlier or cut-off run are replaced at the end",
        None,
        Role.FREE,
    ),
)
ALL = (*GLOBAL, *DATASET, *PROMPT, *MIXTURE, *TRAIN, *LORA, *MODEL, *TEST)


def with_role(*roles: Role) -> frozenset[str]:
    """The names of the flags that have one of `roles`."""
    return frozenset(flag.name for flag in ALL if flag.role in roles)


def defaults() -> dict[str, Any]:
    """The default of every flag."""
    return {flag.name: flag.default for flag in ALL}


# ---- parsers ----


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the module's docstring as written, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are a `UserError`: one line and status 2, as for every other mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise `message`."""
        raise UserError(f"{message.removeprefix('argument ')[:500]} (--help explains the flags)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, for words that files and the system can take: UTF-8, without NUL."""
        flag = ""
        for word in map(str, sys.argv[1:] if args is None else args):
            flag = word.partition("=")[0] if word.startswith("-") else flag
            if re.search("[\0\ud800-\udfff]", word):
                self.error(f"{flag}: {ascii(word)[:80]} is not valid UTF-8, or holds a NUL")
        return super().parse_known_args(args, namespace)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help starts with `description` (a script's docstring)."""
    return Parser(description=description, formatter_class=HelpFormatter, allow_abbrev=False)


def add_flags(parser: argparse._ActionsContainer, title: str, flags: Iterable[Flag]) -> argparse._ActionsContainer:
    """Add a group of flags under a title of its own; returns the group."""
    group = parser.add_argument_group(title)
    for flag in flags:
        flag.add_to(group)
    return group


def add_global(parser: argparse.ArgumentParser) -> None:
    """Seed, base model, output folder."""
    add_flags(parser, "global", GLOBAL)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Dataset, form of the prompts, training mixture."""
    add_flags(parser, "data", DATASET)
    add_flags(parser, "prompts (a trained model brings its own: prompt_style.json)", PROMPT)
    add_flags(parser, "training mixture", MIXTURE)


def add_dataset(group: argparse._ActionsContainer) -> None:
    """Where the dataset's files are."""
    for flag in DATASET:
        flag.add_to(group)


def add_train(parser: argparse.ArgumentParser) -> None:
    """Optimiser, schedule, precision, DeepSpeed, LoRA."""
    add_flags(parser, "training", TRAIN)
    add_flags(parser, "LoRA", LORA)


def add_test(parser: argparse.ArgumentParser) -> None:
    """Checkpoint, beams, metrics, results."""
    add_flags(parser, "model", MODEL)
    add_flags(parser, "test", TEST)


def parse_given(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, frozenset[str]]:
    """The arguments, and which of the flags that a model may answer itself (`PROMPT`, dataset, base) the user gave."""
    absent = object()
    flags = [*PROMPT, *(flag for flag in (*GLOBAL, *DATASET) if flag.name in ("dataset", "base_model"))]
    args = parser.parse_args(argv, argparse.Namespace(**{flag.name: absent for flag in flags}))
    given = frozenset(flag.name for flag in flags if getattr(args, flag.name) is not absent)
    for flag in flags:
        if flag.name not in given:
            setattr(args, flag.name, flag.default)
    return args, given


def style_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `PROMPT` and of `dataset`: what a trained model knows itself."""
    return {name: getattr(args, name) for name in (*(flag.name for flag in PROMPT), "dataset")}


# ---- lists in flags ----


def comma_list(value: str) -> list[str]:
    """The parts of a comma-separated text, without blanks."""
    return [part.strip() for part in value.split(",") if part.strip()]


def parse_tasks(tasks: str, prompt_numbers: str | None, sample_numbers: str | None) -> list[tuple[str, int, int]]:
    """`(task, copies an epoch, samples drawn or 0 for all)` for each task named.

    Args:
        tasks: `--tasks`.
        prompt_numbers, sample_numbers: `--train_prompt_sample_num`, `--train_data_sample_num`; each task's own if absent.

    Raises:
        UserError: an unknown or repeated task, lists of different lengths, or a number that is none.
    """
    names = [task.lower() for task in comma_list(tasks)]
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks: unknown task {name!r}; known: {', '.join(TASKS)}")
        if names.count(name) > 1:
            raise UserError(f"--tasks: {name} is named twice")
    if not names:
        raise UserError("--tasks names no task")
    numbers = [[1] * len(names), [TASKS[name].drawn for name in names]]
    given = (("train_prompt_sample_num", prompt_numbers), ("train_data_sample_num", sample_numbers))
    for place, (flag, value) in enumerate(given):
        if value is None:
            continue
        parts = comma_list(value)
        if len(parts) != len(names):
            raise UserError(f"--{flag} has {len(parts)} numbers, but --tasks names {len(names)} tasks")
        if not all(part.isascii() and part.isdigit() and len(part) <= 18 for part in parts):
            raise UserError(f"--{flag}: {value!r} is not a list of whole numbers from 0")
        numbers[place] = [int(part) for part in parts]
    if max(numbers[0]) > 10**6:
        raise UserError(f"--train_prompt_sample_num: {max(numbers[0])} copies of a sample an epoch; 1,000,000 at most")
    if 0 in numbers[0]:
        raise UserError("--train_prompt_sample_num must be 1 or more; leave a task out with --tasks")
    return list(zip(names, *numbers, strict=True))
