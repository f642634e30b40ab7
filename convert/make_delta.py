"""Make a delta that is small to license and easy to share: what a fine-tuned model adds to its base.

    python convert/make_delta.py --base-model-path llama-7b --target-model-path ckpt/Games --delta-path Games-delta
    … --hub-repo-id you/Games-delta      # and push it to the hub

For tensors of equal shape delta = target − base, in float16; those that grew with the vocabulary are stored whole.
`merge_delta.py` reverses it. `delta_report.json` says in which tensors, and in how many numbers, base + delta is not
the target bit for bit (where the difference cannot be represented in float16).
"""

from __future__ import annotations

import argparse
import atexit
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the root instead of this folder, whose names would shadow others
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    gc.disable()  # the imports make a million objects that stay: to go through them again and again takes seconds
    atexit.register(gc.freeze)

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from convert.folder import TOKENIZER_FILES, ModelFolder, add_target, copy_files, find_model, new_folder, write_settings  # noqa: E402
from convert.merge_delta import Plan, plan_merge  # noqa: E402
from convert.push import push_folder  # noqa: E402
from convert.weights import DTYPES, InputHashes, Weights, all_finite, count_different, write_weights  # noqa: E402
from utils import UserError, run_main, say, versions, write_json  # noqa: E402


def delta_blocks(
    name: str, plan: Plan, base: Weights, target: Weights, inexact: dict[str, int]
) -> Iterator[torch.Tensor]:
    """Blocks of the delta of tensor `name`, in `plan.dtype`; counts into `inexact[name]` what merging will miss.

    Raises:
        UserError: the target or the difference is NaN or inf in this type.
    """
    source = plan.base_of[name]
    if source is None:
        for block in target.blocks(name):
            whole = block.to(plan.dtype)
            _refuse_infinite(name, whole, block)
            inexact[name] = inexact.get(name, 0) + count_different(whole.to(block.dtype), block)
            yield whole
        return
    for block, ours in zip(target.blocks(name), base.blocks(source), strict=True):
        wanted, ours = block.to(plan.dtype), ours.to(plan.dtype)
        difference = wanted - ours
        _refuse_infinite(name, difference, block)
        inexact[name] = inexact.get(name, 0) + count_different(ours + difference, wanted)
        yield difference


def _refuse_infinite(name: str, result: torch.Tensor, target: torch.Tensor) -> None:
    if all_finite(result):
        return
    if not all_finite(target):
        raise UserError(f"{name}: the target holds NaN or inf; the run diverged, take an earlier checkpoint")
    kind = str(result.dtype).removeprefix("torch.")
    raise UserError(f"{name}: the difference overflows {kind}; use --dtype bfloat16 or float32, also when merging")


def make_delta(
    base: ModelFolder, target: ModelFolder, delta: Path, dtype: torch.dtype, max_shard_bytes: int, overwrite: bool
) -> dict[str, Any]:
    """Write target − base to the folder `delta`; the report, as in `delta_report.json`."""
    b, t = base.weights(), target.weights()
    inexact: dict[str, int] = {}
    with new_folder(delta, overwrite) as partial, InputHashes(base=b, target=t) as inputs:
        plan = plan_merge(base, target, b, t, dtype)  # hashing has begun: the imports for this take their time
        copy_files(target, partial, (*TOKENIZER_FILES, "generation_config.json", "run.json"))
        bar = tqdm(plan.shapes, unit="tensor", disable=None)
        names = iter(bar)

        def blocks(name: str) -> Iterator[torch.Tensor]:
            next(names)
            return delta_blocks(name, plan, b, t, inexact)

        outputs = write_weights(
            partial, {name: (shape, dtype) for name, shape in plan.shapes.items()}, blocks, max_shard_bytes
        )
        bar.close()
        report = {
            "arithmetic": f"{dtype}(target) - {dtype}(base) in {dtype}".replace("torch.", ""),
            "whole": [name for name, source in plan.base_of.items() if source is None],
            "inexact": {name: count for name, count in inexact.items() if count},
            "numbers": sum(torch.Size(shape).numel() for shape in plan.shapes.values()),
            "sha256": {**inputs.result(), "delta": outputs},
            "versions": versions("torch", "transformers", "safetensors"),
        }
        write_json(partial / "delta_report.json", report)
        plan.config.dtype = dtype
        write_settings(partial, plan.config.to_diff_dict())
    return report


def main(argv: list[str] | None = None) -> None:
    """Make one delta, and push it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model-path", required=True, help="base model: folder or hub id")
    parser.add_argument("--target-model-path", required=True, help="fine-tuned model: folder or hub id")
    add_target(parser, "--delta-path")
    parser.add_argument("--hub-repo-id", help="also push the delta to this hub repository (owner/name)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="arithmetic and result (default: float16)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # reading, adding, hashing and writing already have a thread each
    base, target = find_model(args.base_model_path), find_model(args.target_model_path)
    report = make_delta(base, target, args.delta_path, DTYPES[args.dtype], args.max_shard_size, args.overwrite)
    missed = sum(report["inexact"].values())
    say(
        f"{args.delta_path}: {len(report['whole'])} tensors whole; merging it gives the target bit for bit but for {missed} of "
        f"{report['numbers']} numbers in {len(report['inexact'])} tensors (delta_report.json)"
    )
    if args.hub_repo_id:
        say(push_folder(args.delta_path, args.hub_repo_id))


if __name__ == "__main__":
    run_main(main)
