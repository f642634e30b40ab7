"""The processes of a torchrun job, seen as one: a global batch is shared out, sums and gathers put it together again."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import distributed


class Processes:
    """Rank, number and collective operations of this job's processes; with one process everything is the identity."""

    def __init__(self, device: torch.device) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.device = device
        if self.count > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @property
    def is_main(self) -> bool:
        """True on the process that writes files and talks."""
        return self.rank == 0

    def share(self, items: Any) -> Any:
        """This process's contiguous part of a sequence (equal up to one element)."""
        total = len(items)
        return items[total * self.rank // self.count : total * (self.rank + 1) // self.count]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` becomes its sum over the processes."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` becomes that of the main process."""
        if self.count > 1:
            distributed.broadcast(tensor, src=0)
        return tensor

    def gather(self, rows: torch.Tensor) -> tuple[torch.Tensor, slice]:
        """The rows of all processes in rank order (n, …), without gradient, and where this process's own stand."""
        if self.count == 1:
            return rows.detach(), slice(0, len(rows))
        sizes = torch.zeros(self.count, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(rows)
        counts = self.sum_(sizes).tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        start = sum(counts[: self.rank])
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]), slice(start, start + len(rows))

    def close(self) -> None:
        """Leave the job."""
        if self.count > 1:
            distributed.destroy_process_group()
