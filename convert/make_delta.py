"""Make a delta that is small to license and easy to share: what a fine-tuned model adds to its base.

    python convert/make_delta.py --base-model-path llama-7b --target-model-path ckpt/Games --delta-path Games-delta
    … --hub-repo-id you/Games-delta      # and push it to the hub

For tensors of equal shape delta = target − base, in float16; those that grew with the vocabulary are stored whole.
`merge_delta.py` reverses it. `delta_report.json` says in which tensors, and in how many numbers, base + delta is not
the target bit for bit (where the difference cannot be represented in float16).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from convert.folder import FLOATS, RUN_FILES, TOKENIZER_FILES, ModelFolder, add_target, copy_files, find_model
from convert.merge_delta import Plan, plan_merge
from convert.push import push_folder
from convert.weights import Weights, all_finite, count_different, write_weights
from folders import new_folder
from quiet import silence_libraries
from utils import UserError, run_main, say, versions, write_json


def difference(name: str, plan: Plan, base: Weights, target: Weights, inexact: dict[str, int]) -> torch.Tensor:
    """The delta of tensor `name`, in `plan.dtype`; counts into `inexact[name]` what merging will miss.

    Raises:
        UserError: the target or the difference is NaN or inf in this type.
    """
    source, ours = plan.base_of[name], target.read(name)
    wanted = ours.to(plan.dtype)
    if source is None:
        _refuse_infinite(name, wanted, ours)
        inexact[name] = count_different(wanted.to(ours.dtype), ours)
        return wanted
    theirs = base.read(source).to(plan.dtype)
    delta = wanted - theirs
    _refuse_infinite(name, delta, ours)
    inexact[name] = count_different(theirs + delta, wanted)
    return delta


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
    with new_folder(delta, overwrite, [base.path, target.path]) as partial:
        plan = plan_merge(base, target, b, t, dtype)
        copy_files(target, partial, (*TOKENIZER_FILES, *RUN_FILES))
        specs = {name: (shape, dtype) for name, shape in plan.shapes.items()}
        outputs = write_weights(partial, specs, lambda name: difference(name, plan, b, t, inexact), max_shard_bytes)
        report = {
            "arithmetic": f"{dtype}(target) - {dtype}(base) in {dtype}".replace("torch.", ""),
            "whole": [name for name, source in plan.base_of.items() if source is None],
            "inexact": {name: count for name, count in inexact.items() if count},
            "numbers": sum(torch.Size(shape).numel() for shape in plan.shapes.values()),
            "sha256": {"base": b.sha256(), "target": t.sha256(), "delta": outputs},
            "versions": versions("torch", "transformers", "safetensors"),
        }
        write_json(partial / "delta_report.json", report)
        plan.config.dtype = dtype
        write_json(partial / "config.json", plan.config.to_diff_dict())
    return report


def main(argv: list[str] | None = None) -> None:
    """Make one delta, and push it if asked to."""
    parser = make_parser(__doc__)
    parser.add_argument("--base-model-path", required=True, help="base model: folder or hub id")
    parser.add_argument("--target-model-path", required=True, help="fine-tuned model: folder or hub id")
    add_target(parser, "--delta-path")
    parser.add_argument("--hub-repo-id", help="also push the delta to this hub repository (owner/name)")
    parser.add_argument("--dtype", choices=FLOATS, default="float16", help="arithmetic and result")
    args = parser.parse_args(argv)
    silence_libraries()
    base, target = find_model(args.base_model_path), find_model(args.target_model_path)
    report = make_delta(base, target, args.delta_path, getattr(torch, args.dtype), args.max_shard_size, args.overwrite)
    missed = sum(report["inexact"].values())
    say(
        f"{args.delta_path}: {len(report['whole'])} tensors whole; merging it gives the target bit for bit but for {missed} of "
        f"{report['numbers']} numbers in {len(report['inexact'])} tensors (delta_report.json)"
    )
    if args.hub_repo_id:
        say(push_folder(args.delta_path, args.hub_repo_id))


if __name__ == "__main__":
    run_main(main)
