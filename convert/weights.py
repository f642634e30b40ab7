"""Read and write model folders tensor by tensor, without unpickling anything but tensors.

A folder holds `model.safetensors`, `model-00001-of-00002.safetensors` with `model.safetensors.index.json`, or the same
as `pytorch_model*.bin`. `Weights` reads any of them, `write_weights` writes safetensors. In memory is the shard that is
being written and the tensor that is being read, whatever the size of the model.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from utils import UserError, read_json, sha256, write_json

OLD_BUFFERS = (".rotary_emb.inv_freq",)  # LLaMA checkpoints of 2023 stored them; models compute them now
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Specs = dict[str, tuple[tuple[int, ...], torch.dtype]]  # a tensor's name → shape and type


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and what it looks like."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def is_old_buffer(name: str) -> bool:
    """True for buffers that old LLaMA files carry and that models now compute."""
    return name.endswith(OLD_BUFFERS)


def inside(folder: Path, name: str, allowed: Path | None = None) -> Path:
    """The path of file `name` of `folder`, which must lie, symbolic links resolved, in `allowed` (default `folder`).

    Raises:
        UserError: the name is absolute, climbs out with `..`, is a link that leads out, does not exist, or is no file.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{folder}: the file name {name!r} leaves the folder, refused")
    path = folder / name
    if not path.resolve().is_relative_to((allowed or folder).resolve()):
        raise UserError(f"{path}: a link that leads out of the folder, refused; put the file itself there")
    if not path.exists():
        raise UserError(f"{path}: no such file, though the folder's index names it")
    if not path.is_file():  # a folder, or a pipe that would wait for ever
        raise UserError(f"{path}: not a regular file")
    return path


def load_torch(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors of a `.bin` file, and whether they are mapped from disk; nothing in the file is ever run.

    Raises:
        UserError: the file holds anything but tensors in a dictionary, or is damaged.
    """
    mapped = True
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):  # files from before torch 1.6 cannot be mapped
                raise
            mapped = False
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) `?([\w.]+\.\w+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise UserError(f"{path}: holds more than tensors{what} and could run code, so it was not read") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not a readable torch file ({reason})") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise UserError(f"{path}: not a dictionary of tensors")
    return content, mapped


def open_safetensors(path: Path):  # noqa: ANN201  (safetensors has no public type for it)
    """`safe_open`, with a clear error for a damaged file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


class Weights:
    """The tensors of a model folder, read lazily: `entries` is known at once, `read` reads from disk.

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
        self._loaded: tuple[Path, dict[str, torch.Tensor]] | None = None  # the last file that cannot be mapped
        self.files, weight_map = self._find(stem)
        self.entries: dict[str, Entry] = {}
        for path in self.files:
            for name, entry in self._scan(path):
                if weight_map and weight_map.get(name) != path.name:
                    continue  # the index decides where a name lies
                self.entries[name] = entry
        lost = sorted(set(weight_map) - set(self.entries))
        if lost:
            raise UserError(f"{self.folder}: the index names {lost[0]} (and {len(lost) - 1} more), no file has it")

    def _find(self, stems: tuple[str, ...]) -> tuple[list[Path], dict[str, str]]:
        for suffix in (".safetensors", ".bin"):
            for stem in stems:
                index = self.folder / f"{stem}{suffix}.index.json"
                if index.exists():
                    return self._read_index(inside(self.folder, index.name, self.allowed))
                if (self.folder / f"{stem}{suffix}").exists():
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
            for name, tensor in load_torch(path)[0].items():
                yield name, Entry(path, tuple(tensor.shape), tensor.dtype)
            return
        handle = open_safetensors(path)
        for name in handle.keys():  # noqa: SIM118  (not a dictionary)
            view = handle.get_slice(name)
            if view.get_dtype() not in SAFETENSORS_DTYPES:
                raise UserError(f"{path}: {name} has the type {view.get_dtype()}, which is not supported")
            yield name, Entry(path, tuple(view.get_shape()), SAFETENSORS_DTYPES[view.get_dtype()])

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def specs(self) -> Specs:
        """Shape and type of every tensor."""
        return {name: (entry.shape, entry.dtype) for name, entry in self.entries.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from disk where the format allows. Do not change it: it may be the file itself.

        The file is opened anew each time, since the pages of a mapping count as memory until it is closed.
        """
        path = self.entries[name].file
        if path.suffix != ".bin":
            with open_safetensors(path) as handle:
                return handle.get_tensor(name)
        if self._loaded and self._loaded[0] == path:
            return self._loaded[1][name]
        content, mapped = load_torch(path)
        self._loaded = None if mapped else (path, content)
        return content[name]

    def sha256(self) -> dict[str, str]:
        """File name → SHA-256 of the weight files."""
        return {path.name: sha256(path) for path in self.files}


def all_finite(tensor: torch.Tensor) -> bool:
    """True if a tensor of floats has neither NaN nor inf (minimum and maximum show both, at 20 times the speed)."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def count_different(one: torch.Tensor, other: torch.Tensor) -> int:
    """In how many numbers two tensors of one shape and type differ by a bit (0 and -0 do)."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.itemsize]
    return int((one.view(kind) != other.view(kind)).sum())


def write_weights(
    folder: Path,
    specs: Specs,
    make: Callable[[str], torch.Tensor],
    max_shard_bytes: int,
    stem: str = "model",
) -> dict[str, str]:
    """Write tensors as safetensors files, shard by shard, with an index where there are several.

    Args:
        specs: what is written, in this order.
        make: a tensor's name → the tensor; called once for each, and kept until its shard is written.

    Returns:
        File name → SHA-256.
    """
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in specs.items()}
    split = split_torch_state_dict_into_shards(
        planned, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    digests = {}
    with tqdm(total=len(specs), unit="tensor", disable=None) as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = make(name).contiguous()
                bar.update()
            save_file(shard, folder / file, metadata={"format": "pt"})
            digests[file] = sha256(folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    if Weights(folder, stem=(stem,)).specs() != specs:  # read back as any user will
        raise RuntimeError(f"{folder}: what was written is not what was planned")
    return digests
