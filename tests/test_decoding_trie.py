"""ItemTrie against a dictionary of prefixes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trie import ItemTrie

EOS = 0
index = st.lists(st.integers(1, 6), min_size=1, max_size=6).map(tuple)


def paths(trie: ItemTrie) -> dict[tuple[int, ...], int]:
    """Every path from the root to a node with an item, found through `children` alone."""
    found, front = {}, {(): 0}
    for depth in range(trie.levels):
        following = {}
        for path, node in front.items():
            children, real = trie.children(torch.tensor([node]), depth)
            assert real.shape == (1, trie.widths[depth])
            tokens = [int(trie.token[child]) for child in children[real]]
            assert tokens == sorted(set(tokens))
            following |= {(*path, token): int(child) for token, child in zip(tokens, children[real], strict=True)}
        front = following
        assert len(front) == trie.counts[depth + 1]
        found |= {path: int(trie.item[node]) for path, node in front.items() if trie.item[node] >= 0}
    return found


@settings(max_examples=150, deadline=None)
@given(st.lists(index, min_size=1, max_size=40))
def test_holds_every_index_once_under_its_lowest_item(rows):
    trie = ItemTrie(rows, EOS)
    wanted = {}
    for item, row in enumerate(rows):
        wanted.setdefault(row, item)
    assert paths(trie) == wanted
    assert trie.size == len(wanted)
    ends_early = any(row == other[: len(row)] and len(row) < len(other) for row in rows for other in rows)
    assert trie.has_early_ends == (ends_early or len({len(row) for row in wanted}) > 1)


@pytest.mark.parametrize("largest", [2**9, 2**40], ids=["one key", "too wide for one key"])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_any_form_and_any_token_numbers(largest, kind):
    if largest > 2**31 - 1:
        largest = 2**31 - 1  # four levels of 31 bits do not fit 63
    rows = np.random.default_rng(0).integers(1, largest, (300, 4))
    rows[50:60] = rows[:10]
    trie = ItemTrie(kind(rows.tolist()), EOS)
    assert paths(trie) == {tuple(row): item for item, row in reversed(list(enumerate(rows.tolist())))}


def test_memory_is_linear_in_the_items():
    rng = np.random.default_rng(0)
    sizes = {n: ItemTrie(rng.integers(1, 257, (n, 4)), EOS).nbytes for n in (10_000, 100_000)}
    assert sizes[100_000] < 11 * sizes[10_000]
    assert sizes[100_000] < 100_000 * 4 * 12 + 1000  # at most 12 bytes for every token of every item


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one item"),
        ([(1, 2), ()], "item 1 has an empty index"),
        ([(1, 2), (3, EOS)], "item 1 has the end-of-sequence token"),
        ([(1, -4)], "item 0 has a negative token"),
    ],
)
def test_refuses_what_is_no_catalogue(rows, message):
    with pytest.raises(ValueError, match=message):
        ItemTrie(rows, EOS)
