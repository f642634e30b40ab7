"""RQ-VAE checkpoints: the original's format, read without running anything that a file may carry."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from common import UserError, atomic_path
from models.rqvae import RQVAE, RQVAEConfig

EPOCH_FILE = re.compile(r"epoch_(\d+)_collision_(\d+\.\d+)_model\.pth")
NEEDED = ("args", "epoch", "state_dict")


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The content of a `.pth` file: tensors and plain values only, `args` as `argparse.Namespace`.

    Raises:
        UserError: no such file, damaged, not an RQ-VAE checkpoint, or it carries objects of another class (those are
            refused before anything of theirs runs).
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected a .pth file") from None
    except Exception as error:  # torch raises many kinds for damaged files
        text = str(error).strip() or type(error).__name__
        foreign = re.search(r"GLOBAL (\S+)", text) or re.search(r"Unsupported (?:global|class|operand)[^\n]*", text)
        if foreign:
            raise UserError(f"{path}: refused, it carries a foreign object ({foreign.group(0)})") from None
        raise UserError(f"{path}: not a readable checkpoint ({text.splitlines()[0][:120]})") from None
    missing = [key for key in NEEDED if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content["args"], argparse.Namespace):
        raise UserError(f"{path}: not an RQ-VAE checkpoint (lacks {', '.join(missing) or 'flags in args'})")
    return content


def model_from_checkpoint(content: dict[str, Any], path: str | Path) -> RQVAE:
    """The RQ-VAE that `content` describes, with its weights (on the CPU, in training mode, not to be initialised again).

    Raises:
        UserError: flags and weights do not belong together.
    """
    try:
        first = content["state_dict"]["encoder.mlp_layers.1.weight"]
        model = RQVAE(first.shape[1], RQVAEConfig.from_args(content["args"]))
        model.load_state_dict(content["state_dict"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: its weights do not fit its flags ({reason})") from None
    return model


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """`torch.save`, atomically."""
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def epoch_files(folder: Path) -> list[tuple[int, float, Path]]:
    """(epoch, collision rate, path) of the kept checkpoints of a run, by epoch."""
    found = []
    for path in folder.iterdir():
        match = EPOCH_FILE.fullmatch(path.name)
        if match:
            found.append((int(match[1]), float(match[2]), path))
    return sorted(found)


def prune(folder: Path, limit: int) -> None:
    """Remove epoch checkpoints beyond the newest `limit` and the `limit` with the lowest collision rate."""
    files = epoch_files(folder)
    best = sorted(files, key=lambda entry: (entry[1], -entry[0]))[:limit]
    newest = files[len(files) - min(limit, len(files)) :]
    for entry in files:
        if entry not in best and entry not in newest:
            entry[2].unlink()


def newest_checkpoint(path: str | Path) -> Path:
    """`path` itself, or the newest state in the run folder `path`: where training goes on.

    Raises:
        UserError: nothing there.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    candidates = [path / "last_model.pth"] if (path / "last_model.pth").exists() else []
    candidates += [entry[2] for entry in epoch_files(path)[-1:]]
    if not candidates:
        raise UserError(f"{path}: has no epoch_…_model.pth to go on from")
    return max(candidates, key=lambda file: file.stat().st_mtime)


def best_checkpoint(path: str | Path) -> Path:
    """`path` itself, or `best_collision_model.pth` of the run folder `path`, or of the newest run in it.

    Raises:
        UserError: nothing there.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    name = "best_collision_model.pth"
    if (path / name).exists():
        return path / name
    runs = sorted(path.glob(f"*/{name}"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise UserError(f"{path}: no {name} in it or in its run folders; train one with index/main.py")
    return runs[-1]
