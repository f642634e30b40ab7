"""Tokens from the store are the tokenizer's own, whatever the text, the order, the crash and the company."""

from __future__ import annotations

import io
import multiprocessing
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_tokenizer, write_dataset
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers

import token_store
from arguments import TASKS
from collator import TrainCollator
from data import HistoryFormat, TrainSet, load_data
from prompt import load_prompts
from token_store import TokenStore

ITEMS = ["<a_1>", "<a_12>", "<b_3>", "<ab_0>"]


def legacy_llama(prepend: object) -> object:
    """A sentencepiece-like tokenizer as LLaMA's were converted: `prepend` puts the blank in front of a text."""
    tokenizer = make_tokenizer("sentencepiece")
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([*([prepend] if prepend else []), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    return tokenizer


def always() -> object:
    tokenizer = make_tokenizer("sentencepiece")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


KINDS = {
    "first": lambda: make_tokenizer("sentencepiece"),
    "always": always,
    "legacy": lambda: legacy_llama(normalizers.Prepend("▁")),
    "no blank": lambda: legacy_llama(None),
    "bpe": lambda: make_tokenizer("bpe"),
    "bpe with bos": lambda: make_tokenizer("bpe with bos"),
}


def with_items(tokenizer: object) -> object:
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ITEMS])
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request) -> object:
    return with_items(KINDS[request.param]())


@pytest.fixture
def bpe() -> object:
    return with_items(make_tokenizer("bpe"))


@pytest.fixture(scope="module")
def shared(tokenizer, tmp_path_factory) -> TokenStore:
    return TokenStore(tokenizer, tmp_path_factory.mktemp("store"))


def wanted(tokenizer: object, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


parts = st.one_of(
    st.sampled_from(
        [*ITEMS, "<a_2>", "<a_", "_1>", "<", ">", " ", "  ", ", ", "\n", "▁", "", "<s>", "</s>", "<|end|>"]
    ),
    st.sampled_from(["red pen", " steel", "box. ", "1. ", "Response:", "日本", "é", "\u00a0", "\x00", "'s", "<A_1>"]),
    st.text(max_size=6),
)
texts = st.lists(st.lists(parts, max_size=8).map("".join), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(texts=texts)
def test_any_text_has_the_tokenizers_own_tokens(tokenizer, shared, texts):
    shared._short.clear()  # read from the file what it has
    assert shared.encode(texts) == wanted(tokenizer, texts)
    assert shared.encode(texts[::-1]) == wanted(tokenizer, texts[::-1])


SOME = [
    "The red pen <a_1><b_3>, <a_12><b_3>. Next?",
    "<a_1>",
    "<a_1> and a rather long piece of text that is no separator",
]


def test_each_text_is_tokenised_once_and_a_later_run_finds_it(bpe, tmp_path):
    store = TokenStore(bpe, tmp_path)
    assert store.encode(SOME) == wanted(bpe, SOME)
    pieces = store.tokenised
    assert pieces == 4  # "The red pen ", ", ", ". Next?", " and a rather …"
    assert store.encode(SOME * 2) == wanted(bpe, SOME * 2)
    assert store.tokenised == pieces

    again = TokenStore(bpe, tmp_path)
    again._tokenise = None  # whoever asks it fails
    assert again.encode(SOME) == wanted(bpe, SOME)
    assert (again.tokenised, again.found) == (0, pieces)
    assert len(list(tmp_path.rglob("*.tokens"))) == 1  # it had nothing to write


def test_stores_side_by_side_find_what_the_others_have_written(bpe, tmp_path):
    one, two = TokenStore(bpe, tmp_path), TokenStore(bpe, tmp_path)
    one.encode(SOME[:1])
    two.encode(SOME[2:])
    one.refresh()
    two.refresh()
    counts = one.tokenised, two.tokenised
    assert one.encode(SOME) == two.encode(SOME) == wanted(bpe, SOME)
    assert (one.tokenised, two.tokenised) == counts
    one.encode(["something <a_1> else"])  # its file grows
    two.refresh()
    two._tokenise = None
    assert two.encode(["something <a_1> else"]) == wanted(bpe, ["something <a_1> else"])


def test_another_tokenizer_has_a_place_of_its_own(bpe, tmp_path):
    TokenStore(bpe, tmp_path).encode(SOME)
    other = with_items(make_tokenizer("bpe with bos"))
    store = TokenStore(other, tmp_path)
    assert store.encode(SOME) == wanted(other, SOME)
    assert store.tokenised == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_cut_off_or_damaged_is_tokenised_again(bpe, tmp_path):
    TokenStore(bpe, tmp_path / "whole").encode(SOME)
    file = next((tmp_path / "whole").rglob("*.tokens"))
    content = file.read_bytes()
    draw = random.Random(0)
    damages = [content[:n] for n in range(0, len(content), 7)]
    damages += [content[: 4 * n] + bytes(len(content) - 4 * n) for n in range(len(content) // 4)]  # lost pages
    damages += [
        bytes(b ^ 255 if i == n else b for i, b in enumerate(content)) for n in draw.sample(range(len(content)), 60)
    ]
    again = 0
    for number, damage in enumerate(damages):
        folder = tmp_path / str(number)
        (folder / file.parent.name).mkdir(parents=True)
        (folder / file.parent.name / file.name).write_bytes(damage)
        store = TokenStore(bpe, folder)
        assert store.encode(SOME) == wanted(bpe, SOME)
        again += store.tokenised > 0
    # every cut loses at least the last record; a damaged byte of a hash loses that record alone
    assert again == len(damages)


def test_a_place_that_cannot_be_written_is_said_and_training_goes_on(bpe, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    store = TokenStore(bpe, tmp_path / "file")
    assert store.encode(SOME) == store.encode(SOME) == wanted(bpe, SOME)
    assert capsys.readouterr().out.count("no more tokens are kept there") == 1


def test_a_disk_that_fills_up_is_said_and_training_goes_on(bpe, tmp_path, capsys, monkeypatch):
    store = TokenStore(bpe, tmp_path)
    store.encode(SOME[:1])

    class Full(io.FileIO):
        def write(self, content: bytes) -> int:
            return super().write(content[:10])

    monkeypatch.setattr(token_store, "open", lambda path, mode, **more: Full(path, mode), raising=False)
    assert store.encode(SOME) == store.encode(SOME) == wanted(bpe, SOME)
    assert "No space left on device" in capsys.readouterr().out
    assert TokenStore(bpe, tmp_path).encode(SOME) == wanted(bpe, SOME)


def test_files_that_somebody_removes_are_missed_but_do_not_stop_the_training(bpe, tmp_path, capsys):
    store = TokenStore(bpe, tmp_path)
    store.encode(SOME[:1])
    shutil.rmtree(store.folder)
    assert store.encode(SOME) == store.encode(SOME) == wanted(bpe, SOME)
    assert "no more tokens are kept there (No such file" in capsys.readouterr().out
    store.refresh()
    assert store.encode(SOME) == wanted(bpe, SOME)


def encode_in(store: TokenStore, texts: list[str], queue: object) -> None:
    queue.put((store.encode(texts), str(store._own.path)))


def test_a_forked_process_writes_a_file_of_its_own(bpe, tmp_path):
    store = TokenStore(bpe, tmp_path)
    store.encode(SOME[:1])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=encode_in, args=(store, SOME, queue))
    child.start()
    ids, path = queue.get(timeout=60)
    child.join()
    assert ids == wanted(bpe, SOME) == store.encode(SOME)
    assert Path(path) != store._own.path


def test_padding_and_cutting_set_elsewhere_play_no_part(bpe, tmp_path):
    expected = wanted(bpe, SOME)
    bpe.backend_tokenizer.enable_truncation(3)
    bpe.backend_tokenizer.enable_padding(length=64)
    assert TokenStore(bpe, tmp_path).encode(SOME) == expected


def test_the_library_and_the_format_are_part_of_the_place(bpe, tmp_path, monkeypatch):
    places = [TokenStore(bpe, tmp_path).folder]
    monkeypatch.setattr(token_store.tokenizers, "__version__", "0.0.1")
    places.append(TokenStore(bpe, tmp_path).folder)
    monkeypatch.setattr(token_store, "MAGIC", b"LC-Rec tokens 0\n")
    places.append(TokenStore(bpe, tmp_path).folder)
    assert len(set(places)) == 3


def test_an_epoch_begins_with_a_look_at_what_others_have_written(bpe, tmp_path):
    from types import SimpleNamespace

    from training import Epochs

    one, two = TokenStore(bpe, tmp_path), TokenStore(bpe, tmp_path)
    one.encode(SOME)
    two._tokenise = None
    epochs = Epochs(SimpleNamespace(set_epoch=lambda epoch: None), two)
    epochs.on_epoch_begin(None, SimpleNamespace(epoch=1.0), None)
    assert two.encode(SOME) == wanted(bpe, SOME)


def test_files_that_cannot_be_mapped_do_not_grow_without_end(bpe, tmp_path, capsys, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(token_store.np, "memmap", refuse)
    store = TokenStore(bpe, tmp_path)
    for _ in range(3):
        assert store.encode(SOME) == wanted(bpe, SOME)
    assert capsys.readouterr().out.count("no more tokens are kept there") == 1
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.tokens"))
    store.encode(SOME)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.tokens")) == size


FLAWS = {
    "is not a fast": lambda: object(),
    "has no item tokens": lambda: make_tokenizer("bpe"),
    "splits special tokens": lambda: with_items(flawed(split=True)),
    "'><b' may overlap": lambda: flawed("><b"),
    "'x<a_' may overlap": lambda: flawed("x<a_"),
    "'<a_1>x' may overlap": lambda: flawed("<a_1>x"),
    "does not find <b_7> everywhere": lambda: flawed("<b_7>", normalized=True),
    "does not find <b_4> everywhere": lambda: flawed("<b_4>", lstrip=True),
    "does not find <b_5> everywhere": lambda: flawed("<b_5>", rstrip=True),
    "does not find <b_6> everywhere": lambda: flawed("<b_6>", single_word=True),
    "cannot be copied": lambda: flawed(python=True),
}


def flawed(token: str = "", split: bool = False, python: bool = False, **properties: bool) -> object:
    tokenizer = make_tokenizer("bpe")
    if token:
        tokenizer.add_tokens([AddedToken(token, **({"normalized": False} | properties))])
    tokenizer.split_special_tokens = split
    with_items(tokenizer)
    if python:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(object())
    return tokenizer


@pytest.mark.parametrize("reason", FLAWS)
def test_tokenizers_whose_texts_do_not_come_apart_are_refused(tmp_path, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        TokenStore(FLAWS[reason](), tmp_path)


def test_other_tokens_with_brackets_are_no_reason_to_refuse(tmp_path):
    tokenizer = with_items(flawed("▁<PRE>"))
    assert TokenStore(tokenizer, tmp_path).encode(SOME) == wanted(tokenizer, SOME)


def test_the_check_finds_a_tokenizer_that_reads_across_item_tokens(bpe, tmp_path):
    class Other:
        """Stands for a tokenizer that is more than its backend."""

        def __call__(self, texts: list[str], **more: object) -> dict[str, list[list[int]]]:
            return bpe([text.replace(" <a_1>", "<a_1>") for text in texts], **more)

    store = TokenStore(bpe, tmp_path)
    store.check(bpe, SOME)
    with pytest.raises(ValueError):
        store.check(Other(), SOME)


@pytest.mark.parametrize("packing", [False, True])
def test_batches_are_the_same_with_and_without_a_store(tokenizer, tmp_path, packing, monkeypatch):
    monkeypatch.setattr(token_store, "MOST_SHORT", 2)  # almost all from the file
    data = load_data(str(write_dataset(tmp_path / "data")), "Toy", need_users=True)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in data.item_tokens])
    tokenizer.pad_token_id = 0
    train = TrainSet(data, load_prompts(None), [(task, 2, 0) for task in TASKS], HistoryFormat())
    plain = TrainCollator(tokenizer, 100, True, packing, list(TASKS))
    stored = TrainCollator(tokenizer, 100, True, packing, list(TASKS), store=TokenStore(tokenizer, tmp_path / "store"))
    order = list(range(len(train)))
    for epoch in range(3):
        train.set_epoch(epoch)
        random.Random(epoch).shuffle(order)
        for start in range(0, len(order), 7):
            samples = [train[i] for i in order[start : start + 7]]
            one, other = plain(samples), stored(samples)
            assert one.keys() == other.keys()
            assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
    assert stored.store.found > stored.store.tokenised
