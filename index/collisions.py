"""From nearest codes to one index for each item: Sinkhorn rounds as in the original, then the nearest free index.

Everything works on latent vectors and codebooks in NumPy or torch on one device, and knows no network. An index's error
for an item is the squared distance between the item's latent vector and the sum of the index's codes.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from commands import InputError
from figures import collision_groups, index_keys
from models.quantiser import squared_distances
from models.sinkhorn import sinkhorn_codes

DEFAULT_EPSILON = 0.003  # of the rounds, where training used none on the last level
MAX_ROUNDS = 20
BATCH_NUMBERS = 2**18  # float64 numbers of Sinkhorn plans computed at once: what a processor's cache holds
EXACT_ITEMS = 512  # beyond so many items under one full prefix, the fallback is greedy (the exact one is cubic)
EXACT_CODES = 2**21


@dataclass
class Resolution:
    """What became of the items that collided.

    Attributes:
        codes: int64 (items, levels).
        colliding: items that share an index: with nearest codes, then after each Sinkhorn round.
        moved_by_rounds: items whose index the rounds changed.
        moved_on_last_level, moved_to_other_prefix: items moved to a free index; `greedy` of the latter not exactly.
        added_error: how much the moves to free indices raised the sum of squared distances.
        largest_added_error: the most that it raised for one item.
    """

    codes: np.ndarray
    colliding: list[int] = field(default_factory=list)
    moved_by_rounds: int = 0
    moved_on_last_level: int = 0
    moved_to_other_prefix: int = 0
    greedy: int = 0
    added_error: float = 0.0
    largest_added_error: float = 0.0


def nearest_codes(latents: torch.Tensor, codebooks: Sequence[torch.Tensor], batch_size: int = 8192) -> np.ndarray:
    """Level by level the code nearest to what is left: (items, dim) → int64 (items, levels)."""
    parts = []
    for rows in latents.split(batch_size):
        codes = []
        for book in codebooks:
            chosen = squared_distances(rows, book).argmin(-1)
            rows = rows - book[chosen]
            codes.append(chosen)
        parts.append(torch.stack(codes, -1).cpu())
    return torch.cat(parts).numpy()


def quantised(codes: np.ndarray, codebooks: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of each row's codes: (items, levels) → (items, dim)."""
    device = codebooks[0].device
    parts = (book[torch.from_numpy(codes[:, level]).to(device)] for level, book in enumerate(codebooks))
    return torch.stack(list(parts)).sum(0)


def squared_errors(latents: np.ndarray, codes: np.ndarray, codebooks: Sequence[np.ndarray]) -> np.ndarray:
    """Each row's squared distance to its index: float64 (rows,)."""
    return ((latents - sum(book[codes[:, level]] for level, book in enumerate(codebooks))) ** 2).sum(-1)


def sinkhorn_rounds(
    codes: np.ndarray,
    residuals: torch.Tensor,
    codebook: torch.Tensor,
    *,
    epsilon: float,
    iterations: int,
    max_rounds: int = MAX_ROUNDS,
) -> tuple[np.ndarray, list[int]]:
    """Assign each colliding group alone, as a batch of its own, by Sinkhorn on the last level, as long as items collide.

    Groups of equal size are computed together; the outcome is that of one after the other, as they have no item in common.
    A group that meets again (most do, where the rounds end in a cycle) gets what it got before.

    Args:
        codes: int64 (items, levels), nearest codes; not changed.
        residuals: (items, dim), what the earlier levels leave over.
        codebook: (K, dim) of the last level.
        epsilon, iterations: of Sinkhorn.

    Returns:
        new codes, and how many items collide at first and after each round.
    """
    codes = codes.copy()
    colliding = []
    known: dict[bytes, np.ndarray] = {}
    for done in range(max_rounds + 1):
        groups = collision_groups(codes)
        colliding.append(sum(map(len, groups)))
        if not groups or done == max_rounds:
            break
        by_size: dict[int, list[np.ndarray]] = {}
        for group in groups:
            if (before := known.get(group.tobytes())) is not None:
                codes[group, -1] = before
            else:
                by_size.setdefault(len(group), []).append(group)
        for size, members in by_size.items():
            step = max(1, BATCH_NUMBERS // (size * len(codebook)))
            for start in range(0, len(members), step):
                items = np.stack(members[start : start + step])
                distances = squared_distances(residuals[torch.from_numpy(items).to(residuals.device)], codebook)
                codes[items, -1] = sinkhorn_codes(distances, epsilon, iterations).cpu().numpy()
                known.update((group.tobytes(), codes[group, -1]) for group in items)
    return codes, colliding


class FreeIndices:
    """The indices that no item has, as gaps in the sorted list of those taken (an index is a mixed-radix number)."""

    def __init__(self, sizes: Sequence[int], taken: np.ndarray) -> None:
        self.sizes = list(sizes)
        self.room = [math.prod(self.sizes[depth:]) for depth in range(len(self.sizes) + 1)]
        self.taken = sorted({self.key(row) for row in taken.tolist()})
        self.added: list[int] = []  # apart, as inserting into a list of millions is slow

    def key(self, prefix: Sequence[int]) -> int:
        """The number of a prefix (codes of the first levels) among those of its length."""
        number = 0
        for size, code in zip(self.sizes, prefix, strict=False):
            number = number * size + code
        return number

    def _under(self, prefix: Sequence[int]) -> list[tuple[list[int], int, int]]:
        """Where the taken indices under `prefix` stand: (sorted list, first, last + 1) of either list."""
        first, room = self.key(prefix), self.room[len(prefix)]
        bounds = first * room, (first + 1) * room
        return [(keys, *(bisect.bisect_left(keys, bound) for bound in bounds)) for keys in (self.taken, self.added)]

    def has_room(self, prefix: Sequence[int]) -> bool:
        """Whether an index under `prefix` is free."""
        return sum(high - low for _, low, high in self._under(prefix)) < self.room[len(prefix)]

    def free_mask(self, prefix: Sequence[int]) -> np.ndarray:
        """bool (room,): the free indices under `prefix`, in order of the codes that follow it."""
        room = self.room[len(prefix)]
        first = self.key(prefix) * room
        mask = np.ones(room, dtype=bool)
        for keys, low, high in self._under(prefix):
            mask[[key - first for key in keys[low:high]]] = False
        return mask

    def take(self, index: Sequence[int]) -> None:
        """`index`, a free one, is no longer free."""
        bisect.insort(self.added, self.key(index))


def exact_assignment(rows: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """Different candidates for the rows with the least sum of squared distances.

    Args:
        rows: (m, dim).
        candidates: (n, dim).

    Returns:
        int64 (m,): each row's candidate; -1 for those left out where n < m.
    """
    chosen = np.full(len(rows), -1, dtype=np.int64)
    if len(rows) == 0 or len(candidates) == 0:
        return chosen
    cost = (rows**2).sum(1)[:, None] + (candidates**2).sum(1) - 2 * rows @ candidates.T
    columns = np.arange(len(candidates))
    if len(rows) < len(candidates):  # of the best assignment, each row's column is among its m nearest
        columns = np.unique(np.argpartition(cost, len(rows) - 1, axis=1)[:, : len(rows)])
        cost = cost[:, columns]
    taken_rows, taken_columns = linear_sum_assignment(cost)
    chosen[taken_rows] = columns[taken_columns]
    return chosen


def assign_free(
    codes: np.ndarray, latents: np.ndarray, codebooks: Sequence[np.ndarray], items: np.ndarray
) -> tuple[np.ndarray, int, int]:
    """Give `items` indices of their own, near their latent vectors; all others keep theirs.

    The items under one prefix (all levels but the last) get free last codes by an exact assignment; those that find the
    prefix full compete for the free last two codes under the prefix one level shorter, exactly too where they are few
    enough; what is left then takes, one by one, the nearest code that has room on each level. Ties and orders follow
    item ids, so equal input gives equal output.

    Args:
        codes: int64 (items of the catalogue, levels); not changed. Other items' rows must be free of collisions.
        latents: float64 (len(items), dim), of `items`.
        codebooks: float64 (K, dim) of each level.
        items: ids that need an index, ascending.

    Returns:
        new codes, how many of `items` found their prefix full, and how many of those were placed one by one.

    Raises:
        InputError: fewer indices than items.
    """
    sizes = [len(book) for book in codebooks]
    if len(items) == 0:
        return codes.copy(), 0, 0
    if len(codes) > math.prod(sizes):
        raise InputError(f"{len(codes)} items but only {math.prod(sizes)} indices; train with more levels or codes")
    codes = codes.copy()
    levels = codes.shape[1]
    others = np.ones(len(codes), dtype=bool)
    others[items] = False
    free = FreeIndices(sizes, codes[others])
    left = _assign_under(codes, latents, codebooks, free, items, np.arange(len(items)), levels - 1)
    full = len(left)
    if len(left) and levels > 1 and sizes[-1] * sizes[-2] <= EXACT_CODES:
        left = _assign_under(codes, latents, codebooks, free, items, left, levels - 2)
    for position in left:
        codes[items[position]] = _nearest_with_room(latents[position], codebooks, free)
        free.take(codes[items[position]].tolist())
    return codes, full, len(left)


def _assign_under(
    codes: np.ndarray,
    latents: np.ndarray,
    codebooks: Sequence[np.ndarray],
    free: FreeIndices,
    items: np.ndarray,
    positions: np.ndarray,
    depth: int,
) -> np.ndarray:
    """Assign `items[positions]` free codes from level `depth` on, prefix by prefix, in place; returns positions left."""
    tails = codebooks[depth]
    for book in codebooks[depth + 1 :]:
        tails = (tails[:, None, :] + book[None, :, :]).reshape(-1, tails.shape[1])
    prefixes = codes[items[positions], :depth]
    keys = index_keys(prefixes) if depth else np.zeros(len(positions), dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    groups = np.split(positions[order], np.flatnonzero(np.diff(keys[order])) + 1)
    left = [positions[:0]]
    for group in groups:
        if depth < codes.shape[1] - 1 and len(group) > EXACT_ITEMS:
            left.append(group)
            continue
        prefix = codes[items[group[0]], :depth].tolist()
        residuals = latents[group] - sum(codebooks[level][code] for level, code in enumerate(prefix))
        open_tails = np.flatnonzero(free.free_mask(prefix))
        chosen = exact_assignment(residuals, tails[open_tails])
        for position, choice in zip(group, chosen, strict=True):
            if choice >= 0:
                tail = np.unravel_index(open_tails[choice], [len(book) for book in codebooks[depth:]])
                codes[items[position], depth:] = tail
                free.take(codes[items[position]].tolist())
        left.append(group[chosen < 0])
    return np.sort(np.concatenate(left))


def _nearest_with_room(latent: np.ndarray, codebooks: Sequence[np.ndarray], free: FreeIndices) -> list[int]:
    """Level by level the nearest code under which an index is free."""
    index: list[int] = []
    for book in codebooks:
        order = np.argsort(((book - latent) ** 2).sum(1), kind="stable")
        code = next(int(code) for code in order if free.has_room([*index, int(code)]))
        index.append(code)
        latent = latent - book[code]
    return index


def resolve(
    latents: torch.Tensor,
    codebooks: Sequence[torch.Tensor],
    *,
    epsilon: float = DEFAULT_EPSILON,
    iterations: int = 50,
    max_rounds: int = MAX_ROUNDS,
    allow_conflicts: bool = False,
) -> Resolution:
    """Nearest codes, Sinkhorn rounds on the last level, then free indices for what still collides.

    Args:
        latents: (items, dim).
        codebooks: (K, dim) of each level, on the same device.
        epsilon, iterations, max_rounds: of the Sinkhorn rounds; above 0.
        allow_conflicts: stop after the rounds, as the original does.

    Raises:
        InputError: fewer indices than items (unless `allow_conflicts`).
    """
    nearest = nearest_codes(latents, codebooks)
    residuals = latents - quantised(nearest[:, :-1], codebooks[:-1]) if len(codebooks) > 1 else latents
    codes, colliding = sinkhorn_rounds(
        nearest, residuals, codebooks[-1], epsilon=epsilon, iterations=iterations, max_rounds=max_rounds
    )
    result = Resolution(codes, colliding, moved_by_rounds=int((codes != nearest).any(1).sum()))
    groups = collision_groups(codes)
    if allow_conflicts or not groups:
        return result
    items = np.sort(np.concatenate(groups))
    wide = latents[torch.from_numpy(items).to(latents.device)].cpu().double().numpy()
    books = [book.cpu().double().numpy() for book in codebooks]
    result.codes, full, result.greedy = assign_free(codes, wide, books, items)
    moved = items[(result.codes[items] != codes[items]).any(1)]
    result.moved_to_other_prefix = full
    result.moved_on_last_level = len(moved) - full
    added = squared_errors(wide, result.codes[items], books) - squared_errors(wide, codes[items], books)
    result.added_error, result.largest_added_error = float(added.sum()), float(added.max(initial=0.0))
    return result
