"""Model folders that somebody hands over: find them (locally or on the hub), read and check their settings and tokenizer."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convert.hub import local_or_hub, reason
from convert.weights import Specs, Weights, inside, is_old_buffer
from data import ITEM_TOKEN
from prompt_style import ITEMS, STYLE
from utils import UserError, read_json

MOST_LAYERS = 1000
FLOATS = ("float16", "bfloat16", "float32")
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
SETTINGS = ("config.json", "generation_config.json")
# On the hub a repository may also hold the authors' own format (consolidated*) and other precisions in folders.
RUN_FILES = ("generation_config.json", "run.json", STYLE, ITEMS)  # what goes along with a run's weights
HUB_PATTERNS = (*SETTINGS, *TOKENIZER_FILES, *RUN_FILES, "adapter_config.json", "README.md", "*.index.json")


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder on this disk; `allowed` is where its links may lead (the hub's cache keeps files as links)."""

    path: Path
    allowed: Path

    def weights(self) -> Weights:
        """Its tensors, read lazily."""
        return Weights(self.path, self.allowed)

    def has(self, name: str) -> bool:
        """True if something of that name is there."""
        return (self.path / name).exists()

    def json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file of the folder."""
        if not self.has(name):
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


def refuse_own_code(folder: ModelFolder) -> None:
    """Raise UserError if the settings of model or tokenizer name code that came with them (`auto_map`)."""
    for name in ("config.json", "tokenizer_config.json"):
        if folder.has(name) and "auto_map" in folder.json(name):
            raise UserError(
                f"{folder.path / name}: needs code of its own (auto_map), which is not run; use a model that "
                "transformers knows"
            )


def load_config(folder: ModelFolder):  # noqa: ANN201  (a transformers config)
    """The model's configuration; code that came with the checkpoint is never run."""
    from transformers import AutoConfig

    place = folder.path / "config.json"
    folder.json("config.json")
    refuse_own_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (every class of transformers checks its settings in its own way)
        raise UserError(f"{place}: {reason(error)}") from None
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > MOST_LAYERS:
        raise UserError(f"{place}: num_hidden_layers is {layers}")
    return config


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
    except Exception as error:  # noqa: BLE001  (what a class makes of settings that cannot be)
        raise UserError(f"config.json: no causal language model can be made of it ({reason(error)})") from None


def check_names(
    specs: Specs, wanted: dict[str, tuple[int, ...]], ties: dict[str, str], place: Path, may_convert: bool = False
) -> bool:
    """Refuse weights that are not what config.json describes.

    Args:
        wanted: names and shapes of the model's tensors.
        ties: those that are another tensor again (alias → source), and may be missing.
        may_convert: names may be others, which transformers converts when it loads the model, if there are as many numbers.

    Returns:
        False if the names are others, and were not compared.

    Raises:
        UserError: a tensor is missing, has another shape, or nothing would load it.
    """
    lost = [name for name in wanted if name not in specs and name not in ties]
    more = [name for name in specs if name not in wanted and name not in ties and not is_old_buffer(name)]
    if lost and more and may_convert:
        theirs = sum(torch.Size(shape).numel() for name, shape in wanted.items() if name not in ties)
        if theirs == sum(torch.Size(shape).numel() for name, (shape, _) in specs.items() if name not in ties):
            return False
    if lost:
        raise UserError(f"{place}: lacks {lost[0]}, which the model of its config.json has")
    if more:
        raise UserError(f"{place}: {more[0]} is not part of the model of its config.json; nothing would load it")
    for name, shape in wanted.items():
        if name in specs and specs[name][0] != shape:
            raise UserError(f"{place}: {name} is {list(specs[name][0])}, config.json makes it {list(shape)}")
    return True


def read_tokenizer(folder: ModelFolder):  # noqa: ANN201  (a transformers tokenizer)
    """The folder's tokenizer as it is; code that came with it is never run."""
    from transformers import AutoTokenizer

    if not any(folder.has(name) for name in TOKENIZERS):
        raise UserError(f"{folder.path}: has no tokenizer (tokenizer.json or tokenizer.model)")
    for pattern in TOKENIZER_FILES:
        for path in folder.path.glob(pattern):
            inside(folder.path, path.name, folder.allowed)
    refuse_own_code(folder)
    try:
        return AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (the library in Rust raises Exception itself)
        raise UserError(f"{folder.path}: the tokenizer cannot be read ({reason(error)})") from None


def item_tokens(tokenizer) -> dict[str, int]:  # noqa: ANN001
    """Item tokens (`<a_12>`) of a tokenizer and their ids."""
    return {token: number for token, number in tokenizer.get_added_vocab().items() if ITEM_TOKEN.fullmatch(token)}


def check_item_tokens(delta: ModelFolder, base: ModelFolder, rows: int, base_rows: int) -> int:
    """Check that the delta's tokenizer and the embedding's `rows` belong together; the number of item tokens.

    Raises:
        UserError: tokens have no row, added rows have no token, or item tokens sit on tokens of the base.
    """
    tokenizer = read_tokenizer(delta)
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
        _check_same_vocabulary(read_tokenizer(base).get_vocab(), tokenizer.get_vocab(), tokens, place)
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


# ---- what the scripts' command lines share ----


def add_target(parser: argparse.ArgumentParser, *flags: str) -> None:
    """The options of every script that writes a model folder: `flags` for the folder itself, a shard's size, overwriting."""
    parser.add_argument(*flags, required=True, type=Path, help="folder to write; must not exist yet")
    size = {"type": parse_size, "default": "5GB", "help": "largest weight file"}
    parser.add_argument("--max-shard-size", "--max_shard_size", **size)
    parser.add_argument("--overwrite", action="store_true", help="replace that folder if a script here wrote it")


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `10KB` or a plain number (powers of ten, as on the hub)."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1, "": 1}
    number = text.upper().rstrip("GMKB")
    unit = text.upper()[len(number) :]
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a size; write for example 5GB or 200MB")
    return size
