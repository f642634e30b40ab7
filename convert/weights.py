"""Read and write model folders tensor by tensor, in blocks, without unpickling anything but tensors.

A folder holds `model.safetensors`, `model-00001-of-00002.safetensors` with `model.safetensors.index.json`, or the same
as `pytorch_model*.bin`. `Weights` reads any of them, `write_weights` writes safetensors. Neither ever holds more than
one block of a tensor, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import pickle
import queue
import re
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from utils import UserError, read_json

BLOCK_BYTES = 8 * 2**20  # at 4 bytes a number; small enough to stay in the processor's cache from the sum to the hash
HASH_BYTES = 32 * 2**20
FLUSH_BYTES = 128 * 2**20
AHEAD_BYTES = 2 * 2**30
OLD_BUFFERS = (".rotary_emb.inv_freq",)  # LLaMA checkpoints of 2023 stored them; models compute them now

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it looks like."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def is_old_buffer(name: str) -> bool:
    """True for buffers that old LLaMA files carry and that models now compute."""
    return name.endswith(OLD_BUFFERS)


def inside(folder: Path, name: str, allowed: Path | None = None) -> Path:
    """The path of file `name` of `folder`, which must lie, symbolic links resolved, in `allowed` (default `folder`).

    Raises:
        UserError: the name is absolute, climbs out with `..`, is a link that leads out, or does not exist.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{folder}: the file name {name!r} leaves the folder, refused")
    path = folder / name
    if not path.resolve().is_relative_to((allowed or folder).resolve()):
        raise UserError(f"{path}: a link that leads out of the folder, refused; put the file itself there")
    if not path.is_file():
        raise UserError(f"{path}: no such file, though the folder's index names it")
    return path


def load_torch(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin` file, mapped from disk where its format allows; nothing in it is ever run.

    Raises:
        UserError: the file holds anything but tensors in a dictionary, or is damaged.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files from before torch 1.6 cannot be mapped
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) `?([\w.]+\.\w+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise UserError(f"{path}: holds more than tensors{what} and could run code, so it was not read") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a readable torch file ({reason})") from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path}: not a dictionary of tensors")
    return content


def open_safetensors(path: Path):  # noqa: ANN201  (safetensors has no public type for it)
    """`safe_open`, with a clear error for a damaged file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


class Weights:
    """The tensors of a model folder, read lazily: `entries` is known at once, `blocks` reads from disk.

    Args:
        folder: with `model*.safetensors` or `pytorch_model*.bin` (safetensors win where both are there).
        allowed: folder that symbolic links may lead into (the blob store of the hub's cache); default `folder`.
        stem: the files' name when it is not a model: `("adapter_model",)`.
    """

    def __init__(
        self, folder: Path, allowed: Path | None = None, stem: tuple[str, ...] = ("model", "pytorch_model")
    ) -> None:
        self.folder = Path(folder)
        self.allowed = allowed
        self.bytes_read = 0  # how much `blocks` has given out
        self._last: tuple[Path, Callable[[str], torch.Tensor]] | None = None
        self._mapping: tuple[int, int] | None = None
        self.files, self._weight_map = self._find(stem)
        self.entries: dict[str, Entry] = {}
        for path in self.files:
            for name, entry in self._scan(path):
                if self._weight_map and self._weight_map.get(name) != path.name:
                    continue  # the index decides where a name lies
                self.entries[name] = entry
        lost = sorted(set(self._weight_map) - set(self.entries))
        if lost:
            raise UserError(f"{self.folder}: the index names {lost[0]} (and {len(lost) - 1} more), no file has it")

    def _find(self, stems: tuple[str, ...]) -> tuple[list[Path], dict[str, str]]:
        for suffix in (".safetensors", ".bin"):
            for stem in stems:
                index = self.folder / f"{stem}{suffix}.index.json"
                if index.is_file():
                    return self._read_index(inside(self.folder, index.name, self.allowed))
                if (self.folder / f"{stem}{suffix}").is_file():
                    return [inside(self.folder, f"{stem}{suffix}", self.allowed)], {}
        for suffix in (".safetensors", ".bin"):
            for stem in stems:  # shards whose index was lost
                found = sorted(self.folder.glob(f"{stem}-*-of-*{suffix}"))
                if found:
                    return self._complete(found), {}
        wanted = " or ".join(f"{stem}*{suffix}" for stem, suffix in zip(stems, (".safetensors", ".bin"), strict=False))
        raise UserError(f"{self.folder}: has no weights ({wanted})")

    def _read_index(self, path: Path) -> tuple[list[Path], dict[str, str]]:
        content = read_json(path)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{path}: has no weight_map from tensor names to file names")
        names = sorted(set(weight_map.values()))
        return [inside(self.folder, name, self.allowed) for name in names], weight_map

    def _complete(self, found: list[Path]) -> list[Path]:
        count = found[0].stem.rsplit("-", 1)[1]
        wanted = int(count) if count.isdecimal() else 0
        if len(found) != wanted:
            raise UserError(f"{self.folder}: {len(found)} of {wanted} weight files are there; download the rest")
        return [inside(self.folder, path.name, self.allowed) for path in found]

    def _scan(self, path: Path) -> Iterator[tuple[str, Entry]]:
        if path.suffix == ".bin":
            for name, tensor in load_torch(path).items():
                yield name, Entry(path, name, tuple(tensor.shape), tensor.dtype)
            return
        handle = open_safetensors(path)
        for name in handle.keys():  # noqa: SIM118  (not a dictionary)
            view = handle.get_slice(name)
            if view.get_dtype() not in _TORCH_DTYPES:
                raise UserError(f"{path}: {name} has the type {view.get_dtype()}, which is not supported")
            yield name, Entry(path, name, tuple(view.get_shape()), _TORCH_DTYPES[view.get_dtype()])

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def _open(self, path: Path) -> Callable[[str], torch.Tensor]:
        """A getter for the tensors of a file, mapped from disk; the file opened last stays open."""
        if self._last is None or self._last[0] != path:
            self._last = self._mapping = None  # drop the old mapping first
            source = load_torch(path).__getitem__ if path.suffix == ".bin" else open_safetensors(path).get_tensor
            self._last = (path, source)
        return self._last[1]

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in order, as blocks of whole rows: read-only views of a mapping, each good until the next one."""
        entry = self.entries[name]
        tensor = self._open(entry.file)(entry.key)
        self._mapping = self._mapping or find_mapping(tensor, entry.file)
        low, high = self._mapping
        mapped = low <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= high and tensor.is_contiguous()
        for start, stop in row_blocks(entry.shape):
            block = tensor[start:stop] if entry.shape else tensor
            yield block
            self.bytes_read += block.nbytes
            if mapped:
                release(block)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        entry = self.entries[name]
        if not entry.shape or 0 in entry.shape:
            return torch.empty(entry.shape, dtype=entry.dtype) if 0 in entry.shape else next(self.blocks(name)).clone()
        return torch.cat([block.clone() for block in self.blocks(name)])


def find_mapping(tensor: torch.Tensor, path: Path) -> tuple[int, int]:
    """The addresses at which `path` is mapped around the tensor; (0, 0) if its memory is not the file (or not Linux)."""
    try:
        inode, lines = str(path.stat().st_ino), Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return 0, 0
    for line in lines:
        addresses, _, _, _, number, *_ = line.split(maxsplit=5)
        if number == inode:
            low, high = (int(address, 16) for address in addresses.split("-"))
            if low <= tensor.data_ptr() < high:
                return low, high
    return 0, 0


def release(block: torch.Tensor) -> None:
    """Give the pages under a mapped, unchanged block back to the system: they would count as memory till the end.

    Whoever touches them again gets them from the file; memory that is no mapping would be wiped (ask `find_mapping`).
    Pages that the block shares with a neighbour stay.
    """
    start = -(-block.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (block.data_ptr() + block.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def all_finite(block: torch.Tensor) -> bool:
    """True if a tensor of floats has neither NaN nor inf (minimum and maximum show both, at 20 times the speed)."""
    if not block.numel():
        return True
    low, high = torch.aminmax(block)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def count_different(one: torch.Tensor, other: torch.Tensor) -> int:
    """In how many numbers two tensors of one shape and type differ by a bit (0 and -0 do)."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return int(np.count_nonzero((one.view(kind) != other.view(kind)).numpy()))


def row_blocks(shape: tuple[int, ...], rows_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Row ranges (start, stop) of a tensor of `shape`, of about `rows_bytes` at 4 bytes a number; none if it is empty.

    The ranges depend on the shape alone, so that two tensors of one shape are cut alike whatever their types.
    """
    if not shape:
        yield 0, 1
        return
    row = 4
    for size in shape[1:]:
        row *= size
    step = max(1, rows_bytes // row) if row else shape[0]
    for start in range(0, shape[0] if row else 0, step):
        yield start, min(shape[0], start + step)


@dataclass
class Shard:
    """A file to be written: its name and the (shape, dtype) of its tensors, in order."""

    name: str
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return sum(tensor_bytes(*spec) for spec in self.tensors.values())


def tensor_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor of this shape and type."""
    return torch.Size(shape).numel() * dtype.itemsize


def plan_shards(
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], max_shard_bytes: int, stem: str = "model"
) -> list[Shard]:
    """Distribute tensors, in the order given, over safetensors files of at most `max_shard_bytes` (or one tensor)."""
    shards: list[Shard] = [Shard("")]
    for name, spec in tensors.items():
        if shards[-1].tensors and shards[-1].bytes + tensor_bytes(*spec) > max_shard_bytes:
            shards.append(Shard(""))
        shards[-1].tensors[name] = spec
    for number, shard in enumerate(shards, 1):
        shard.name = (
            f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        )
    return shards


class _Worker:
    """Calls `work` on what it is given, in order, in a thread of its own; `put` and `finish` raise what `work` raised."""

    def __init__(self, work: Callable[[bytes | memoryview], object]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self._queue: queue.Queue[bytes | memoryview | None] = queue.Queue(maxsize=4)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._work(data)
                except BaseException as error:  # noqa: BLE001  (raised again in the thread of whoever gave the data)
                    self._error = error

    def put(self, data: bytes | memoryview, skip_if_busy: bool = False) -> None:
        if self._error:
            raise self._error
        if not (skip_if_busy and self._queue.qsize()):
            self._queue.put(data)

    def finish(self) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error:
            raise self._error


class _Sink:
    """A file that is written, hashed and flushed to the disk by a thread each, so that reading and adding go on."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115  (closed by finish)
        self._hash = hashlib.sha256()
        self._flusher = _Worker(lambda _: os.fdatasync(self._file.fileno()))  # else the disk would begin at the end
        self._workers = (_Worker(self._write), _Worker(self._hash.update), self._flusher)
        self._waiting = 0

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._waiting += len(data)
        if self._waiting >= FLUSH_BYTES:
            self._waiting = 0
            self._flusher.put(b"", skip_if_busy=True)

    def write(self, data: bytes | memoryview) -> None:
        for worker in self._workers[:2]:
            worker.put(data)

    def finish(self) -> str:
        """Wait, flush to the disk, close; the SHA-256 in hex."""
        with self._file, contextlib.ExitStack() as stack:
            for worker in reversed(self._workers):
                stack.callback(worker.finish)
            stack.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._hash.hexdigest()


def write_shard(path: Path, shard: Shard, blocks: Callable[[str], Iterable[torch.Tensor]]) -> str:
    """Write one safetensors file front to back; `blocks(name)` gives a tensor's blocks of rows.

    Returns:
        The file's SHA-256.

    Raises:
        UserError: the disk is full or not writable.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in shard.tensors.items():
        end = offset + tensor_bytes(shape, dtype)
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        sink = _Sink(path)
        try:
            sink.write(struct.pack("<Q", len(text)) + text)
            for name, (shape, dtype) in shard.tensors.items():
                wanted = tensor_bytes(shape, dtype)
                for block in blocks(name):
                    data = memoryview(block.contiguous().flatten().view(torch.uint8).numpy())
                    wanted -= len(data)
                    sink.write(data)
                if wanted:
                    raise RuntimeError(f"{name}: {wanted} bytes too few were written")
        finally:
            digest = sink.finish()
    except OSError as error:
        raise UserError(f"{what_failed(error, path)}") from None
    return digest


def what_failed(error: OSError, *written: Path) -> str:
    """What went wrong while the first of `written` was made: a write, or a read if the error names a file outside of them."""
    named = error.filename
    if isinstance(named, (str, os.PathLike)) and not any(Path(named).is_relative_to(path) for path in written):
        return f"{named}: cannot be read ({error.strerror})"
    return f"{written[0]}: cannot be written ({error.strerror})"


def write_weights(
    folder: Path,
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]],
    blocks: Callable[[str], Iterable[torch.Tensor]],
    max_shard_bytes: int,
    stem: str = "model",
) -> dict[str, str]:
    """Write all `tensors` as safetensors files, with an index where there are several.

    Returns:
        File name → SHA-256.
    """
    shards = plan_shards(tensors, max_shard_bytes, stem)
    digests = {shard.name: write_shard(folder / shard.name, shard, blocks) for shard in shards}
    if len(shards) > 1:
        total = sum(shard.bytes for shard in shards)
        weight_map = {name: shard.name for shard in shards for name in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    _verify(folder, tensors, stem)
    return digests


def _verify(folder: Path, tensors: dict[str, tuple[tuple[int, ...], torch.dtype]], stem: str) -> None:
    """Read the headers back as any user will: the files have their full length, and every tensor is there."""
    found = {name: (entry.shape, entry.dtype) for name, entry in Weights(folder, stem=(stem,)).entries.items()}
    if found != tensors:
        raise RuntimeError(f"{folder}: what was written is not what was planned")


class InputHashes:
    """SHA-256 of the files of `Weights`, by a thread for each, which begin with the `with` block.

    They run ahead of whoever reads the tensors, who then finds the bytes in the system's cache: the disk gives them
    once. But by `AHEAD_BYTES` at most, or a machine with little memory would have dropped them by then.

    Args:
        sides: name of the side → its tensors.
    """

    def __init__(self, **sides: Weights) -> None:
        self._sides = sides
        self._found: dict[str, dict[str, str]] = {side: {} for side in sides}
        self._ahead = AHEAD_BYTES
        self._stopped = False
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, args=(side,), daemon=True) for side in sides]

    def _work(self, side: str) -> None:
        try:
            for path, digest in self._digests(self._sides[side]):
                self._found[side][path.name] = digest
        except BaseException as error:  # noqa: BLE001  (raised again by `result`)
            self._error = error

    def _digests(self, weights: Weights) -> Iterator[tuple[Path, str]]:
        # A thread needs Python's lock for every call, and imports hold it: so few calls, of many bytes
        buffer, done = memoryview(bytearray(HASH_BYTES)), 0
        for path in weights.files:
            digest = hashlib.sha256()
            with open(path, "rb", buffering=0) as file:
                while size := file.readinto(buffer):
                    digest.update(buffer[:size])
                    done += size
                    while not self._stopped and done > weights.bytes_read + self._ahead:
                        time.sleep(0.01)
                    if self._stopped:
                        return
            yield path, digest.hexdigest()

    def __enter__(self) -> InputHashes:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join()

    def result(self) -> dict[str, dict[str, str]]:
        """Side → file name → SHA-256, when all are there."""
        self._ahead = sys.maxsize
        for thread in self._threads:
            thread.join()
        if self._error:
            raise self._error
        return self._found
