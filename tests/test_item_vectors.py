"""Items that stand for others: the likest most often, never the item itself, the share asked for; training parts alone."""

from collections import Counter

import numpy as np
import pytest
from toy_data import INDEX, INTERS

from data import load_data
from item_vectors import SHARPNESS, ItemSwap, read_item_vectors
from prompt import Prompts, Template
from samples import TrainSet
from tasks import HistoryFormat
from utils import UserError


def test_vectors_are_centred_and_of_length_one(tmp_path):
    rows = np.random.default_rng(0).normal(size=(7, 3)) + 5
    np.save(tmp_path / "rows.npy", rows)
    found = read_item_vectors(tmp_path / "rows.npy", 7)
    expected = rows - rows.mean(axis=0)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="a row of finite numbers for each of the 8 items"):
        read_item_vectors(tmp_path / "rows.npy", 8)


def test_items_are_drawn_by_their_likeness():
    angles = np.radians([0, 10, 30, 90])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    swap, rng, count = ItemSwap(vectors, 0.25), np.random.default_rng(0), 40_000
    found = Counter(swap([0] * count, rng))
    weights = np.exp(SHARPNESS * vectors[1:] @ vectors[0])
    assert found[0] / count == pytest.approx(0.75, abs=0.01)
    for item, weight in enumerate(weights / weights.sum(), 1):
        assert found[item] / count == pytest.approx(0.25 * weight, abs=0.01)


def test_only_the_training_parts_are_swapped_and_anew_in_each_epoch(toy):
    data = load_data(str(toy), "Toy")
    prompts = Prompts("{instruction}{response}", {"seqrec": [Template("{inters}", "{item}")]})
    swap = ItemSwap(np.eye(6, dtype=np.float32), 0.5)
    train = TrainSet(data, prompts, [("seqrec", 1, 0)], HistoryFormat(his_sep=""), history_windows=True, swap=swap)
    plain = ["".join("".join(INDEX[str(item)]) for item in items[:-2]) for items in INTERS.values() if len(items) > 3]
    seen = set()
    for epoch in range(8):
        train.set_epoch(epoch)
        texts = [train[i]["prompt"] + train[i]["response"] for i in range(len(train))]
        assert [text.count("<a_") for text in texts] == [text.count("<a_") for text in plain]
        seen.add(tuple(texts))
    assert len(seen) > 4 and data.inters == INTERS
