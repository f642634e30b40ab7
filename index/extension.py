"""New items for a catalogue that has an index: free combinations of the tokens that a trained recommender knows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from collisions import Resolution, assign_free, nearest_codes, quantised, squared_errors
from commands import InputError
from embeddings import Embeddings
from figures import collision_groups
from input_files import load_json
from methods import Options, latents_of, load_rqvae

TOKEN = re.compile(r"<([a-z])_(0|[1-9][0-9]{0,6})>")


def read_index(path: str | Path) -> np.ndarray:
    """The codes in an index file: int64 (items, levels).

    Raises:
        InputError: not an index file: keys not "0" … "n-1", tokens not `<a_1>` with a letter for each level.
    """
    content = load_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path}: expected a non-empty object {{"0": ["<a_1>", …], …}}')
    rows = []
    for item in range(len(content)):
        if str(item) not in content:
            raise InputError(f'{path}: has {len(content)} items but no key "{item}"; keys must run from "0"')
        tokens = content[str(item)]
        words = tokens if isinstance(tokens, list) else []
        matches = [TOKEN.fullmatch(word) if isinstance(word, str) else None for word in words]
        if not matches or any(m is None or m[1] != chr(ord("a") + level) for level, m in enumerate(matches)):
            raise InputError(
                f'{path}: item "{item}" has {str(tokens)[:80]!r}; expected tokens such as "<a_1>", "<b_2>", …'
            )
        rows.append([int(match[2]) for match in matches])
        if len(rows[-1]) != len(rows[0]):
            raise InputError(f'{path}: item "{item}" has {len(rows[-1])} tokens, item "0" has {len(rows[0])}')
    return np.array(rows, dtype=np.int64)


def mean_codebooks(latents: torch.Tensor, codes: np.ndarray) -> list[torch.Tensor]:
    """Vectors for the codes of an index whose codebooks are not at hand: the mean residual of the items that have it.

    Args:
        latents: (items, dim).
        codes: (items, levels), numbered without gaps on each level.
    """
    residual, books = latents, []
    for level in range(codes.shape[1]):
        chosen = torch.from_numpy(codes[:, level]).to(latents.device)
        counts = torch.bincount(chosen).unsqueeze(1)
        sums = torch.zeros(len(counts), latents.shape[1], device=latents.device).index_add_(0, chosen, residual)
        books.append(sums / counts)
        residual = residual - books[-1][chosen]
    return books


def extend(old: np.ndarray, embeddings: Embeddings, options: Options, source: str) -> Resolution:
    """Codes for all rows of `embeddings`: the first ones keep `old`, the others get free combinations of its codes.

    A new item gets the nearest combination; where that is taken, the nearest free one by the same exact assignment that
    resolves collisions.

    Args:
        old: int64 (old items, levels).
        embeddings: all items, the old ones first.
        options: with `ckpt_path` the RQ-VAE that made the old index; without, distances are taken between embeddings and
            the means of the items that have a code.
        source: the old index file's name, for messages.

    Raises:
        InputError: one level only, no new rows, rows that are not the old items', codes that the RQ-VAE lacks, or
            fewer free combinations than new items.
    """
    count = len(old)
    if old.shape[1] < 2:
        raise InputError(f"{source}: has one token an item (flat); a new item would need a token that no model knows")
    if len(embeddings) <= count:
        raise InputError(
            f"{embeddings.path}: has {len(embeddings)} rows, {source} {count} items; it must hold all items, old ones first"
        )
    used = [np.unique(old[:, level]) for level in range(old.shape[1])]
    dense = np.stack([np.searchsorted(codes, old[:, level]) for level, codes in enumerate(used)], axis=1)
    result = _nearest_free(dense, used, embeddings, options, source)
    result.codes = np.stack([codes[result.codes[:, level]] for level, codes in enumerate(used)], axis=1)
    assert np.array_equal(result.codes[:count], old)
    return result


def _nearest_free(
    dense: np.ndarray, used: list[np.ndarray], embeddings: Embeddings, options: Options, source: str
) -> Resolution:
    """`dense` (old items, levels), codes numbered within `used`, with rows of the same kind for the new items."""
    count = len(dense)
    if options.ckpt_path:
        model, _ = load_rqvae(options.ckpt_path, embeddings.device)
        books = [level.embedding.weight.detach() for level in model.rq.vq_layers]
        if len(books) != len(used) or any(codes[-1] >= len(book) for codes, book in zip(used, books, strict=True)):
            raise InputError(f"{source}: has codes that the RQ-VAE of {options.ckpt_path} does not have")
        books = [book[torch.from_numpy(codes).to(book.device)] for codes, book in zip(used, books, strict=True)]
        latents = latents_of(model, embeddings, options.batch_size)
    else:
        latents = torch.cat(list(embeddings.in_order(options.batch_size)))
        books = mean_codebooks(latents[:count], dense)
    _check_same_items(latents[:count], dense, books, embeddings, source)
    codes = np.concatenate([dense, nearest_codes(latents[count:], books)])
    groups = collision_groups(codes)
    pending = np.array(sorted(int(item) for group in groups for item in group if item >= count), dtype=np.int64)
    wide = latents[torch.from_numpy(pending).to(latents.device)].cpu().double().numpy()
    wide_books = [book.cpu().double().numpy() for book in books]
    new, full, greedy = assign_free(codes, wide, wide_books, pending)
    added = squared_errors(wide, new[pending], wide_books) - squared_errors(wide, codes[pending], wide_books)
    return Resolution(
        new,
        [len(pending)],
        moved_on_last_level=int((new != codes).any(1).sum()) - full,
        moved_to_other_prefix=full,
        greedy=greedy,
        added_error=float(added.sum()),
        largest_added_error=float(added.max(initial=0.0)),
    )


def _check_same_items(
    latents: torch.Tensor, codes: np.ndarray, books: list[torch.Tensor], embeddings: Embeddings, source: str
) -> None:
    """The old items' indices must lie nearer to their own rows than to other items' rows, on the whole."""
    vectors = quantised(codes, books)
    own = ((latents - vectors) ** 2).sum(-1).mean()
    others = ((latents.roll(1, 0) - vectors) ** 2).sum(-1).mean()
    if not own < 0.9 * others:
        raise InputError(
            f"{embeddings.path}: its first {len(codes)} rows are not the items of {source}; "
            "it must hold all items, the old ones first and in their order"
        )
