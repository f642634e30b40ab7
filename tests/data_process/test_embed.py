"""Embeddings against a loop over single texts, for encoders and decoders; processes, kills, files, errors; MiniLM if slow."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from running import together
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import provenance
from data_process import embed
from data_process.encoder import encode, load_encoder, longest_input, pool
from data_process.text_vectors import Parts
from utils import UserError

ROOT = Path(__file__).parents[2]
WORDS = ["<unk>", "</s>", *"abcdefgh"]
TEXTS = [("a b c", "d"), ("e", ""), ("", "a b c d e f g h"), ("a b c", "d"), ("h g", "b b b"), ("g", "a b")]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
# name → configuration: encoders that count positions from 0 and from the padding on, relative ones, decoders
CONFIGS = {
    "bert": transformers.BertConfig(**SMALL, max_position_embeddings=6),
    "roberta": transformers.RobertaConfig(**SMALL, max_position_embeddings=8, pad_token_id=1),
    "mpnet": transformers.MPNetConfig(**SMALL, max_position_embeddings=8, pad_token_id=1),
    "distilbert": transformers.DistilBertConfig(
        dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=6
    ),
    "t5": transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0),
    "llama": transformers.LlamaConfig(**SMALL, max_position_embeddings=6),
    "gpt2": transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=6),
    "qwen3": transformers.Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8, max_position_embeddings=6),
    "gemma": transformers.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8, max_position_embeddings=6),
}


def make_model(folder: Path, name: str) -> Path:
    """A random two-layer model with a word tokenizer that has no padding token (the unknown token's id is 0)."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | {"vocab_size": len(WORDS)})
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"), "llama")


def write_items(folder: Path, texts: list[tuple[str, str]]) -> list[str]:
    """Write the dataset D; the flags that embed it."""
    (folder / "D").mkdir(exist_ok=True)
    items = {str(i): {"title": title, "description": description} for i, (title, description) in enumerate(texts)}
    shuffled = dict(sorted(items.items(), key=lambda item: hash(item[0]) % 7))  # the order of keys means nothing
    (folder / "D" / "D.item.json").write_text(json.dumps(shuffled))
    return ["--data_path", str(folder), "--dataset", "D", "--plm_name", "tiny", "--device", "cpu"]


def one_by_one(folder: Path, text: str, pooling: str = "mean", limit: int = 6) -> np.ndarray:
    """The oracle: no batch, no padding, no mask."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([tokenizer(text).input_ids[:limit]])).last_hidden_state[0]
    return (hidden.mean(0) if pooling == "mean" else hidden[-1]).numpy()


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("name", CONFIGS)
def test_batches_against_one_text_at_a_time(tmp_path: Path, name: str, pooling: str) -> None:
    """Padding, batching and sorting must not be seen; too long texts are cut at the model's positions."""
    folder = make_model(tmp_path, name)
    tokenizer, model = load_encoder(str(folder), "cpu", "float32")
    texts = ["a b", "a b c d e f", "h", "c", "f g h a b c d e", "d e f"]
    limit = longest_input(model, 6)
    assert limit == 6
    found = encode(texts, tokenizer, model, max_len=limit, batch_size=4, pooling=pooling)
    expected = [one_by_one(folder, text, pooling) for text in texts]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_positions_are_counted_as_the_model_counts_them(tmp_path: Path) -> None:
    for name, limit in (("bert", 6), ("roberta", 6), ("mpnet", 6), ("t5", 2048)):
        _, model = load_encoder(str(make_model(tmp_path / name, name)), "cpu", "float32")
        assert longest_input(model, 2048) == limit, name


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [99.0, 99.0]], [[5.0, 5.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert pool(hidden, mask, "last").tolist() == [[3.0, 6.0], [0.0, 0.0]]


def test_rows_of_items(tiny: Path, tmp_path: Path) -> None:
    flags = [*write_items(tmp_path, TEXTS), "--model_path", str(tiny), "--batch_size", "3", "--part_size", "2"]
    embed.main([*flags, "--fields", "title:3,description"])
    found = np.load(tmp_path / "D" / "D.emb-tiny-td.npy")
    for row, fields in zip(found, TEXTS, strict=True):
        weights = [weight for weight, text in zip((3, 1), fields, strict=True) if text]
        vectors = [one_by_one(tiny, text) for text in fields if text]
        np.testing.assert_allclose(row, np.average(vectors, axis=0, weights=weights), atol=1e-5)
    assert found.dtype == np.float32 and np.array_equal(found[0], found[3])
    assert sorted(path.name for path in (tmp_path / "D").iterdir()) == [
        "D.emb-tiny-td.npy",
        "D.item.json",
        "D.provenance.json",
    ]
    notes = provenance.notes_of(tmp_path / "D", "D")
    assert list(notes) == ["D.emb-tiny-td.npy"] and provenance.verify(tmp_path / "D", notes) == []


def test_the_originals_way(tiny: Path, tmp_path: Path) -> None:
    """A missing description is ".", here the unknown token."""
    embed.main([*write_items(tmp_path, [("a b", "")]), "--model_path", str(tiny), "--text", "original"])
    expected = (one_by_one(tiny, "a b <unk>") + one_by_one(tiny, "<unk>")) / 2
    np.testing.assert_allclose(np.load(tmp_path / "D" / "D.emb-tiny-td.npy")[0], expected, atol=1e-5)


def test_fields_name_the_file_and_bf16_is_near(tiny: Path, tmp_path: Path) -> None:
    flags = [*write_items(tmp_path, TEXTS[:2]), "--model_path", str(tiny)]
    embed.main([*flags, "--fields", "title"])
    embed.main([*flags, "--fields", "title", "--bf16", "--output_file", str(tmp_path / "half.npy")])
    full, half = np.load(tmp_path / "D" / "D.emb-tiny-t.npy"), np.load(tmp_path / "half.npy")
    assert half.dtype == np.float32 and not np.array_equal(full, half)
    np.testing.assert_allclose(full, half, atol=0.05)


def test_nothing_is_overwritten_without_asking(tiny: Path, tmp_path: Path) -> None:
    flags = [*write_items(tmp_path, TEXTS), "--model_path", str(tiny)]
    embed.main(flags)
    with pytest.raises(UserError, match="--overwrite replaces it"):
        embed.main(flags)
    embed.main([*flags, "--overwrite"])


def test_a_run_goes_on_where_it_was(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are there are not encoded again; parts of other settings are not mixed in."""
    flags = [*write_items(tmp_path, TEXTS), "--model_path", str(tiny), "--part_size", "2"]
    embed.main([*flags, "--output_file", str(tmp_path / "whole.npy")])
    saved = np.save

    def stop_at_the_third(file: object, rows: np.ndarray) -> None:
        if len(list((tmp_path / "D" / "D.emb-tiny-td.npy.parts").glob("part-*"))) == 2:
            raise KeyboardInterrupt
        saved(file, rows)

    monkeypatch.setattr(np, "save", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        embed.main(flags)
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished run with another --pooling"):
        embed.main([*flags, "--pooling", "last"])
    encoded = []
    monkeypatch.setattr(
        "data_process.encoder.encode", lambda texts, **more: encoded.extend(texts) or encode(texts, **more)
    )
    embed.main(flags)
    distinct = {text for pair in TEXTS for text in pair if text}
    assert len(encoded) == len(distinct) - 4
    assert np.array_equal(np.load(tmp_path / "D" / "D.emb-tiny-td.npy"), np.load(tmp_path / "whole.npy"))


def test_parts_cover_every_text_once() -> None:
    parts = Parts.of(Path("x"), ["a", "ccc", "bb", "dd", ""], 2)
    assert [parts.numbers(part).tolist() for part in range(len(parts))] == [[1, 2], [3, 0], [4]]
    many = Parts.of(Path("x"), ["a"] * 2_000_000)
    assert len(many) <= 4096 and sum(len(many.numbers(part)) for part in range(len(many))) == 2_000_000


def test_models_with_code_of_their_own_are_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, and without asking on standard input."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    flags = write_items(tmp_path, TEXTS)
    for number, file in enumerate(("config.json", "tokenizer_config.json")):
        folder = tmp_path / f"model{number}"
        make_model(folder, "llama")
        content = json.loads((folder / file).read_text())
        mark = tmp_path / "code-was-run"
        (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')")
        content |= {"auto_map": {"AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}}
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"{file} asks for code of its own \(auto_map\)"):
            embed.main([*flags, "--model_path", str(folder)])
        assert not mark.exists()


def test_no_model_there_ends_with_one_line(tmp_path: Path) -> None:
    flags = write_items(tmp_path, TEXTS)
    with pytest.raises(UserError, match="--model_path"):
        embed.main([*flags, "--model_path", str(tmp_path / "none")])
    with pytest.raises(UserError, match="--model_path .*(can be loaded|no such file)"):
        embed.main([*flags, "--model_path", str(tmp_path)])
    with pytest.raises(UserError, match="E.item.json"):
        embed.main([*flags, "--dataset", "E", "--model_path", str(tmp_path)])


# ---- processes ----


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_processes_and_nodes_give_the_same_bits(tiny: Path, tmp_path: Path, nodes: int) -> None:
    rng = np.random.default_rng(0)
    texts = [tuple(" ".join(rng.choice(list("abcdefgh"), rng.integers(1, 7))) for _ in "td") for _ in range(60)]
    flags = [*write_items(tmp_path, texts), "--model_path", str(tiny), "--part_size", "5"]
    together(embed.main, [*flags, "--output_file", str(tmp_path / "alone.npy")], 1)  # with as many threads
    together(embed.main, flags, nodes=nodes)
    assert np.array_equal(np.load(tmp_path / "D" / "D.emb-tiny-td.npy"), np.load(tmp_path / "alone.npy"))


@pytest.mark.slow
def test_killed_and_started_again_with_other_processes(tiny: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    texts = [(" ".join(rng.choice(list("abcdefgh"), 6)) + f" {number}", "") for number in range(3000)]
    flags = [*write_items(tmp_path, texts), "--model_path", str(tiny), "--part_size", "4", "--batch_size", "2"]
    command = [sys.executable, str(ROOT / "data_process" / "embed.py"), *flags]
    run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    parts = tmp_path / "D" / "D.emb-tiny-td.npy.parts"
    while run.poll() is None and len(list(parts.glob("part-*.npy"))) < 5:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    done = len(list(parts.glob("part-*.npy")))
    assert 5 <= done < 750 and not (tmp_path / "D" / "D.emb-tiny-td.npy").exists()
    assert f"{done} of 750 parts are there already" in together(embed.main, flags)
    together(embed.main, [*flags, "--output_file", str(tmp_path / "alone.npy")], 1)  # with as many threads
    assert np.array_equal(np.load(tmp_path / "D" / "D.emb-tiny-td.npy"), np.load(tmp_path / "alone.npy"))
    assert not parts.exists()


@pytest.mark.slow
def test_minilm_puts_like_with_like_and_equals_single_texts(tmp_path: Path) -> None:
    from data_process.fetch import fetch

    titles = ["Black ink cartridge", "Colour ink cartridges for printers", "Leather office chair", "Mesh desk chair"]
    flags = write_items(tmp_path, [(title, "") for title in titles])
    folder = fetch("minilm")
    embed.main([*flags, "--model_path", str(folder)])
    rows = np.load(tmp_path / "D" / "D.emb-tiny-td.npy")
    np.testing.assert_allclose(rows, [one_by_one(folder, title, limit=512) for title in titles], atol=1e-5)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similar = rows @ rows.T
    assert min(similar[0, 1], similar[2, 3]) > similar[:2, 2:].max() + 0.2
