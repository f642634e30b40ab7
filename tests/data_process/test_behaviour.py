"""Behaviour beside text: co-occurrence counted by hand, held-out items without influence."""

import json

import numpy as np
import pytest
from toy_data import INTERS

from data_process import behaviour
from item_vectors import SHARPNESS
from utils import UserError


def test_cooccurrence_counts_near_pairs_by_their_distance():
    counts = behaviour.cooccurrence([[0, 1, 2], [2, 1], [3]], 4, window=2).toarray()
    expected = np.zeros((4, 4))
    for a, b, weight in ((0, 1, 1), (1, 2, 2), (0, 2, 0.5)):
        expected[a, b] = expected[b, a] = weight
    np.testing.assert_array_equal(counts, expected)
    assert behaviour.cooccurrence([[0, 1, 2]], 3, window=1).toarray()[0, 2] == 0


def test_items_that_occur_together_are_alike_and_others_say_nothing():
    counts = behaviour.cooccurrence([[0, 1], [2, 3], [0, 1], [3, 2]], 6, window=5)
    rows = behaviour.unit_rows(behaviour.factors(counts, 2))
    assert rows[0] @ rows[1] == pytest.approx(1) and rows[2] @ rows[3] == pytest.approx(1)
    assert rows[0] @ rows[2] < 0
    assert not rows[4:].any()


def test_items_that_met_few_borrow_from_items_of_like_text():
    text = behaviour.unit_rows(np.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]]))
    own = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    degrees = np.array([3.0, 0.0, 1.0, 2.0])
    rows = behaviour.lent(own, text, degrees)
    known = [0, 2, 3]
    means = np.zeros((4, 2))
    for item in range(4):
        for other in known:
            if other != item:
                means[item] += np.exp(SHARPNESS * text[item] @ text[other]) * own[other]
    means = behaviour.unit_rows(means)
    for item, degree in enumerate(degrees):
        expected = degree / (1 + degree) * own[item] + means[item] / (1 + degree)
        np.testing.assert_allclose(rows[item], expected / np.linalg.norm(expected), atol=1e-9)


def joined(toy, name, *more):
    text = toy / "text.npy"
    np.save(text, np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32))
    target = toy / f"{name}.npy"
    flags = ["--data_path", str(toy), "--dataset", "Toy", "--text", str(text), "--output_file", str(target)]
    behaviour.main([*flags, "--width", "2", *more])
    return np.load(target)


def test_both_parts_have_their_length_and_held_out_items_play_no_part(toy):
    first = joined(toy, "a", "--weight", "0.5")
    assert first.shape == (6, 7) and first.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(first[:, :5], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(first[:, 5:], axis=1), 0.5, rtol=1e-5)
    changed = {user: [*items[:-2], *items[-2:][::-1]] for user, items in INTERS.items()}
    (toy / "Toy" / "Toy.inter.json").write_text(json.dumps(changed))
    np.testing.assert_array_equal(joined(toy, "b", "--weight", "0.5"), first)


@pytest.mark.parametrize(
    ("more", "words"),
    [(["--width", "0"], "--width"), (["--window", "0"], "--window"), (["--text", "no.npy"], "no.npy: no such file")],
)
def test_mistakes_are_named(toy, more, words):
    with pytest.raises(UserError, match=words):
        joined(toy, "c", *more)
    assert not (toy / "c.npy").exists()


def test_nothing_is_overwritten_unasked(toy):
    joined(toy, "d")
    with pytest.raises(UserError, match="--overwrite"):
        joined(toy, "d")
    joined(toy, "d", "--overwrite")
