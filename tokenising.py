"""How text becomes tokens: a model's tokenizer with the item tokens in it, and the rules that LLaMA's had in 2023."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from collator import adds_bos
from data import ITEM_TOKEN, RecData
from reading import check_model_folder, faults_said
from utils import UserError, read_json


def load_tokenizer(path: str | Path, model_max_length: int = 2048) -> Any:
    """The tokenizer of a folder or hub id, with a pad token, and with BOS where a LLaMA tokenizer does not say otherwise.

    LLaMA pads with its unknown token (id 0); a tokenizer whose unknown token has another id pads with EOS.
    """
    check_model_folder(path)
    options = {"model_max_length": model_max_length, "padding_side": "right"}
    with faults_said(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
        if _is_bare(Path(path)) and not begins_with_a_blank(tokenizer) and _sentencepiece_does(Path(path)):
            tokenizer = LlamaTokenizer.from_pretrained(
                path, trust_remote_code=False, **options
            )  # told of no class, transformers takes another
        if not tokenizer("a")["input_ids"]:
            raise ValueError("it makes nothing of a text")
    _check_item_ids(Path(path), tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        unknown_is_zero = tokenizer.unk_token is not None and tokenizer.unk_token_id == 0
        tokenizer.pad_token = tokenizer.unk_token if unknown_is_zero else tokenizer.eos_token
    if getattr(tokenizer, "legacy", False):  # transformers obeys it but does not save it
        tokenizer.init_kwargs["legacy"] = True
    # A bare tokenizer.model says nothing of BOS and transformers then adds none; LLaMA 1 and 2 were trained with it.
    if _is_bare(Path(path)) and "add_bos_token" not in _settings(Path(path)) and not adds_bos(tokenizer):
        tokenizer.add_bos_token = True
    return tokenizer


def _check_item_ids(folder: Path, tokenizer: Any) -> None:
    """transformers renumbers added tokens without a word where their ids have gaps; item tokens would be others'."""
    path = folder / "tokenizer.json"
    added = read_json(path).get("added_tokens") if path.is_file() else None
    for token in added or []:
        name, number = str(token.get("content")), token.get("id")
        if ITEM_TOKEN.fullmatch(name) and tokenizer.convert_tokens_to_ids(name) != number:
            now = tokenizer.convert_tokens_to_ids(name)
            raise UserError(f"{path}: gives {name} the id {str(number)[:40]}, but the tokenizer loads it as {now}")


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def _is_bare(folder: Path) -> bool:
    """True for a sentencepiece model of which no file says which class reads it."""
    if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").exists():
        return False
    return "tokenizer_class" not in _settings(folder)


def _sentencepiece_does(folder: Path) -> bool:
    """True if the model's own library puts a blank before a text."""
    try:
        return SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode("a", out_type=str)[0][0] == "▁"
    except RuntimeError:  # another kind of file: LLaMA 3's
        return False


def begins_with_a_blank(tokenizer: Any) -> bool:
    """True if a text's first token is as if a blank stood before it, as LLaMA's is."""
    return tokenizer.tokenize("a")[0].startswith("▁")


def is_llamas(tokenizer: Any) -> bool:
    """True for a tokenizer of LLaMA 1 or 2, and those made like it: sentencepiece with bytes, a blank before a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    bytes_too = backend is not None and json.loads(backend.to_str())["model"].get("byte_fallback")
    return bool(bytes_too) and begins_with_a_blank(tokenizer)


def add_item_tokens(tokenizer: Any, tokens: list[str]) -> list[int]:
    """Add `tokens` in the order given; the ids of those that are new. Text is never normalised before they are matched."""
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    return tokenizer.convert_tokens_to_ids(new)


def item_token_ids(tokenizer: Any, data: RecData) -> list[tuple[int, ...]]:
    """The token ids of every item's index.

    Raises:
        UserError: the tokenizer lacks item tokens, as before fine-tuning.
    """
    vocab = tokenizer.get_vocab()
    missing = [token for token in data.item_tokens if token not in vocab]
    if missing:
        raise UserError(
            f"the checkpoint's tokenizer lacks {len(missing)} of the {len(data.item_tokens)} item tokens of "
            f"{data.files['index']} ({missing[0]}, …): is it fine-tuned on this index file?"
        )
    return [tuple(vocab[token] for token in index) for index in data.indices]


def cut_as_in_2023(tokenizer: Any, strips: bool = True, bos: bool | None = None) -> PreTrainedTokenizerFast:
    """A LLaMA tokenizer that cuts text around item tokens as the slow class of 2023 did, with which the paper trained.

    That class cut a text at the item tokens and gave each piece to sentencepiece on its own, which puts a `▁` before it:
    `<b_2>, <a_1>` was `<b_2>` `▁,` `<a_1>`. Today only the beginning of a text gets one.

    Args:
        tokenizer: with the item tokens in it.
        strips: drop blanks and line breaks around item tokens, as transformers did until 4.33.
        bos: put a BOS token before a text; None: as `tokenizer` does.

    Raises:
        UserError: it is no LLaMA tokenizer.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if not is_llamas(tokenizer):
        raise UserError(
            "the base model's tokenizer is not LLaMA's, so it has no rules of 2023: leave --tokenisation out"
        )
    for token in content["added_tokens"]:
        if ITEM_TOKEN.fullmatch(token["content"]):
            token["lstrip"] = token["rstrip"] = strips
            token["normalized"] = False  # else they would be looked for with a ▁ before them
    backend = Tokenizer.from_str(json.dumps(content))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    if adds_bos(tokenizer) if bos is None else bos:
        first = tokenizer.bos_token
        backend.post_processor = TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, tokenizer.bos_token_id)]
        )
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )
