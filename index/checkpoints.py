"""RQ-VAE checkpoints: the original's format, read without running anything that a file may carry."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from commands import InputError
from input_files import load_pth
from models.rqvae import RQVAE, RQVAEConfig
from output_files import written_whole

EPOCH_FILE = re.compile(r"epoch_([0-9]+)_collision_([0-9]+\.[0-9]+)_model\.pth")
NEEDED = ("args", "epoch", "state_dict")


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The content of a `.pth` file: tensors and plain values only, `args` as `argparse.Namespace`.

    Raises:
        InputError: not readable (input_files.load_pth), not an RQ-VAE checkpoint, or weights that are not finite.
    """
    content = load_pth(path, device)
    missing = [key for key in NEEDED if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content["args"], argparse.Namespace):
        raise InputError(f"{path}: not an RQ-VAE checkpoint (lacks {', '.join(missing) or 'flags in args'})")
    epoch, weights = content["epoch"], content["state_dict"]
    if not isinstance(epoch, int) or not -1 <= epoch < 10**9:
        raise InputError(f"{path}: its epoch is {str(epoch)[:40]!r}; expected a whole number")
    if not isinstance(content.get("resume", {}), dict):
        raise InputError(f"{path}: its resume holds no random state")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{path}: its state_dict holds no weights")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor) or value.is_complex() or value.layout != torch.strided:
            raise InputError(f"{path}: its state_dict.{name} is no tensor of plain numbers")
    return content


def model_from_checkpoint(content: dict[str, Any], path: str | Path) -> RQVAE:
    """The RQ-VAE that `content` describes, with its weights (on the CPU, in training mode, not to be initialised again).

    Raises:
        InputError: flags and weights do not belong together, or a weight is not finite.
    """
    weights = content["state_dict"]
    try:
        width = weights["encoder.mlp_layers.1.weight"].shape[1]
        config = RQVAEConfig.from_args(content["args"])
        with torch.device("meta"):  # shapes first: wrong flags must not ask for memory
            shapes = {name: value.shape for name, value in RQVAE(width, config).state_dict().items()}
        wrong = [name for name in shapes.keys() | weights.keys() if shapes.get(name) != _shape(weights.get(name))]
        if wrong:
            raise InputError(f"{path}: its weights do not fit its flags ({min(wrong)})")
        for name, value in weights.items():
            if not torch.isfinite(value).all():
                raise InputError(f"{path}: its state_dict.{name} has numbers that are not finite (NaN or inf)")
        model = RQVAE(width, config)
        model.load_state_dict(weights)
    except (AttributeError, IndexError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"{path}: its weights do not fit its flags ({reason})") from None
    return model


def _shape(value: torch.Tensor | None) -> torch.Size | None:
    return None if value is None else value.shape


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """`torch.save`, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    with written_whole(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(None, " ".join(str(error).split())[:80] + "; is the disk full?") from None


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
            entry[2].unlink(missing_ok=True)  # by another process that goes on with the same run


def newest_checkpoint(path: str | Path) -> Path:
    """`path` itself, or the newest state in the run folder `path`: where training goes on.

    Raises:
        InputError: nothing there.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    candidates = [path / "last_model.pth"] if (path / "last_model.pth").exists() else []
    candidates += [entry[2] for entry in epoch_files(path)[-1:]]
    if not candidates:
        raise InputError(f"{path}: has no epoch_…_model.pth to go on from")
    return max(candidates, key=lambda file: file.stat().st_mtime)


def best_checkpoint(path: str | Path) -> Path:
    """`path` itself, or `best_collision_model.pth` of the run folder `path`, or of the newest run in it.

    Raises:
        InputError: nothing there.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    name = "best_collision_model.pth"
    if (path / name).exists():
        return path / name
    runs = sorted(path.glob(f"*/{name}"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise InputError(f"{path}: no {name} in it or in its run folders; train one with index/main.py")
    return runs[-1]
