"""Item texts to embeddings: cleaning, pooling against a text-by-text loop, files, errors; the real MiniLM in the slow part."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_process import embed
from utils import UserError


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  two\n words\t", "two words"),
        ("<b>Bold</b><br/>new &amp; old", "Bold new & old"),
        ("A &amp;quot;quoted&amp;quot; text", 'A "quoted" text'),
        ("x<script type='a'>var y = '<b>';</script>z", "x z"),
        ("a < b and c > d, I <3 it", "a < b and c > d, I <3 it"),
        ("caf&eacute; &#8212; 5&quot;", 'café — 5"'),
        ("<!-- hidden -->shown", "shown"),
        ("<p> </p>", ""),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert embed.clean_text(raw) == clean


def test_fields_of_items() -> None:
    items = {
        "0": {"title": "A", "description": ""},
        "1": {"description": ["one", "two"], "brand": "x"},
        "2": {"title": "B", "description": "C"},
    }
    assert embed.field_texts(items, Path("x")) == [["A"], ["one two"], ["B", "C"]]


@pytest.mark.parametrize(
    ("items", "word"),
    [
        ([], "non-empty object"),
        ({}, "non-empty object"),
        ({"1": {"title": "a"}}, 'no key "0"'),
        ({"0": "text"}, "not an object"),
        ({"0": {"title": 5}}, "title is int"),
        ({"0": {"title": " <p></p>", "description": ""}}, "neither title nor description"),
    ],
)
def test_bad_items_end_with_one_line(items: object, word: str) -> None:
    with pytest.raises(UserError, match=word):
        embed.field_texts(items, Path("x.json"))


def test_missing_text_stands_in() -> None:
    assert embed.field_texts({"0": {"title": ""}}, Path("x"), "unknown") == [["unknown"]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer LLaMA with a word tokenizer that has no padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = {word: number for number, word in enumerate(["<unk>", "</s>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaModel(LlamaConfig(vocab_size=len(words), max_position_embeddings=6, **sizes)).save_pretrained(folder)
    return folder


def write_items(folder: Path, items: dict) -> None:
    (folder / "D").mkdir(exist_ok=True)
    (folder / "D" / "D.item.json").write_text(json.dumps(items))


def test_rows_against_one_text_at_a_time(tiny: Path, tmp_path: Path) -> None:
    """Padding, batching and sorting must not be seen; too long texts are cut at the model's positions."""
    from transformers import AutoModel, AutoTokenizer

    texts = [("a b c", "d"), ("e", ""), ("", "a b c d e f g h"), ("a b c", "d"), ("h g", "b b b")]
    write_items(tmp_path, {str(i): {"title": t, "description": d} for i, (t, d) in enumerate(texts)})
    flags = ["--data_path", str(tmp_path), "--dataset", "D", "--plm_name", "tiny", "--model_path", str(tiny)]
    embed.main([*flags, "--batch_size", "3", "--device", "cpu"])
    found = np.load(tmp_path / "D" / "D.emb-tiny-td.npy")
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModel.from_pretrained(tiny).eval()
    for row, fields in zip(found, texts, strict=True):
        means = []
        for text in filter(None, fields):
            ids = torch.tensor([tokenizer(text).input_ids[:6]])
            with torch.no_grad():
                means.append(model(input_ids=ids).last_hidden_state[0].mean(0).numpy())
        np.testing.assert_allclose(row, np.mean(means, axis=0), atol=1e-5)
    assert found.dtype == np.float32 and np.array_equal(found[0], found[3])


def test_no_model_there_ends_with_one_line(tmp_path: Path) -> None:
    write_items(tmp_path, {"0": {"title": "a"}})
    with pytest.raises(UserError, match="--model_path"):
        embed.main(["--data_path", str(tmp_path), "--dataset", "D", "--model_path", str(tmp_path / "none")])
    with pytest.raises(UserError, match="E.item.json"):
        embed.main(["--data_path", str(tmp_path), "--dataset", "E", "--model_path", str(tmp_path)])


@pytest.mark.slow
def test_minilm_puts_like_with_like(tmp_path: Path) -> None:
    from data_process.fetch import fetch

    titles = ["Black ink cartridge", "Colour ink cartridges for printers", "Leather office chair", "Mesh desk chair"]
    write_items(tmp_path, {str(i): {"title": title} for i, title in enumerate(titles)})
    embed.main(
        ["--data_path", str(tmp_path), "--dataset", "D", "--model_path", str(fetch("minilm")), "--device", "cpu"]
    )
    rows = np.load(tmp_path / "D" / "D.emb-minilm-td.npy")
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similar = rows @ rows.T
    assert min(similar[0, 1], similar[2, 3]) > similar[:2, 2:].max() + 0.2
