"""Model folders: find them (locally or on the hub), read their settings, write new ones whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convert.hub import local_or_hub, reason
from convert.weights import Weights, inside, what_failed
from utils import UserError, read_json

ITEM_TOKEN = re.compile(r"<[a-z]_\d+>")
ROW_PADDING = 128  # embeddings are sometimes padded to a multiple of at most this
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
)
LOADERS = ("config.json", "adapter_config.json")  # without one of them nothing loads a folder
SETTINGS = ("config.json", "generation_config.json")
# On the hub a repository may also hold the authors' own format (consolidated*) and other precisions in folders.
HUB_PATTERNS = (*SETTINGS, *TOKENIZER_FILES, "adapter_config.json", "README.md", "*.index.json")


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder on this disk; `allowed` is where its links may lead (the hub's cache keeps files as links)."""

    path: Path
    allowed: Path

    def weights(self) -> Weights:
        """Its tensors, read lazily."""
        return Weights(self.path, self.allowed)

    def has(self, name: str) -> bool:
        """True if the file `name` is there."""
        return (self.path / name).is_file()

    def json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file of the folder."""
        if not (self.path / name).is_file():
            raise UserError(f"{self.path / name}: no such file")
        content = read_json(inside(self.path, name, self.allowed))
        if not isinstance(content, dict):
            raise UserError(f"{self.path / name}: not a JSON object")
        return content


def find_model(name: str | Path) -> ModelFolder:
    """The folder of a model given as a local path or a hub id (`owner/name`, downloaded to the hub's cache).

    Raises:
        UserError: no such folder, or the hub does not have it or cannot be reached.
    """
    found = local_or_hub(str(name))
    path = Path(found) if Path(found).is_dir() else Path(download(found))
    real = path.resolve()
    cache = next((up for up in real.parents if up.name.startswith("models--") and "snapshots" in real.parts), None)
    return ModelFolder(path, cache or real)


def download(repo_id: str) -> str:
    """Download weights (safetensors if there are any, else .bin), settings and tokenizer of a hub repository."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        files = HfApi().list_repo_files(repo_id)
        weights = "*.safetensors" if any(file.endswith(".safetensors") for file in files) else "*.bin"
        patterns = [*HUB_PATTERNS, weights]
        return snapshot_download(repo_id, allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*", "train*"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{repo_id}: the hub did not give it ({reason(error)})") from None


# ---- settings ----


def load_config(folder: ModelFolder):  # noqa: ANN201  (a transformers config)
    """The model's configuration; code that came with the checkpoint is never run."""
    from transformers import AutoConfig

    settings = folder.json("config.json")
    if "auto_map" in settings:
        raise UserError(
            f"{folder.path / 'config.json'}: needs code of its own (auto_map), which is not run; use a model that "
            "transformers knows"
        )
    try:
        return AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise UserError(f"{folder.path / 'config.json'}: {reason(error)}") from None


def skeleton(config) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:  # noqa: ANN001
    """Names and shapes of the tensors a model of `config` has, and its tied names (alias → source), without memory."""
    model = _empty_model(config)
    ties = getattr(model, "_tied_weights_keys", None) or {}
    ties = dict(ties) if isinstance(ties, dict) and config.tie_word_embeddings else {}
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}, ties


def embedding_names(config) -> tuple[str, str | None]:  # noqa: ANN001
    """The names of the input embedding and of the output layer's weight (None if the model has none)."""
    model = _empty_model(config)
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return names[id(model.get_input_embeddings())], names.get(id(model.get_output_embeddings()))


def _empty_model(config):  # noqa: ANN001, ANN202
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise UserError(f"not a causal language model: {reason(error)}") from None


def load_tokenizer(folder: ModelFolder):  # noqa: ANN201  (a transformers tokenizer)
    """The folder's tokenizer; code that came with it is never run."""
    from transformers import AutoTokenizer

    if not any(folder.has(name) for name in TOKENIZERS):
        raise UserError(f"{folder.path}: has no tokenizer (tokenizer.json or tokenizer.model)")
    for pattern in TOKENIZER_FILES:
        for path in folder.path.glob(pattern):
            inside(folder.path, path.name, folder.allowed)
    try:
        return AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise UserError(f"{folder.path}: the tokenizer cannot be read ({reason(error)})") from None


def item_tokens(tokenizer) -> dict[str, int]:  # noqa: ANN001
    """Item tokens (`<a_12>`) of a tokenizer and their ids."""
    return {token: number for token, number in tokenizer.get_added_vocab().items() if ITEM_TOKEN.fullmatch(token)}


def check_item_tokens(delta: ModelFolder, base: ModelFolder, rows: int, base_rows: int) -> int:
    """Check that the delta's tokenizer and the embedding's `rows` belong together; the number of item tokens.

    Raises:
        UserError: tokens have no row, added rows have no token, or item tokens sit on tokens of the base.
    """
    tokenizer = load_tokenizer(delta)
    tokens = item_tokens(tokenizer)
    place = delta.path
    if not tokens:
        raise UserError(f"{place}: its tokenizer has no item tokens (<a_0>, …); its files are not this delta's")
    if max(tokens.values()) >= rows or len(tokenizer) > rows:
        raise UserError(f"{place}: the tokenizer has {len(tokenizer)} tokens, the embedding only {rows} rows")
    if rows > base_rows and rows - len(tokenizer) >= ROW_PADDING:
        raise UserError(f"{place}: {rows} rows of the embedding, but {len(tokenizer)} tokens in the tokenizer")
    for file, token, number in _stated_ids(delta):
        if tokens.get(token, number) != number:
            raise UserError(
                f"{place / file}: gives {token} the id {number}, but the tokenizer loads it as {tokens[token]}"
            )
    if any(base.has(name) for name in TOKENIZERS):
        _check_same_vocabulary(load_tokenizer(base).get_vocab(), tokenizer.get_vocab(), tokens, place)
    return len(tokens)


def _stated_ids(folder: ModelFolder) -> Iterator[tuple[str, str, int]]:
    """(file, token, id) as the tokenizer's files state them; loaders renumber tokens silently where ids have gaps."""
    if folder.has("added_tokens.json"):
        for token, number in folder.json("added_tokens.json").items():
            yield "added_tokens.json", token, number
    if folder.has("tokenizer.json"):
        for entry in folder.json("tokenizer.json").get("added_tokens") or []:
            yield "tokenizer.json", entry["content"], entry["id"]


def _check_same_vocabulary(base: dict[str, int], ours: dict[str, int], items: dict[str, int], place: Path) -> None:
    """A fine-tuned tokenizer keeps the base's tokens where they were (a special token or two may differ)."""
    moved = [token for token, number in base.items() if ours.get(token) != number]
    if len(moved) > len(base) // 100:
        raise UserError(
            f"{place}: belongs to another base: {len(moved)} of the base's {len(base)} tokens have other ids in its "
            f"tokenizer ({moved[0]!r})"
        )
    taken = {number: token for token, number in base.items()}
    for token, number in items.items():
        if taken.get(number, token) != token:
            raise UserError(
                f"{place}: item token {token} has the id {number}, which the base gives to {taken[number]!r}"
            )


def copy_files(source: ModelFolder, target: Path, patterns: tuple[str, ...]) -> list[str]:
    """Copy the files of `source` that match `patterns` (links as the files they lead to); their names, sorted."""
    names = sorted({path.name for pattern in patterns for path in source.path.glob(pattern) if path.is_file()})
    for name in names:
        shutil.copyfile(inside(source.path, name, source.allowed), target / name)
    return names


# ---- new folders, whole or not at all ----


def add_target(parser: argparse.ArgumentParser, *flags: str) -> None:
    """The options of every script that writes a model folder: `flags` for the folder itself, a shard's size, overwriting."""
    parser.add_argument(*flags, required=True, type=Path, help="folder to write; must not exist yet")
    size = {"type": parse_size, "default": "5GB", "help": "largest weight file (default: 5GB)"}
    parser.add_argument("--max-shard-size", "--max_shard_size", **size)
    parser.add_argument("--overwrite", action="store_true", help="replace that folder if it exists")


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `10KB` or a plain number (powers of ten, as on the hub)."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
    number = text.upper().rstrip("GMKB")
    unit = text.upper()[len(number) :]
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError):
        raise UserError(f"{text!r} is not a size; write for example 5GB or 200MB") from None
    if size <= 0:
        raise UserError(f"{text!r}: a shard's size must be positive")
    return size


@contextlib.contextmanager
def new_folder(target: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well, and is removed when it does not.

    It is `.<target>.partial` beside it until then. Nothing loads a folder without `config.json` (an adapter's:
    `adapter_config.json`): write that file with `write_settings`; it gets its name last, when `target` is in place.
    What a killed process left is cleared up by the next call.

    Raises:
        UserError: `target` exists and `overwrite` is false, another process is writing it, or the disk is full.
    """
    target = Path(target)
    partial = _beside(target, "partial")
    _refuse_existing(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror})") from None
    with _locked(partial, target):
        _recover(target)
        _refuse_existing(target, overwrite)
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield partial
            _commit(partial, target)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(f"{what_failed(error, target, partial)}; nothing was left in {target}") from None
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _beside(target: Path, ending: str) -> Path:
    return target.parent / f".{target.name}.{ending}"


def _is_unfinished(target: Path) -> bool:
    """True for a folder whose writer was killed between its two last steps."""
    return any((target / f"{name}.partial").is_file() and not (target / name).exists() for name in LOADERS)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file is in the way; choose another folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite and not _is_unfinished(target):
        raise UserError(f"{target}: exists; choose another folder or add --overwrite")


@contextlib.contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    """Hold `partial` for this process; the lock goes with the process, however it ends."""
    busy = UserError(f"{target}: another process is writing it now; wait for it")
    try:
        handle = os.open(partial, os.O_RDONLY)
    except FileNotFoundError:  # the other one has just finished
        raise busy from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or os.fstat(handle).st_ino != partial.stat().st_ino:
            raise busy
        yield
    except BlockingIOError:
        raise busy from None
    finally:
        os.close(handle)


def _recover(target: Path) -> None:
    """Undo what a killed process left: a target without its last step, an old one that was moved aside."""
    old = _beside(target, "old")
    if _is_unfinished(target):
        shutil.rmtree(target)
    if old.exists() and not target.exists():
        old.rename(target)


def _commit(partial: Path, target: Path) -> None:
    old = _beside(target, "old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    partial.rename(target)
    for name in LOADERS:
        if (target / f"{name}.partial").exists():
            (target / f"{name}.partial").rename(target / name)
    shutil.rmtree(old, ignore_errors=True)


def write_settings(folder: Path, settings: dict[str, Any], name: str = "config.json") -> None:
    """Write `name`, one of `LOADERS`, under another name, which `new_folder` turns into `name` at the very end."""
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / f"{name}.partial").write_text(text, encoding="utf-8")
