"""Vectors of many texts by any number of processes and nodes, kept part by part: a run that was killed goes on.

Texts are sorted by length and cut into parts. Processes take the next part that is not on the disk, encode it and write it
under its final name at once. What is in a part, and so every bit of it, does not depend on how many processes there are.
"""

from __future__ import annotations

import contextlib
import datetime
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reading import read_array
from utils import UserError, atomic_path, is_main, read_json, say, world_size, write_json

PART_TEXTS, MOST_PARTS = 256, 4096


class Team:
    """The processes of a run, started by torchrun or alone: they wait for each other and share a counter."""

    def __init__(self) -> None:
        self.store: Any = None
        if world_size() > 1:
            import torch.distributed as dist

            self.store, number, size = next(dist.rendezvous("env://"))
            patience = datetime.timedelta(days=7)  # the slowest process, not a message on its way
            dist.init_process_group("gloo", store=self.store, rank=number, world_size=size, timeout=patience)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.store:
            import torch.distributed as dist

            dist.barrier()

    def numbers(self, name: str) -> Iterator[int]:
        """0, 1, 2, …: each number goes to one process only. `name` is new for every count."""
        number = -1
        while True:
            number = self.store.add(name, 1) - 1 if self.store else number + 1
            yield number

    def close(self) -> None:
        """Leave together."""
        if self.store:
            import torch.distributed as dist

            dist.barrier()
            dist.destroy_process_group()


@dataclass(frozen=True)
class Parts:
    """The folder that holds the vectors of parts of the texts. `order`: text numbers, the longest first, int64 (texts,)."""

    folder: Path
    order: np.ndarray
    size: int

    @classmethod
    def of(cls, folder: Path, texts: list[str], size: int = 0) -> Parts:
        """Parts of `size` texts (0: 256, or more where that makes too many files)."""
        order = np.array(sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i)), dtype=np.int64)
        return cls(folder, order, size or max(PART_TEXTS, -(-len(texts) // MOST_PARTS)))

    def __len__(self) -> int:
        return -(-len(self.order) // self.size)

    def numbers(self, part: int) -> np.ndarray:
        """The texts of a part."""
        return self.order[part * self.size : (part + 1) * self.size]

    def path(self, part: int) -> Path:
        """Where a part's vectors are: float32 (its texts, hidden)."""
        return self.folder / f"part-{part:06d}.npy"

    def read(self, part: int) -> np.ndarray:
        """A part's vectors. Raises UserError if its file is damaged."""
        vectors = read_array(self.path(part))
        if vectors.ndim != 2 or len(vectors) != len(self.numbers(part)):
            raise UserError(
                f"{self.path(part)}: has the shape {vectors.shape}; remove it, and the same command goes on"
            )
        return vectors

    def begin(self, plan: dict[str, Any], overwrite: bool, team: Team) -> str:
        """Start or go on with a run; what it is called, the same in every process.

        Raises:
            UserError: the folder holds parts of another plan, or this process does not see what the first one wrote.
        """
        path, run = self.folder / "plan.json", uuid.uuid4().hex
        if is_main():
            if path.exists() and (changed := _changed(read_json(path), plan)):
                if not overwrite:
                    raise UserError(
                        f"{self.folder}: holds an unfinished run with another {changed}; go on with that, or give --overwrite"
                    )
                self.remove()
            done = sum(self.path(part).exists() for part in range(len(self)))
            if done:
                say(f"{self.folder}: {done} of {len(self)} parts are there already")
            write_json(path, {"run": run, "plan": plan})
        team.wait()
        if not path.exists():
            raise UserError(
                f"{self.folder}: not seen by every process; the output's folder must be shared between nodes"
            )
        return read_json(path)["run"]

    def remove(self) -> None:
        """Take away what `begin` and the processes wrote, and nothing else."""
        for path in [*self.folder.glob("part-*.npy"), *self.folder.glob(".part-*.npy"), self.folder / "plan.json"]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _changed(old: Any, plan: dict[str, Any]) -> str:
    """The first setting in which a run differs from `plan`, or nothing."""
    before = old.get("plan") if isinstance(old, dict) else None
    if not isinstance(before, dict):
        return "form of plan.json"
    return next((key for key in plan if before.get(key) != plan[key]), "")


def encode_parts(
    parts: Parts, texts: list[str], encode: Callable[[list[str]], np.ndarray], run: str, team: Team
) -> None:
    """Encode every part that is not there yet; ends when all processes are done.

    Args:
        encode: texts → float32 (texts, hidden).

    Raises:
        UserError: a vector is not finite.
    """
    from tqdm import tqdm

    missing = [part for part in range(len(parts)) if not parts.path(part).exists()]
    team.wait()  # all have looked before the first one writes
    said = time.monotonic()
    with tqdm(total=len(missing), unit="part", disable=None if is_main() else True, desc="embed") as bar:
        for turn in team.numbers(run):
            if turn >= len(missing):
                break
            numbers = parts.numbers(missing[turn])
            vectors = encode([texts[number] for number in numbers])
            if not np.isfinite(vectors).all():
                bad = texts[numbers[np.flatnonzero(~np.isfinite(vectors).all(1))[0]]]
                raise UserError(f"the embedding of {bad[:60]!r} is not finite; try --dtype float32")
            with atomic_path(parts.path(missing[turn])) as path, open(path, "wb") as file:
                np.save(file, vectors)
            bar.update(turn + 1 - bar.n)
            if bar.disable and time.monotonic() - said > 60:
                said = time.monotonic()
                say(f"embed: {turn + 1} of {len(missing)} parts")
    team.wait()


def gather_rows(parts: Parts, fields: np.ndarray, weights: np.ndarray, target: Path) -> tuple[int, int]:
    """Write the items' rows, weighted sums of their texts' vectors, to `target`, part by part through a memory map.

    Args:
        fields, weights: as in `item_texts.ItemTexts`.

    Returns:
        the shape of the float32 array written, (items, hidden).
    """
    place = np.empty(len(parts.order), dtype=np.int64)  # of a text in the order
    place[parts.order] = np.arange(len(parts.order))
    wanted = []
    for column in range(fields.shape[1]):
        items = np.flatnonzero(fields[:, column] >= 0)
        places = place[fields[items, column]]
        by_part = np.argsort(places // parts.size, kind="stable")
        items, places = items[by_part], places[by_part]
        ends = np.searchsorted(places // parts.size, np.arange(len(parts) + 1))
        wanted.append((items, places % parts.size, weights[items, column, None], ends))
    hidden = parts.read(0).shape[1]
    with atomic_path(target) as path:
        rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(fields), hidden))
        for part in range(len(parts)):
            vectors = parts.read(part)
            for items, inside, weight, ends in wanted:
                here = slice(ends[part], ends[part + 1])
                rows[items[here]] += weight[here] * vectors[inside[here]]
        rows.flush()
        del rows
    return len(fields), hidden
