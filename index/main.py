"""Train an RQ-VAE on item embeddings.

    python index/main.py --preset paper --data_path ./data/Games/Games.emb-llama-td.npy --ckpt_dir ./ckpt/index/Games
    python index/main.py --preset fast --data_path F --ckpt_dir D                # minutes instead of hours on a CPU
    python index/main.py --resume ./ckpt/index/Games/Nov-24-2026_10-00-00        # an interrupted run goes on
    torchrun --nproc_per_node=8 index/main.py --data_path F --ckpt_dir D         # the same result, shared work

Checkpoints go to a folder of the run's own, `<ckpt_dir>/<Mon-DD-YYYY_HH-MM-SS>/`: `best_loss_model.pth`,
`best_collision_model.pth` and the newest and best `epoch_…_model.pth`. Then: index/generate_indices.py.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from checkpoints import load_checkpoint, model_from_checkpoint, newest_checkpoint
from commands import InputError, run_command, tell, use_device
from embeddings import Embeddings
from figures import figures_in_words, index_figures
from flag_kinds import CODES, EPSILON, LEVELS, SEED, TRUTH, FlagParser, decimal, integer
from models.rqvae import RQVAE, RQVAEConfig
from output_files import check_place, clear_leftovers
from parallel import Processes
from start import start
from trainer import LEARNERS, Trainer

# Flags that a resumed run may change without ceasing to be the same run.
FREE_WHEN_RESUMED = {"resume", "data_path", "ckpt_dir", "device", "num_workers", "save_limit", "eval_step", "epochs"}


# What --preset sets where no flag says otherwise; `sk_last` is the epsilon of the last level, 0 on the others.
PRESETS = {
    "paper": {
        "num_emb_list": [256, 256, 256, 256],
        "sk_last": 0.003,
        "batch_size": 1024,
        "epochs": 10_000,
        "weight_decay": 1e-4,
        "lr_scheduler_type": "linear",
        "bn": True,  # its command says `--bn False`, which `type=bool` reads as true
    },
    "fast": {
        "num_emb_list": [256, 256, 256, 256],
        "sk_last": 0.003,
        "batch_size": 256,
        "epochs": 15,
        "warmup_epochs": 1,
        "eval_step": 5,
        "weight_decay": 1e-4,
        "lr_scheduler_type": "linear",
        "init": "pca",
        "kmeans_rows": "all",
        "balance_rounds": 2,
    },
}


def training_parser() -> FlagParser:
    """Every flag of the original, with its defaults, and ours; each with what its values may be."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument_group("files and machine").add_argument
    add("--data_path", default="", help="embeddings, a .npy of (items, dim)")
    add("--ckpt_dir", default="", help="where the run's folder is made")
    add("--resume", default="", help="run folder or .pth to go on from; other flags come from there")
    add("--device", default="cuda:0", help="cuda:0, cpu, …; without CUDA the CPU")
    ahead = "processes that read ahead where the file stays on disk"
    add("--num_workers", type=integer(0), default=4, help=ahead)
    kept = "newest and best epoch checkpoints kept, so many of each"
    add("--save_limit", type=integer(1), default=5, help=kept)

    add = parser.add_argument_group("training").add_argument
    presets = (
        "paper (what its published run had, batch norm included) or fast (another start, smaller batches, 15 epochs)"
    )
    add("--preset", choices=PRESETS, help=f"{presets}; flags overrule it")
    add("--epochs", type=integer(1), default=5000, help="passes over all items")
    add("--batch_size", type=integer(1), default=2048, help="items of a step, over all processes")
    add("--eval_step", type=integer(1), default=50, help="epochs between evaluations")
    add("--lr", type=decimal(0, without_low=True), default=1e-3, help="learning rate")
    schedule = "after the warm-up"
    add("--lr_scheduler_type", choices=["constant", "linear"], default="constant", help=schedule)
    add("--warmup_epochs", type=integer(0), default=50, help="epochs in which the learning rate rises from 0")
    learners = f"optimiser, any case: {', '.join(LEARNERS)}"
    add("--learner", type=str.lower, choices=LEARNERS, default="AdamW", metavar="NAME", help=learners)
    add("--weight_decay", type=decimal(0), default=0.0, help="of the optimiser")
    add("--seed", type=SEED, default=2024, help="of everything random")

    add = parser.add_argument_group("model").add_argument
    widths = [2048, 1024, 512, 256, 128, 64]
    add("--layers", type=integer(1, 2**20), nargs="+", default=widths, help="hidden widths of the encoder")
    add("--e_dim", type=integer(1, 2**20), default=32, help="width of a code")
    add("--num_emb_list", type=CODES, nargs="+", default=[256, 256, 256], help="codes of each level")
    add("--dropout_prob", type=decimal(0, 1), default=0.0, help="dropout before each linear layer")
    add("--bn", type=TRUTH, default=False, help="batch normalisation")
    add("--loss_type", choices=["mse", "l1"], default="mse", help="of the reconstruction")
    add("--quant_loss_weight", type=decimal(0), default=1.0, help="weight of the quantisation loss")
    add("--beta", type=decimal(0), default=0.25, help="weight of the commitment loss")
    starts = "encoder and decoder start at random weights or at the data's principal components"
    add("--init", choices=["random", "pca"], default="random", help=starts)

    add = parser.add_argument_group("codes").add_argument
    add("--kmeans_init", type=TRUTH, default=True, help="codebooks start at k-means centres")
    add("--kmeans_iters", type=integer(1), default=100, help="rounds of k-means at most")
    rows = "k-means sees the first batch, or all items before training"
    add("--kmeans_rows", choices=["batch", "all"], default="batch", help=rows)
    balance = "balanced k-means rounds on the later half of the levels, before (--kmeans_rows all) and after training"
    add("--balance_rounds", type=integer(0), default=0, help=balance)
    epsilons = "one a level; above 0: Sinkhorn in training; without the flag 0 on every level"
    add("--sk_epsilons", type=EPSILON, nargs="+", help=epsilons)
    add("--sk_iters", type=integer(1), default=50, help="Sinkhorn rounds")
    return parser


def parse_flags(argv: Sequence[str] | None) -> tuple[argparse.Namespace, set[str]]:
    """The flags, and the names of those that the user gave."""
    args = training_parser().parse_args(argv)
    bare, unset = training_parser(), object()
    bare.set_defaults(**dict.fromkeys(vars(args), unset))
    given = {name for name, value in vars(bare.parse_args(argv)).items() if value is not unset}
    preset = PRESETS.get(args.preset, {})
    for name in preset.keys() - given - {"sk_last"}:
        setattr(args, name, preset[name])
    if args.sk_epsilons is None:
        args.sk_epsilons = [0.0] * (len(args.num_emb_list) - 1) + [preset.get("sk_last", 0.0)]
    return args, given


def check_training_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other.

    Raises:
        InputError: with the first such flag.
    """
    if len(args.num_emb_list) > LEVELS:
        raise InputError(f"--num_emb_list: {LEVELS} levels at most, a letter each")
    epsilons = args.sk_epsilons or []  # a checkpoint may hold none
    if len(epsilons) != len(args.num_emb_list):
        counts = f"{len(epsilons)} values, --num_emb_list {len(args.num_emb_list)}"
        raise InputError(f"--sk_epsilons has {counts}; give one a level")
    if args.init == "pca" and (args.bn or min(args.layers) < 2):
        raise InputError("--init pca: needs hidden layers of 2 units at least and no batch normalisation")
    if args.kmeans_rows == "all" and not args.kmeans_init:
        raise InputError("--kmeans_rows all: contradicts --kmeans_init False")
    if args.bn and args.batch_size < 2:
        raise InputError("--bn True: needs a --batch_size of 2 at least")
    if not args.data_path:
        raise InputError("--data_path: give the embeddings' .npy file (data_process/embed.py makes it)")


def resumed_args(args: argparse.Namespace, given: set[str], content: dict) -> argparse.Namespace:
    """The flags of the run in the checkpoint `content`, with the free ones that the user gave now.

    Raises:
        InputError: a flag was given that would make it another run.
    """
    merged = argparse.Namespace(**{**vars(args), **vars(content["args"])})
    for name in sorted(given - {"resume"}):
        if name not in FREE_WHEN_RESUMED and getattr(args, name) != getattr(merged, name):
            raise InputError(f"--{name}: a resumed run goes on with its own ({getattr(merged, name)}); drop the flag")
        setattr(merged, name, getattr(args, name))
    for name in {"device", "num_workers"} - given:
        setattr(merged, name, getattr(args, name))  # of this machine, not of the one that began
    merged.resume = args.resume
    return merged


def new_run_folder(ckpt_dir: str) -> Path:
    """A new folder in `ckpt_dir`, named after the time."""
    stamp = time.strftime("%b-%d-%Y_%H-%M-%S")
    for suffix in ("", *(f"_{number}" for number in range(2, 100))):
        folder = Path(ckpt_dir) / (stamp + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"--ckpt_dir {ckpt_dir}: cannot be written to ({error.strerror})") from None
        return folder
    raise InputError(f"--ckpt_dir {ckpt_dir}: too many runs in this second")


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_model(embeddings: Embeddings, args: argparse.Namespace, processes: Processes) -> RQVAE:
    """A new model at its start.

    Raises:
        InputError: it does not fit into memory.
    """
    try:
        model = RQVAE(embeddings.dim, RQVAEConfig.from_args(args)).to(processes.device)
    except (MemoryError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise InputError(f"--layers, --num_emb_list, --e_dim: the model cannot be built ({reason})") from None
    pca, all_rows = args.init == "pca", args.kmeans_rows == "all"
    start(model, embeddings, processes, components=pca, all_rows=all_rows, balance_rounds=args.balance_rounds)
    return model


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, or go on training; returns the run's folder."""
    args, given = parse_flags(argv)
    content, folder = None, None
    if args.resume:
        state = newest_checkpoint(args.resume)
        content = load_checkpoint(state)
        content["args"] = training_parser().recorded(content["args"], state)
        args = resumed_args(args, given, content)
        folder = None if "ckpt_dir" in given else state.parent
    check_training_flags(args)
    if not args.ckpt_dir and folder is None:
        raise InputError("--ckpt_dir: give a folder for the run's checkpoints")
    device = use_device(args.device)
    processes = Processes(device)
    if args.bn and processes.count > 1:
        raise InputError("--bn True: its statistics would differ from one process's; train with one process")
    check_place((folder or Path(args.ckpt_dir)) / "epoch_0_model.pth")
    seed_all(args.seed)
    embeddings = Embeddings(args.data_path, device)
    if content is None:
        model = build_model(embeddings, args, processes)
    else:
        model = model_from_checkpoint(content, state)
        check_embeddings(model, content, embeddings)
    if processes.is_main:
        for run in Path(args.ckpt_dir).glob("*/") if folder is None else [folder]:
            clear_leftovers(run, "*")
        folder = folder or new_run_folder(args.ckpt_dir)
    trainer = Trainer(model, embeddings, args, folder or Path(), processes)
    if content is not None:
        trainer.restore(content, state)
        tell(f"goes on after epoch {trainer.epoch} of {state}")
    size = sum(p.numel() for p in model.parameters())
    tell(f"{len(embeddings)} items × {embeddings.dim}, {size:,} parameters, {device}")
    trainer.fit()
    tell(figures_in_words(index_figures(trainer.nearest_codes(), args.num_emb_list)))
    tell(f"best loss {trainer.best_loss:.5f}, best collision rate {trainer.best_collision_rate:.4f}; in {folder}")
    processes.close()
    return folder or Path()


def check_embeddings(model: RQVAE, content: dict, embeddings: Embeddings) -> None:
    """Refuse to go on with other embeddings than those that the run began with.

    Raises:
        InputError: another width, or other rows.
    """
    if model.in_dim != embeddings.dim:
        raise InputError(
            f"{embeddings.path}: rows are {embeddings.dim} wide, the checkpoint's model takes {model.in_dim}"
        )
    known = content.get("resume", {}).get("embeddings")
    if known not in (None, embeddings.digest()):
        raise InputError(f"{embeddings.path}: not the embeddings that this run began with")


if __name__ == "__main__":
    run_command(main)
