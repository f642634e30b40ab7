"""Which checkpoint a run goes on from: the newest that has all its parts, or the one that the user names."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from convert.scan import check_checkpoint
from utils import UserError, checkpoints, first_line, read_json, say


@contextlib.contextmanager
def unfit_is_said(checkpoint: str | Path | None, what: str) -> Iterator[None]:
    """Whatever goes wrong while `what` of a checkpoint takes its place in the trainer is a `UserError`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001  (what is not of this run fails in any way)
        raise UserError(
            f"{checkpoint}: its {what} cannot be gone on from ({first_line(error)}); name an older checkpoint"
        ) from error


def find_resume(named: str | None, lora: bool, folder: Path) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from, and the adapter to begin with (at most one of them).

    Args:
        named: `--resume_from_checkpoint`: nothing, `auto` (the newest complete checkpoint in `folder`), or a path.
        lora: an adapter alone may be named, to begin with its weights.

    Raises:
        UserError: what is named is neither, or the checkpoint lacks a part or would run foreign code when loaded.
    """
    if named is None:
        return None, None
    path = newest_complete(folder) if named == "auto" else Path(named)
    if path is None:
        say(f"{folder}: no complete checkpoint, starting from the beginning")
        return None, None
    if named == "auto":
        say(f"resuming from {path}")
    elif lora and (path / "adapter_config.json").is_file() and not (path / "trainer_state.json").is_file():
        check_checkpoint(path)
        return None, path
    elif not (path / "trainer_state.json").is_file():
        raise UserError(
            f"--resume_from_checkpoint {path}: neither a complete checkpoint-N folder (no trainer_state.json) "
            "nor, with --lora, an adapter (no adapter_config.json)"
        )
    elif missing := missing_part(path):
        raise UserError(
            f"--resume_from_checkpoint {path}: is not complete ({missing}); name an older one, or auto for the newest complete"
        )
    check_checkpoint(path)
    return path, None


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that has all its parts; newer ones that lack some are named."""
    for path in reversed(checkpoints(folder)):
        if not (missing := missing_part(path)):
            return path
        say(f"note: {path} is not complete ({missing}); going back to the one before")
    return None


def missing_part(checkpoint: Path) -> str | None:
    """What keeps a run from going on exactly as it was, in words; None if all is there, and so is the best checkpoint's model."""
    try:
        state = read_json(checkpoint / "trainer_state.json")
        step, best = state["global_step"], state["best_global_step"]
        _check_state(state)
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return "its trainer_state.json is broken"
    if checkpoint.name.startswith("checkpoint-") and checkpoint.name != f"checkpoint-{step}":
        return f"its trainer_state.json is of step {step}"
    randoms = list(checkpoint.glob("rng_state*.pth"))
    optimisers = list(_shards(checkpoint, "*_optim_states.pt")) or list(checkpoint.glob("optimizer.pt"))
    for name, found in (("rng_state.pth", randoms), ("optimizer.pt", optimisers)):
        if not found:
            return f"no {name}"
    if optimisers[0].parent != checkpoint and len(optimisers) != len(randoms):
        return f"{len(optimisers)} optimiser states for {len(randoms)} processes"
    if not (checkpoint / "scheduler.pt").is_file():
        return "no scheduler.pt"
    for path in checkpoint.rglob("*.pt*"):
        if not zipfile.is_zipfile(path):  # torch writes an archive, with its directory at the end
            return f"{path.name} is cut off"
    if missing := _missing_model(checkpoint):
        return missing
    best = checkpoint.with_name(f"checkpoint-{best}") if type(best) is int and best != step else None
    if best is not None and (missing := _missing_model(best)):
        return f"the best so far, {best.name}: {missing}"
    return None


def _check_state(state: dict[str, Any]) -> None:
    """Raise a ValueError, or another error, if the trainer could not go on with this `trainer_state.json`."""
    from transformers import TrainerState

    TrainerState(**state)
    numbers = {key: state.get(key) or 0 for key in ("epoch", "total_flos", "train_batch_size", "best_metric")}
    steps = {
        key: state.get(key, 1) for key in ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
    }
    rows = state["log_history"]
    if not all(type(value) in (int, float) for value in (numbers | steps).values()) or min(steps.values()) <= 0:
        raise ValueError("no numbers")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("no log")


def _shards(checkpoint: Path, pattern: str) -> Any:
    """Files of DeepSpeed's folder, which `latest` names."""
    try:
        name = (checkpoint / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return iter(())
    return (checkpoint / Path(name).name).glob(pattern)


def _missing_model(checkpoint: Path) -> str | None:
    """As `missing_part`, of the weights alone."""
    if next(_shards(checkpoint, "*model_states.pt"), None):
        return None
    files = [name for name in ("model.safetensors", "adapter_model.safetensors") if (checkpoint / name).is_file()]
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({str(name) for name in read_json(index)["weight_map"].values()})
        except (UserError, LookupError, TypeError, AttributeError):
            return f"its {index.name} is broken"
    if not files:
        return "no model.safetensors"
    for name in files:
        try:
            with safe_open(checkpoint / name, "pt"):
                pass
        except (OSError, SafetensorError):
            return f"{name} is missing or cut off"
    return None
