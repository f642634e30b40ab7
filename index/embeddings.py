"""The items' embeddings: a memory-mapped `.npy`, checked once, read as float32 batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from commands import InputError
from input_files import load_array

CHUNK_BYTES = 64 * 2**20  # read at once when a whole file is walked through
LARGEST = 1e15  # beyond it squared distances leave the range of float32
RESIDENT_BYTES = 2**30  # files up to this size (as float32) are kept in memory, or on the device


class Embeddings:
    """Rows of item embeddings, row = item id.

    Small files live on `device` as one float32 tensor; larger ones stay on disk, memory-mapped, and only the rows of a
    batch are read.

    Args:
        path: `.npy`, (items, dim), float16, float32 or float64.
        device: where batches are wanted.

    Raises:
        InputError: no such file, not a plain `.npy`, wrong shape or dtype, empty, not finite, beyond 1e15, or all rows equal.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        self.path = Path(path)
        self.device = device
        self.array = _open(self.path)
        _check_values(self.array, self.path)
        self.resident: torch.Tensor | None = None
        if self.array.size * 4 <= RESIDENT_BYTES:
            self.resident = torch.from_numpy(np.array(self.array, dtype=np.float32)).to(device)

    def __len__(self) -> int:
        return self.array.shape[0]

    @property
    def dim(self) -> int:
        """Width of a row."""
        return self.array.shape[1]

    def __getitem__(self, items: np.ndarray | Sequence[int]) -> torch.Tensor:
        """Rows of `items` from the file, float32 on the CPU (what a worker process reads)."""
        return torch.from_numpy(self.array[items].astype(np.float32))

    def batches(self, batches: Sequence[np.ndarray], num_workers: int = 0) -> Iterator[torch.Tensor]:
        """Float32 rows of each array of item ids, on the device; `num_workers` processes read ahead from disk."""
        if self.resident is not None:
            for items in batches:
                yield self.resident[torch.from_numpy(items).to(self.device)]
            return
        pinned = self.device.type == "cuda"
        loader = DataLoader(self, sampler=batches, batch_size=None, num_workers=num_workers, pin_memory=pinned)
        for rows in loader:
            yield rows.to(self.device, non_blocking=pinned)

    def in_order(self, batch_size: int, first: int = 0, last: int | None = None) -> Iterator[torch.Tensor]:
        """Rows `first` … `last` - 1 in order, in batches."""
        last = len(self) if last is None else last
        for start in range(first, last, batch_size):
            stop = min(start + batch_size, last)
            if self.resident is not None:
                yield self.resident[start:stop]
            else:
                yield torch.from_numpy(self.array[start:stop].astype(np.float32)).to(self.device)

    def digest(self) -> str:
        """A fingerprint of shape and of about a thousand rows spread over the file: tells one file from another."""
        rows = self.array[:: max(1, len(self) // 1000)]
        return hashlib.sha256(repr(self.array.shape).encode() + np.ascontiguousarray(rows).tobytes()).hexdigest()[:16]


def _open(path: Path) -> np.ndarray:
    array = load_array(path)
    if array.ndim != 2:
        raise InputError(f"{path}: has shape {array.shape}; expected (items, dim)")
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(f"{path}: has dtype {array.dtype}; expected float16, float32 or float64")
    if min(array.shape) < 1:
        raise InputError(f"{path}: is empty, shape {array.shape}")
    return array


def _check_values(array: np.ndarray, path: Path) -> None:
    """Walk through the file once: every number finite as float32, and not every row the same."""
    constant = True
    step = max(1, CHUNK_BYTES // (4 * array.shape[1]))
    for start in range(0, len(array), step):
        with np.errstate(over="ignore"):
            chunk = array[start : start + step].astype(np.float32)
        finite = np.isfinite(chunk).all(axis=1)
        if not finite.all():
            raise InputError(
                f"{path}: row {start + int(np.argmin(finite))} has a number that is not finite (as float32)"
            )
        if max(chunk.max(), -chunk.min()) > LARGEST:
            raise InputError(f"{path}: has numbers beyond {LARGEST:g}; scale the embeddings")
        constant = (
            constant and bool((chunk == chunk[0]).all()) and bool((chunk[0] == array[0].astype(np.float32)).all())
        )
    if constant and len(array) > 1:
        raise InputError(f"{path}: all {len(array)} rows are the same; there is nothing to tell items apart by")
