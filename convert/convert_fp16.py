"""Copy a model folder with its weights in float16 (half the size; enough for testing).

    python convert/convert_fp16.py --in-checkpoint ./ckpt/Games/final-checkpoint-1000 --out-checkpoint ./ckpt/Games-fp16

The input may be a model folder, a hub id, or a checkpoint of a DeepSpeed run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from convert.convert import convert_model
from convert.folder import add_target, find_model
from quiet import silence_libraries
from utils import run_main


def main(argv: list[str] | None = None) -> None:
    """Convert one folder to float16."""
    parser = make_parser(__doc__)
    parser.add_argument("--in-checkpoint", required=True, help="folder or hub id to read")
    add_target(parser, "--out-checkpoint")
    args = parser.parse_args(argv)
    silence_libraries()
    source = find_model(args.in_checkpoint)
    count = convert_model(source, args.out_checkpoint, torch.float16, args.max_shard_size, args.overwrite)
    print(f"{args.out_checkpoint}: {count} tensors in float16")


if __name__ == "__main__":
    run_main(main)
