"""Put behaviour beside text: item embeddings that also say which items follow each other in the training histories.

    python data_process/behaviour.py --data_path ./data --dataset Games --text ./data/Games/Games.emb-minilm-td.npy \\
        --output_file ./data/Games/Games.emb-behaviour.npy

index/ takes the file like any other embedding (`--data_path`). It holds the text embedding and, beside it, the leading
eigenvectors of the items' co-occurrence within a window of the training parts (`items[:-2]`), nearer pairs counting more;
both are centred and each row of both has length 1. What met few or no others borrows from items of like text. Validation
and test items play no part. In the spirit of LETTER (arXiv 2405.07314), which aligns item codes with collaborative
embeddings; the paper's own indices come from text alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import eigsh

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from data import read_inters, read_items
from flag_values import array_file, plain_name, real, whole
from item_vectors import neighbours
from provenance import note_made, record_path, refuse_input
from utils import UserError, atomic_path, run_main, say

# Of the mean degree, added to every degree: without it pairs that met nobody else fill the leading vectors.
SMOOTHING = 0.5


def cooccurrence(histories: list[list[int]], n_items: int, window: int) -> sparse.csr_matrix:
    """How often items occur near each other: symmetric float64 (items, items); a pair k steps apart counts 1 / k.

    Args:
        histories: item ids, oldest first.
        window: the most steps between two items of a pair.
    """
    rows, columns, weights = [], [], []
    for items in histories:
        for step in range(1, min(window, len(items) - 1) + 1):
            rows += items[:-step]
            columns += items[step:]
            weights += [1 / step] * (len(items) - step)
    half = sparse.csr_matrix((weights, (rows, columns)), shape=(n_items, n_items))
    return half + half.T


def factors(counts: sparse.csr_matrix, width: int) -> np.ndarray:
    """The leading eigenvectors of the degree-normalised `counts`, times the root of their eigenvalues: float64 (items, width).

    Items that met no other have zeros. Eigenvalues below 0 tell items apart that do occur together, and are left out.
    """
    degrees = np.asarray(counts.sum(axis=1)).ravel()
    scale = sparse.diags(1 / np.sqrt(degrees + SMOOTHING * degrees.mean()))
    values, vectors = eigsh(scale @ counts @ scale, k=width, which="LA", v0=np.ones(len(degrees)))
    return vectors * np.sqrt(values.clip(min=0))


def lent(behaviour: np.ndarray, text: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Behaviour of which the less comes from an item itself the fewer others it met, and the rest from items of like text.

    A share of `1 / (1 + degree)` is the mean of the item's nearest ten by text among those that met any. Without it new items,
    which met none, would be alike in just that, and no model could know their codes.

    Args:
        behaviour: unit rows (items, width), zeros where an item met no other.
        text: unit rows (items, dim).
        degrees: how many others each item met, nearer ones counting more: (items,).

    Returns:
        unit rows (items, width).
    """
    nearest, weights = neighbours(text, np.flatnonzero(degrees > 0))
    means = unit_rows((weights[:, :, None] * behaviour[nearest]).sum(axis=1))
    own = (degrees / (1 + degrees))[:, None]
    rows = own * behaviour + (1 - own) * means
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Rows centred and scaled to length 1; rows of zeros, which say nothing, stay so and do not count for the mean."""
    told = np.abs(vectors).max(axis=1) > 1e-9
    rows = np.where(told[:, None], vectors - vectors[told].mean(axis=0), 0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)


def text_embeddings(path: Path, n_items: int) -> np.ndarray:
    """The text embeddings, (items, dim). Raises UserError if there are none for these items."""
    from reading import read_array

    text = read_array(path)
    if text.ndim != 2 or len(text) != n_items or not np.isfinite(text).all():
        raise UserError(f"--text {path}: needed: one array with a row for each of the {n_items} items")
    return text


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data_path", required=True, help="folder that holds <dataset>/")
    parser.add_argument("--dataset", type=plain_name, required=True, help="name of the dataset")
    parser.add_argument("--text", required=True, type=Path, help="text embeddings (data_process/embed.py)")
    parser.add_argument("--output_file", required=True, type=array_file, help=".npy to write")
    parser.add_argument("--width", type=whole(1), default=64, help="numbers that tell of behaviour, at most")
    parser.add_argument("--window", type=whole(1, 10**6), default=5, help="steps between two items of a pair at most")
    parser.add_argument(
        "--weight", type=real(0, below=1e9, above_low=True), default=1.0, help="length of that part; the text's is 1"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    args = parser.parse_args(argv)
    refuse_input([args.output_file], [args.text])
    if args.output_file.exists() and not args.overwrite:
        raise UserError(f"{args.output_file}: is there already; give --overwrite to replace it")
    record = record_path(args.data_path, args.dataset)
    stem = Path(args.data_path) / args.dataset / args.dataset
    n_items = len(read_items(Path(f"{stem}.item.json"))[0])
    histories = [items[:-2] for items in read_inters(Path(f"{stem}.inter.json"), n_items).values()]
    counts = cooccurrence(histories, n_items, args.window)
    degrees = np.asarray(counts.sum(axis=1)).ravel()
    if not degrees.any():
        raise UserError(f"{stem}.inter.json: no two items of a training part lie within --window {args.window}")
    text = unit_rows(text_embeddings(args.text, n_items))
    behaviour = lent(unit_rows(factors(counts, min(args.width, n_items - 1))), text, degrees)
    joined = np.hstack([text, args.weight * behaviour])
    with atomic_path(args.output_file) as temporary, open(temporary, "wb") as file:
        np.save(file, joined.astype(np.float32))
    inputs = [Path(f"{stem}.item.json"), Path(f"{stem}.inter.json"), args.text]
    note_made(record, "data_process/behaviour.py", [args.output_file], inputs, ("numpy", "scipy"))
    alone = int((degrees == 0).sum())
    say(f"{args.output_file}: {n_items} items, {joined.shape[1]} numbers each; {alone} items met no other in training")


if __name__ == "__main__":
    run_main(main)
