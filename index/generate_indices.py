"""Give every item its index, with a trained RQ-VAE: `<D>.index.json`, and figures in `<D>.index.report.json`.

    python index/generate_indices.py --ckpt_path ./ckpt/index/Games --output_file ./data/Games/Games.index.json
    python index/generate_indices.py --ckpt_path …/best_collision_model.pth --output_file F --allow_conflicts

Nearest codes first; then, as long as items collide (20 rounds at most), each colliding group is assigned again by
Sinkhorn on the last level, as the original does; then what still collides gets the nearest free index, so that no two
items share one (`--allow_conflicts` leaves this out).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoints import best_checkpoint, load_checkpoint, model_from_checkpoint
from collisions import DEFAULT_EPSILON, MAX_ROUNDS, Resolution, quantised, resolve
from common import UserError, pick_device, run_main, say, write_json
from embeddings import Embeddings
from figures import describe, index_figures
from models.rqvae import RQVAE


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt_path", required=True, help="checkpoint, run folder, or the --ckpt_dir of main.py (its newest run)")
    add("--output_file", type=Path, required=True, help="index file to write, e.g. data/Games/Games.index.json")
    add("--data_path", default="", help="embeddings (default: those that the checkpoint was trained on)")
    add("--device", default="cuda:0", help="cuda:0, cpu, … (cuda:0; without CUDA the CPU)")
    add("--batch_size", type=int, default=4096, help="items encoded at once (4096)")
    add(
        "--max_rounds",
        type=int,
        default=MAX_ROUNDS,
        help=f"Sinkhorn rounds over colliding items at most ({MAX_ROUNDS})",
    )
    add("--allow_conflicts", action="store_true", help="stop after the rounds, items may share an index (the original)")
    add("--overwrite", action="store_true", help="replace an index file that is there")
    return parser


def tokens(codes: np.ndarray) -> dict[str, list[str]]:
    """The content of an index file: item → one token a level, `<a_12>`, `<b_201>`, …"""
    letters = [chr(ord("a") + level) for level in range(codes.shape[1])]
    return {
        str(item): [f"<{letter}_{code}>" for letter, code in zip(letters, row, strict=True)]
        for item, row in enumerate(codes.tolist())
    }


@torch.no_grad()
def encode(model: RQVAE, embeddings: Embeddings, batch_size: int) -> torch.Tensor:
    """Latent vectors of all items, float32 (items, e_dim), on the model's device."""
    return torch.cat([model.encoder(x) for x in embeddings.in_order(batch_size)])


@torch.no_grad()
def reconstruction_error(
    model: RQVAE, embeddings: Embeddings, codes: np.ndarray, codebooks: Sequence[torch.Tensor], batch_size: int
) -> float:
    """Mean squared error of the decoded indices against the embeddings, over all numbers."""
    total, start = 0.0, 0
    for x in embeddings.in_order(batch_size):
        output = model.decoder(quantised(codes[start : start + len(x)], codebooks))
        total += float(((output - x).double() ** 2).sum())
        start += len(x)
    return total / (len(embeddings) * embeddings.dim)


def report_of(resolution: Resolution, sizes: Sequence[int]) -> dict[str, Any]:
    """Figures of the index and of how its conflicts went, for the report file."""
    return {
        **index_figures(resolution.codes, sizes),
        "colliding_by_round": resolution.colliding,
        "moved_by_rounds": resolution.moved_by_rounds,
        "moved_on_last_level": resolution.moved_on_last_level,
        "moved_to_other_prefix": resolution.moved_to_other_prefix,
        "moved_greedily": resolution.greedy,
        "added_squared_distance": resolution.added_error,
        "largest_added_squared_distance": resolution.largest_added_error,
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.output_file.exists() and not args.overwrite:
        raise UserError(f"{args.output_file}: is there already; give --overwrite to replace it")
    device = pick_device(args.device)
    path = best_checkpoint(args.ckpt_path)
    content = load_checkpoint(path)
    model = model_from_checkpoint(content, path).to(device).eval()
    data_path = args.data_path or getattr(content["args"], "data_path", "")
    embeddings = Embeddings(data_path, device)
    if embeddings.dim != model.in_dim:
        raise UserError(f"{data_path}: rows are {embeddings.dim} wide, the model of {path} takes {model.in_dim}")
    codebooks = [level.embedding.weight.detach() for level in model.rq.vq_layers]
    last = model.rq.vq_layers[-1]
    resolution = resolve(
        encode(model, embeddings, args.batch_size),
        codebooks,
        epsilon=last.sk_epsilon or DEFAULT_EPSILON,
        iterations=last.sk_iters,
        max_rounds=args.max_rounds,
        allow_conflicts=args.allow_conflicts,
    )
    report = {"checkpoint": str(path), "data_path": str(data_path), "epoch": content["epoch"]}
    report |= report_of(resolution, [len(book) for book in codebooks])
    report["reconstruction_mse"] = reconstruction_error(model, embeddings, resolution.codes, codebooks, args.batch_size)
    write_json(args.output_file, tokens(resolution.codes), indent=1)
    report_file = args.output_file.with_name(args.output_file.name.removesuffix(".json") + ".report.json")
    write_json(report_file, report, indent=2)
    say(describe(report))
    say(
        f"  colliding items with nearest codes and after each round: {resolution.colliding}; then moved to free indices: "
        f"{resolution.moved_on_last_level} on the last level, {resolution.moved_to_other_prefix} to another prefix"
    )
    say(f"  reconstruction error {report['reconstruction_mse']:.6f}; in {args.output_file} and {report_file}")


if __name__ == "__main__":
    run_main(main)
