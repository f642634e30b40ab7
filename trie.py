"""All item indices as one prefix tree of flat tensors. It knows nothing of models or tokenizers: token ids in, nodes out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ItemTrie:
    """All item indices as one prefix tree of flat tensors; its memory is linear in the number of items.

    Nodes are numbered level by level, siblings by token, the root is 0; so the children of node `n` are the nodes
    `first_child[n] … first_child[n + 1] - 1`.

    Attributes:
        token: int32 `(nodes,)`, the token that leads into the node (-1 for the root).
        first_child: int32 (int64 from 2³¹ nodes on) `(nodes + 1,)`.
        item: int32 `(nodes,)`, the item whose index ends at the node, -1 where none does. Of items that share an index
            it is the one with the lowest id.
        widths: by depth, the most children that a node there has; `widths[0]` is the root's.
        counts: by depth, the number of nodes there; `counts[0]` is 1.
        size: the number of distinct indices.
        eos: the token that ends an index; None: an index ends by itself, and nothing is added to its score.
    """

    def __init__(self, sequences: Sequence[Sequence[int]] | np.ndarray | Tensor, eos: int | None):
        """Build the tree.

        Args:
            sequences: item id → its token ids: a list of tuples (any lengths from 1) or an integer array `(items, levels)`.
            eos: the id of the end-of-sequence token, which may not occur within a sequence; None for none.

        Raises:
            ValueError: there are no items, or a sequence is empty or has a negative token or `eos` in it; without `eos`,
                also if one sequence is the beginning of another.
        """
        rows, lengths = _as_rows(sequences)
        if rows.size == 0:
            raise ValueError("an item trie needs at least one item with at least one token")
        inside = np.arange(rows.shape[1]) < lengths[:, None] if lengths is not None else None
        for what, token in (("a negative token", None), ("the end-of-sequence token", eos)):
            wrong = rows < 0 if token is None else rows == token
            wrong = wrong if inside is None else wrong & inside
            if wrong.any():
                raise ValueError(f"item {int(wrong.any(1).argmax())} has {what} in its index")
        if lengths is not None and (lengths == 0).any():
            raise ValueError(f"item {int((lengths == 0).argmax())} has an empty index")
        self.eos = None if eos is None else int(eos)
        self._build(rows, lengths)
        if eos is None and bool(((self.item >= 0) & (self.first_child[1:] > self.first_child[:-1])).any()):
            raise ValueError("without an end-of-sequence token no index may be the beginning of another")

    def _build(self, rows: np.ndarray, lengths: np.ndarray | None) -> None:
        order = _sorted_order(rows)
        tokens, degrees, items = [np.array([-1], np.int32)], [], [np.array([-1], np.int32)]
        self.widths, self.counts = [], [1]
        parent = np.zeros(len(rows), np.int32)  # by sorted row: its node at the depth above, counted within that depth
        for depth in range(rows.shape[1]):
            if lengths is not None:  # indices that are complete end here
                alive = lengths[order] > depth
                order, parent = order[alive], parent[alive]
            column = rows[order, depth]
            new = np.empty(len(column), bool)
            new[0] = True
            np.not_equal(column[1:], column[:-1], out=new[1:])
            new[1:] |= parent[1:] != parent[:-1]
            starts = np.flatnonzero(new)
            degree = np.bincount(parent[starts], minlength=self.counts[-1]).astype(np.int32)
            parent = np.cumsum(new, dtype=np.int32) - 1
            ends = slice(None) if lengths is None else lengths[order] == depth + 1
            item = np.full(len(starts), -1, np.int32)
            if lengths is not None or depth == rows.shape[1] - 1:
                # the order is stable, so of equal indices the lowest id comes first: write it last
                item[parent[ends][::-1]] = order[ends][::-1]
            tokens.append(column[starts].astype(np.int32))
            degrees.append(degree)
            items.append(item)
            self.widths.append(int(degree.max()))
            self.counts.append(len(starts))
        nodes = sum(self.counts)
        first = np.ones(nodes + 1, np.int32 if nodes < 2**31 else np.int64)
        degrees.append(np.zeros(self.counts[-1], np.int32))
        np.cumsum(np.concatenate(degrees), out=first[1:])
        np.add(first[1:], 1, out=first[1:])
        self.token = torch.from_numpy(np.concatenate(tokens))
        self.item = torch.from_numpy(np.concatenate(items))
        self.first_child = torch.from_numpy(first)
        self.widths.append(0)
        self.size = int((self.item >= 0).sum())
        self.has_early_ends = bool((self.item[: nodes - self.counts[-1]] >= 0).any())

    @property
    def levels(self) -> int:
        """The length of the longest index."""
        return len(self.counts) - 1

    @property
    def nbytes(self) -> int:
        """The memory of the tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.token, self.first_child, self.item))

    def to(self, device: torch.device | str) -> ItemTrie:
        """Move the tensors to `device` (in place); returns the trie."""
        self.token, self.first_child = self.token.to(device), self.first_child.to(device)
        self.item = self.item.to(device)
        return self

    def children(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """The children of `nodes`, which all lie at `depth`.

        Args:
            nodes: int64 `(…,)`.

        Returns:
            int64 `(…, widths[depth])`: the children's node numbers (padding: 0), and bool of the same shape: real ones.
        """
        first = self.first_child[nodes].long()
        degree = self.first_child[nodes + 1].long() - first
        offset = torch.arange(self.widths[depth], device=nodes.device)
        real = offset < degree[..., None]
        return torch.where(real, first[..., None] + offset, 0), real


def _as_rows(sequences: Sequence[Sequence[int]] | np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray | None]:
    """Sequences as an integer array `(items, levels)`, and their lengths where they differ (rows padded with -1)."""
    if isinstance(sequences, Tensor):
        sequences = sequences.cpu().numpy()
    if isinstance(sequences, np.ndarray):
        if sequences.ndim != 2:
            raise ValueError(f"indices must be an array (items, levels), not one of {sequences.ndim} dimensions")
        return sequences, None
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    if len(lengths) == 0:
        return np.empty((0, 1), np.int64), None
    if lengths.min() == lengths.max():
        return np.array(sequences, np.int64), None
    rows = np.full((len(lengths), int(lengths.max())), -1, np.int64)
    rows[np.arange(rows.shape[1]) < lengths[:, None]] = np.concatenate([np.asarray(row, np.int64) for row in sequences])
    return rows, lengths


def _sorted_order(rows: np.ndarray) -> np.ndarray:
    """Item numbers in lexicographic order of their rows, equal rows by item number."""
    lowest, highest = rows.min(axis=0), rows.max(axis=0)
    bits = [int(high - low).bit_length() for low, high in zip(lowest, highest, strict=True)]
    if sum(bits) > 63:
        return np.lexsort(rows.T[::-1])
    key = np.zeros(len(rows), np.int64)  # the whole row in one number: one sort instead of one per level
    for level, width in enumerate(bits):
        key <<= width
        key += rows[:, level] - lowest[level]
    return torch.sort(torch.from_numpy(key), stable=True).indices.numpy()
