"""LLaMA's tokenizer from a bare `tokenizer.model`, and the rules of 2023 from any LLaMA base, against sentencepiece itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from convert_parts import ITEM_TOKENS, UNTIL_4_33, VOCABULARY, save_tokenizer, tiny_llama
from tiny_models import make_model
from transformers import AutoTokenizer, MistralConfig

import prompt
from modeling import prepare_base
from tokenising import add_item_tokens, cut_as_in_2023, load_tokenizer
from utils import UserError

TEXTS = [row["instruction"] for rows in prompt.all_prompt.values() for row in rows[:3]]
TEXTS += ["the user bought", "the  user ", "red\n\nblue", "Ünïcode 12,345 × 7", "### Response:", "a"]


def write_bare(folder: Path, model_type: str = "llama") -> None:
    """A base as it was downloaded: the sentencepiece model, and a configuration that names no tokenizer."""
    save_tokenizer(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = tiny_llama()
    model.save_pretrained(folder)
    if model_type == "mistral":
        MistralConfig(**sizes).save_pretrained(folder)


@pytest.mark.parametrize("settings", [None, {"add_bos_token": True}, {"model_max_length": 2048}])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_a_bare_sentencepiece_model_reads_text_as_sentencepiece_does(tmp_path, model_type, settings):
    write_bare(tmp_path / "base", model_type)
    if settings:
        (tmp_path / "base/tokenizer_config.json").write_text(json.dumps(settings))
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "base/tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path / "base")
    assert tokenizer.tokenize("the user")[0] == "▁th"
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [own.bos_id(), *own.encode(text)], text
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("</s>", 0)
    # and so do the tokenizer that training saves and every later reader of it
    ids = add_item_tokens(tokenizer, ITEM_TOKENS)
    assert ids == list(range(VOCABULARY, VOCABULARY + len(ITEM_TOKENS)))
    tokenizer.save_pretrained(tmp_path / "saved")
    for again in (AutoTokenizer.from_pretrained(tmp_path / "saved"), load_tokenizer(tmp_path / "saved")):
        for text in TEXTS:
            assert again(text)["input_ids"] == [own.bos_id(), *own.encode(text)], text
            with_item = again(text + ITEM_TOKENS[3])["input_ids"]
            assert with_item == [own.bos_id(), *own.encode(text), ids[3]], text


@pytest.mark.parametrize("kind", ["bare", "with settings", "saved today", "tokenizer.json alone"])
def test_the_rules_of_2023_from_any_llama_base(tmp_path, kind):
    base = tmp_path / "base"
    if kind == "bare":
        write_bare(base)
    else:
        save_tokenizer(base)
        tiny_llama().save_pretrained(base)
    if kind in ("saved today", "tokenizer.json alone"):
        AutoTokenizer.from_pretrained(base).save_pretrained(base)
        (base / "tokenizer.model").unlink()
    if kind == "tokenizer.json alone":
        (base / "tokenizer_config.json").unlink()
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        }
        (base / "tokenizer_config.json").write_text(json.dumps(settings))
    prepare_base(str(base), tmp_path / "ready", ITEM_TOKENS, 42, tokenisation="2023")
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path / "ready"), load_tokenizer(tmp_path / "ready")):
        assert tokenizer.convert_tokens_to_ids(ITEM_TOKENS) == list(range(VOCABULARY, VOCABULARY + len(ITEM_TOKENS)))
        for text, wanted in UNTIL_4_33.items():
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
            assert tokens == ["<s>", *wanted.split(" ")], text


def test_a_base_that_had_no_such_rules_is_refused(tmp_path):
    make_model("smollm", tmp_path / "base")
    tokenizer = load_tokenizer(tmp_path / "base")
    with pytest.raises(UserError, match="the base model's tokenizer is not LLaMA's"):
        cut_as_in_2023(tokenizer)
    prepare_base(str(tmp_path / "base"), tmp_path / "ready", ITEM_TOKENS, 42, tokenisation="paper")  # as it is
    assert load_tokenizer(tmp_path / "ready").tokenize("a pen") == tokenizer.tokenize("a pen")
