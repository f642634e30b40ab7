"""The door of index/: every file that a person hands over is opened here, and nothing that it holds is run.

Regular files only: a pipe or a device could be waited for without end.
"""

from __future__ import annotations

import argparse
import json
import re
import stat
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from commands import InputError


def _regular(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder; expected a file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is a pipe, socket or device; expected a regular file")


def _reason(error: Exception) -> str:
    """The first line of what a library says of a damaged file."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:120]


def load_array(path: str | Path) -> np.ndarray:
    """The array in a `.npy` file, memory-mapped; any shape and dtype that needs no pickle.

    Raises:
        InputError: no such file, no regular one, damaged, an archive, or Python objects.
    """
    path = Path(path)
    _regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(6)
        if start[:2] == b"PK":
            raise InputError(f"{path}: is a zip archive (.npz?); expected one array in a .npy file")
        if start != b"\x93NUMPY":
            raise InputError(f"{path}: not a readable .npy of numbers (it does not start like one)")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except InputError:
        raise
    except Exception as error:  # numpy raises many kinds for damaged headers
        raise InputError(f"{path}: not a readable .npy of numbers ({_reason(error)})") from None


def load_json(path: str | Path) -> Any:
    """The content of a UTF-8 JSON file.

    Raises:
        InputError: no such file, no regular one, no JSON, nested too deeply, or a key twice in one object.
    """
    path = Path(path)
    _regular(path)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise InputError(f"{path}: has the key {twice!r} twice")
        return content

    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=once)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deeply") from None
    except ValueError as error:  # no JSON, not UTF-8, a number of thousands of digits
        raise InputError(f"{path}: not UTF-8 JSON ({_reason(error)})") from None


def load_pth(path: str | Path, device: torch.device | str = "cpu") -> Any:
    """The content of a `.pth` file: tensors, plain values and `argparse.Namespace`, nothing else.

    Raises:
        InputError: no such file, no regular one, damaged, or it carries objects of another class (those are refused
            before anything of theirs runs).
    """
    path = Path(path)
    _regular(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        text = str(error)
        foreign = re.search(r"GLOBAL (\S+)", text) or re.search(r"Unsupported (?:global|class)[^\n]*", text)
        if foreign:
            raise InputError(f"{path}: refused, it carries a foreign object ({foreign.group(0)[:120]})") from None
        raise InputError(f"{path}: not a readable checkpoint ({_reason(error)})") from None
