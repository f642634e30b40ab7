"""Train an RQ-VAE on item embeddings.

    python index/main.py --data_path ./data/Games/Games.emb-llama-td.npy --ckpt_dir ./ckpt/index/Games \\
        --num_emb_list 256 256 256 256 --sk_epsilons 0 0 0 0.003 --batch_size 1024 --epochs 10000 \\
        --weight_decay 1e-4 --lr_scheduler_type linear
    python index/main.py --preset fast --data_path F --ckpt_dir D                 # minutes instead of hours on a CPU
    python index/main.py --resume ./ckpt/index/Games/Nov-24-2026_10-00-00        # an interrupted run goes on
    torchrun --nproc_per_node=8 index/main.py --data_path …                       # the same result, shared work

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
from common import UserError, boolean, pick_device, run_main, say
from embeddings import Embeddings
from figures import describe, index_figures
from models.rqvae import RQVAE, RQVAEConfig
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


def build_parser() -> argparse.ArgumentParser:
    """Every flag of the original, with its defaults, and ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lr", type=float, default=1e-3, help="learning rate (1e-3)")
    add("--epochs", type=int, default=5000, help="passes over all items (5000)")
    add("--batch_size", type=int, default=2048, help="items of a step, over all processes (2048)")
    add("--num_workers", type=int, default=4, help="processes that read ahead where the file stays on disk (4)")
    add("--eval_step", type=int, default=50, help="epochs between evaluations (50)")
    add("--learner", default="AdamW", help=f"optimiser: {', '.join(LEARNERS)}, any case (AdamW)")
    add("--lr_scheduler_type", choices=["constant", "linear"], default="constant", help="after the warm-up (constant)")
    add("--warmup_epochs", type=int, default=50, help="epochs in which the learning rate rises from 0 (50)")
    add("--data_path", default="", help="embeddings, a .npy of (items, dim)")
    add("--weight_decay", type=float, default=0.0, help="of the optimiser (0.0)")
    add("--dropout_prob", type=float, default=0.0, help="dropout before each linear layer (0.0)")
    add("--bn", type=boolean, default=False, help="batch normalisation, True or False (False)")
    add("--loss_type", choices=["mse", "l1"], default="mse", help="of the reconstruction (mse)")
    add("--kmeans_init", type=boolean, default=True, help="codebooks start at k-means centres, True or False (True)")
    add("--kmeans_iters", type=int, default=100, help="rounds of k-means at most (100)")
    add("--sk_epsilons", type=float, nargs="+", help="a level; above 0: Sinkhorn in training (0.0 for every level)")
    add("--sk_iters", type=int, default=50, help="Sinkhorn rounds (50)")
    add("--device", default="cuda:0", help="cuda:0, cpu, … (cuda:0; without CUDA the CPU)")
    add("--num_emb_list", type=int, nargs="+", default=[256, 256, 256], help="codes of each level (256 256 256)")
    add("--e_dim", type=int, default=32, help="width of a code (32)")
    add("--quant_loss_weight", type=float, default=1.0, help="weight of the quantisation loss (1.0)")
    add("--beta", type=float, default=0.25, help="weight of the commitment loss (0.25)")
    widths = [2048, 1024, 512, 256, 128, 64]
    add("--layers", type=int, nargs="+", default=widths, help="hidden widths of the encoder (2048 1024 512 256 128 64)")
    add("--save_limit", type=int, default=5, help="newest and best epoch checkpoints kept, each (5)")
    add("--ckpt_dir", default="", help="where the run's folder is made")
    presets = "paper (its published settings) or fast (other start, smaller batches, 15 epochs); flags overrule it"
    add("--preset", choices=PRESETS, help=presets)
    starts = "encoder and decoder start at random weights or at the data's principal components (random)"
    add("--init", choices=["random", "pca"], default="random", help=starts)
    rows = "k-means sees the first batch, or all items before training (batch)"
    add("--kmeans_rows", choices=["batch", "all"], default="batch", help=rows)
    balance = (
        "balanced k-means rounds on the later half of the levels, before (--kmeans_rows all) and after training (0)"
    )
    add("--balance_rounds", type=int, default=0, help=balance)
    add("--seed", type=int, default=2024, help="of everything random (2024)")
    add("--resume", default="", help="run folder or .pth to go on from; other flags come from there")
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, set[str]]:
    """The flags, and the names of those that the user gave."""
    parser = build_parser()
    args = parser.parse_args(argv)
    silent = build_parser()
    for action in silent._actions:
        action.default = argparse.SUPPRESS
    given = set(vars(silent.parse_args(argv)))
    preset = PRESETS.get(args.preset, {})
    for name in preset.keys() - given - {"sk_last"}:
        setattr(args, name, preset[name])
    if args.sk_epsilons is None:
        args.sk_epsilons = [0.0] * (len(args.num_emb_list) - 1) + [preset.get("sk_last", 0.0)]
    return args, given


def check(args: argparse.Namespace) -> None:
    """Refuse flags that cannot work, by name and reason.

    Raises:
        UserError: with the first such flag.
    """
    least = {"epochs": 1, "batch_size": 1, "num_workers": 0, "eval_step": 1, "warmup_epochs": 0, "kmeans_iters": 1}
    least |= {
        "balance_rounds": 0,
        "sk_iters": 1,
        "e_dim": 1,
        "save_limit": 1,
        "weight_decay": 0,
        "beta": 0,
        "quant_loss_weight": 0,
    }
    for name, value in least.items():
        if not getattr(args, name) >= value:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least {value}")
    if not args.lr > 0:
        raise UserError(f"--lr {args.lr}: must be above 0")
    if not 0 <= args.dropout_prob < 1:
        raise UserError(f"--dropout_prob {args.dropout_prob}: must be at least 0 and below 1")
    if args.learner.lower() not in LEARNERS:
        raise UserError(f"--learner {args.learner}: unknown; one of {', '.join(LEARNERS)}")
    if min(args.num_emb_list) < 2 or min(args.layers) < 1:
        raise UserError("--num_emb_list needs two codes a level at least, --layers widths of 1 at least")
    if len(args.num_emb_list) > 26:
        raise UserError("--num_emb_list: 26 levels at most, a letter each")
    if args.init == "pca" and (args.bn or min(args.layers) < 2):
        raise UserError("--init pca: needs hidden layers of 2 units at least and no batch normalisation")
    if args.kmeans_rows == "all" and not args.kmeans_init:
        raise UserError("--kmeans_rows all: contradicts --kmeans_init False")
    if len(args.sk_epsilons) != len(args.num_emb_list):
        raise UserError(
            f"--sk_epsilons has {len(args.sk_epsilons)} values, --num_emb_list {len(args.num_emb_list)}; give one a level"
        )
    if min(args.sk_epsilons) < 0:
        raise UserError("--sk_epsilons: must be 0 (nearest code) or above")


def resumed_args(args: argparse.Namespace, given: set[str], content: dict) -> argparse.Namespace:
    """The flags of the run in the checkpoint `content`, with the free ones that the user gave now.

    Raises:
        UserError: a flag was given that would make it another run.
    """
    merged = argparse.Namespace(**{**vars(args), **vars(content["args"])})
    for name in sorted(given - {"resume"}):
        if name not in FREE_WHEN_RESUMED and getattr(args, name) != getattr(merged, name):
            raise UserError(f"--{name}: a resumed run goes on with its own ({getattr(merged, name)}); drop the flag")
        setattr(merged, name, getattr(args, name))
    for name in {"device", "num_workers"} - given:
        setattr(merged, name, getattr(args, name))  # of this machine, not of the one that began
    merged.resume = args.resume
    return merged


def run_folder(ckpt_dir: str) -> Path:
    """A new folder in `ckpt_dir`, named after the time."""
    stamp = time.strftime("%b-%d-%Y_%H-%M-%S")
    for suffix in ("", *(f"_{number}" for number in range(2, 100))):
        folder = Path(ckpt_dir) / (stamp + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"--ckpt_dir {ckpt_dir}: cannot be written to ({error.strerror})") from None
        return folder
    raise UserError(f"--ckpt_dir {ckpt_dir}: too many runs in this second")


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def main(argv: Sequence[str] | None = None) -> Path:
    """Train, or go on training; returns the run's folder."""
    args, given = parse(argv)
    content, folder = None, None
    if args.resume:
        state = newest_checkpoint(args.resume)
        content = load_checkpoint(state)
        args = resumed_args(args, given, content)
        folder = None if "ckpt_dir" in given else state.parent
    check(args)
    if not args.data_path:
        raise UserError("--data_path: give the embeddings' .npy file (data_process/embed.py makes it)")
    if not args.ckpt_dir and folder is None:
        raise UserError("--ckpt_dir: give a folder for the run's checkpoints")
    device = pick_device(args.device)
    processes = Processes(device)
    if args.bn and processes.count > 1:
        raise UserError("--bn True: its statistics would differ from one process's; train with one process")
    set_seed(args.seed)
    embeddings = Embeddings(args.data_path, device)
    if content is None:
        model = RQVAE(embeddings.dim, RQVAEConfig.from_args(args)).to(device)
        pca, all_rows = args.init == "pca", args.kmeans_rows == "all"
        start(model, embeddings, processes, components=pca, all_rows=all_rows, balance_rounds=args.balance_rounds)
    else:
        model = model_from_checkpoint(content, state)
        check_embeddings(model, content, embeddings)
    if folder is None and processes.is_main:
        folder = run_folder(args.ckpt_dir)
    trainer = Trainer(model, embeddings, args, folder or Path(), processes)
    if content is not None:
        trainer.restore(content)
        say(f"goes on after epoch {trainer.epoch} of {state}")
    say(
        f"{len(embeddings)} items × {embeddings.dim}, {sum(p.numel() for p in model.parameters()):,} parameters, {device}"
    )
    trainer.fit()
    say(describe(index_figures(trainer.nearest_codes(), args.num_emb_list)))
    say(f"best loss {trainer.best_loss:.5f}, best collision rate {trainer.best_collision_rate:.4f}; in {folder}")
    processes.close()
    return folder or Path()


def check_embeddings(model: RQVAE, content: dict, embeddings: Embeddings) -> None:
    """Refuse to go on with other embeddings than those that the run began with.

    Raises:
        UserError: another width, or other rows.
    """
    if model.in_dim != embeddings.dim:
        raise UserError(
            f"{embeddings.path}: rows are {embeddings.dim} wide, the checkpoint's model takes {model.in_dim}"
        )
    known = content.get("resume", {}).get("embeddings")
    if known not in (None, embeddings.digest()):
        raise UserError(f"{embeddings.path}: not the embeddings that this run began with")


if __name__ == "__main__":
    run_main(main)
