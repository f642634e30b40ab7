"""Give every item its index: `<D>.index.json`, with figures in `<D>.index.report.json` and `.png` beside it.

    python index/generate_indices.py --ckpt_path ./ckpt/index/Games --output_file ./data/Games/Games.index.json
    python index/generate_indices.py --ckpt_path …/best_collision_model.pth --output_file F --allow_conflicts
    python index/generate_indices.py --method rqkmeans --data_path E.npy --output_file F      # also: random, flat
    python index/generate_indices.py --extend old.index.json --data_path new.npy --ckpt_path D --output_file F

Nearest codes first; then, as long as items collide (20 rounds at most), each colliding group is assigned again by
Sinkhorn on the last level, as the original does; then what still collides gets the nearest free index, so that no two
items share one (`--allow_conflicts` leaves this out). `--extend` keeps every index of an old file and gives the rows
that it lacks free combinations of tokens that it has, which a trained recommender knows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints import best_checkpoint, load_checkpoint
from collisions import MAX_ROUNDS, Resolution
from commands import InputError, run_command, tell, use_device
from embeddings import Embeddings
from extension import extend, read_index
from figures import figures_in_words, index_figures
from flag_kinds import CODES, LEVELS, SEED, FlagParser, file_path, integer
from index_report import draw, groups_of, item_titles, title_examples
from methods import METHODS, Index, Options
from output_files import check_place, clear_leftovers, save_json, written_whole
from purity import neighbour_purity


def index_parser() -> FlagParser:
    """The flags, each with what its values may be."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument_group("files and machine").add_argument
    add("--output_file", type=file_path, required=True, help="index file to write, e.g. data/Games/Games.index.json")
    add("--overwrite", action="store_true", help="replace an index file that is there")
    add("--ckpt_path", default="", help="rqvae: checkpoint, run folder, or the --ckpt_dir of main.py (its newest run)")
    add("--data_path", default="", help="embeddings; without the flag those that the checkpoint was trained on")
    titles = "titles for the report; without the flag <D>.item.json beside the index, if there"
    add("--item_file", type=file_path, help=titles)
    add("--device", default="cuda:0", help="cuda:0, cpu, …; without CUDA the CPU")
    add("--batch_size", type=integer(1), default=4096, help="items encoded at once")

    add = parser.add_argument_group("index").add_argument
    add("--method", choices=METHODS, default="rqvae", help="how indices are made")
    add("--extend", default="", metavar="OLD", help="index file to extend to the rows of --data_path that it lacks")
    rounds = "Sinkhorn rounds over colliding items at most"
    add("--max_rounds", type=integer(0), default=MAX_ROUNDS, help=rounds)
    add("--allow_conflicts", action="store_true", help="stop after the rounds, items may share an index (the original)")
    sizes = "rqkmeans, random: codes of each level"
    add("--num_emb_list", type=CODES, nargs="+", default=[256, 256, 256, 256], help=sizes)
    add("--kmeans_iters", type=integer(1), default=100, help="rqkmeans: rounds of k-means at most")
    add("--seed", type=SEED, default=2024, help="rqkmeans, random: of what is drawn")
    return parser


def check_index_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, and places where nothing can be written.

    Raises:
        InputError: with the first such flag.
    """
    for path in outputs(args.output_file):
        check_place(path)
    if args.output_file.exists():
        if not args.overwrite:
            raise InputError(f"{args.output_file}: is there already; give --overwrite to replace it")
        try:
            read_index(args.output_file)
        except InputError:
            raise InputError(f"{args.output_file}: is there and no index file; --overwrite replaces no other") from None
    if len(args.num_emb_list) > LEVELS:
        raise InputError(f"--num_emb_list: {LEVELS} levels at most, a letter each")
    if args.extend and args.method != "rqvae":
        raise InputError("--extend: goes with --ckpt_path or with no method's flag; drop --method")
    if not args.data_path and (args.method != "rqvae" or args.extend):
        raise InputError(
            f"--data_path: {'--extend' if args.extend else '--method ' + args.method} needs the embeddings"
        )
    if not args.data_path and not args.ckpt_path:
        raise InputError("--ckpt_path: --method rqvae needs the checkpoint or folder that index/main.py wrote")


def outputs(index_file: Path) -> tuple[Path, Path, Path]:
    """The index file, and its report and picture beside it."""
    stem = index_file.name.removesuffix(".json")
    return index_file, index_file.with_name(f"{stem}.report.json"), index_file.with_name(f"{stem}.report.png")


def write_index(path: Path, codes: np.ndarray) -> None:
    """Write an index file, one item a line: item → one token a level, `<a_12>`, `<b_201>`, …"""
    letters = [chr(ord("a") + level) for level in range(codes.shape[1])]
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for item, row in enumerate(codes.tolist()):
            tokens = [f"<{letter}_{code}>" for letter, code in zip(letters, row, strict=True)]
            file.write(f'{"," if item else "{"}\n"{item}": {json.dumps(tokens)}')
        file.write("\n}\n")


def conflict_figures(resolution: Resolution) -> dict[str, Any]:
    """How collisions went, for the report file."""
    return {
        "colliding_by_round": resolution.colliding,
        "moved_by_rounds": resolution.moved_by_rounds,
        "moved_on_last_level": resolution.moved_on_last_level,
        "moved_to_other_prefix": resolution.moved_to_other_prefix,
        "moved_greedily": resolution.greedy,
        "added_squared_distance": resolution.added_error,
        "largest_added_squared_distance": resolution.largest_added_error,
    }


def item_file(args: argparse.Namespace) -> Path | None:
    """The file with titles: as given, or beside the index where its name follows the format."""
    beside = args.output_file.with_name(args.output_file.name.split(".")[0] + ".item.json")
    return args.item_file or (beside if beside.exists() else None)


def make(args: argparse.Namespace, embeddings: Embeddings) -> Index:
    """The index that the flags ask for."""
    names = ("ckpt_path", "num_emb_list", "kmeans_iters", "seed", "batch_size", "max_rounds", "allow_conflicts")
    options = Options(**{name: getattr(args, name) for name in names})
    if not args.extend:
        return METHODS[args.method](embeddings, options)
    old = read_index(args.extend)
    sizes = (old.max(0) + 1).tolist()
    source = {"extends": args.extend, "old_items": len(old), "new_items": len(embeddings) - len(old)}
    return Index(sizes, extend(old, embeddings, options, args.extend), source=source)


def report_of(
    args: argparse.Namespace, index: Index, embeddings: Embeddings, titles: list[str] | None
) -> dict[str, Any]:
    """The content of the report file; with examples where there are `titles`."""
    codes = index.resolution.codes
    report = {"method": "extend" if args.extend else args.method, **index.source, "data_path": str(embeddings.path)}
    report |= index_figures(codes, index.sizes) | conflict_figures(index.resolution)
    report["reconstruction_mse"] = index.reconstruction_mse
    report["first_level_sizes"] = {f"<a_{code}>": size for code, size in Counter(codes[:, 0].tolist()).most_common()}
    report["neighbours"] = neighbour_purity(codes, embeddings)
    if titles is not None:
        report["examples"] = title_examples(codes, titles)
    report["largest_groups"] = groups_of(codes, titles)
    return report


def how_made(args: argparse.Namespace, index: Index) -> dict[str, Any]:
    """Command, versions and SHA-256 of what was read: the same record as the root's `provenance.py` keeps."""
    read = [args.data_path, args.extend, index.source.get("checkpoint", "")]
    inputs = {str(Path(path).resolve()): file_digest(Path(path)) for path in read if path and Path(path).is_file()}
    packages = {name: version(name) for name in ("torch", "numpy", "scikit-learn")}
    return {
        "step": "index/generate_indices.py",
        "command": shlex.join(sys.argv),
        "versions": packages,
        "inputs": inputs,
    }


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Write the index, its report and its picture; returns the report."""
    args = index_parser().parse_args(argv)
    check_index_flags(args)
    if not args.data_path:
        path = best_checkpoint(args.ckpt_path)
        args.data_path = str(getattr(load_checkpoint(path)["args"], "data_path", ""))
        if not args.data_path:
            raise InputError(f"{path}: does not say which embeddings it was trained on; give --data_path")
    embeddings = Embeddings(args.data_path, use_device(args.device))
    beside = item_file(args)
    titles = item_titles(beside, len(embeddings)) if beside else None
    index = make(args, embeddings)
    report = report_of(args, index, embeddings, titles) | {"made": how_made(args, index)}
    index_file, report_file, picture = outputs(args.output_file)
    for path in outputs(index_file):
        clear_leftovers(path.parent, path.name)
    draw(picture, index.resolution.codes, report)
    save_json(report_file, report)
    write_index(index_file, index.resolution.codes)  # last: where it is, the rest is too
    tell(figures_in_words(report))
    moved = report["moved_on_last_level"], report["moved_to_other_prefix"]
    tell(
        f"  colliding items at first and after each round: {report['colliding_by_round']}; moved to free indices: "
        f"{moved[0]} on the last level, {moved[1]} to another prefix, squared distance {report['added_squared_distance']:+.4f}"
    )
    words = [f"{row['prefix_levels']}: {row['share']:.1%} ({row['chance']:.2%})" for row in report["neighbours"]]
    tell("  10 nearest neighbours under the same first n codes (by chance): " + ", ".join(words))
    if index.reconstruction_mse is not None:
        tell(f"  reconstruction error {index.reconstruction_mse:.6f}")
    tell(f"  in {index_file}, {report_file} and {picture}")
    return report


if __name__ == "__main__":
    run_command(main)
