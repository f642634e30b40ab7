"""The ways to make an index that papers compare, behind one interface: embeddings in, codes and figures out.

`rqvae` is LC-Rec's; `rqkmeans` runs residual k-means on the embeddings themselves; `random` gives random unique codes;
`flat` one token an item (the vanilla ID).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from checkpoints import best_checkpoint, load_checkpoint, model_from_checkpoint
from collisions import DEFAULT_EPSILON, MAX_ROUNDS, Resolution, quantised, resolve
from commands import InputError
from embeddings import Embeddings
from main import training_parser as training_flags
from models.kmeans import kmeans_centers
from models.quantiser import squared_distances
from models.rqvae import RQVAE
from start import SAMPLE


@dataclass
class Options:
    """What the methods may need; names as in the flags of generate_indices.py."""

    ckpt_path: str = ""
    num_emb_list: Sequence[int] = (256, 256, 256, 256)
    kmeans_iters: int = 100
    seed: int = 2024
    batch_size: int = 4096
    max_rounds: int = MAX_ROUNDS
    allow_conflicts: bool = False


@dataclass
class Index:
    """An index and what is known of it.

    Attributes:
        sizes: codes of each level.
        resolution: the codes, and what became of collisions.
        reconstruction_mse: of the embeddings from the index alone, mean over all numbers; None for `random`, `flat`.
        source: for the report, where it came from.
    """

    sizes: list[int]
    resolution: Resolution
    reconstruction_mse: float | None = None
    source: dict[str, object] = field(default_factory=dict)


def load_rqvae(ckpt_path: str, device: torch.device) -> tuple[RQVAE, dict[str, object]]:
    """The RQ-VAE of a checkpoint, run folder or `--ckpt_dir`, ready to encode, and the checkpoint's content.

    Raises:
        InputError: none there, or not a sound one.
    """
    path = best_checkpoint(ckpt_path)
    content = load_checkpoint(path)
    content["args"] = training_flags().recorded(content["args"], path)
    return model_from_checkpoint(content, path).to(device).eval(), {**content, "path": path}


@torch.no_grad()
def latents_of(model: RQVAE, embeddings: Embeddings, batch_size: int) -> torch.Tensor:
    """Latent vectors of all items, float32 (items, e_dim), on the model's device.

    Raises:
        InputError: the rows have another width than the model takes.
    """
    if embeddings.dim != model.in_dim:
        raise InputError(f"{embeddings.path}: rows are {embeddings.dim} wide, the RQ-VAE takes {model.in_dim}")
    return torch.cat([model.encoder(x) for x in embeddings.in_order(batch_size)])


@torch.no_grad()
def _mean_squared_error(
    embeddings: Embeddings,
    codes: np.ndarray,
    codebooks: Sequence[torch.Tensor],
    decode: Callable[[torch.Tensor], torch.Tensor],
    batch_size: int,
) -> float:
    total, start = 0.0, 0
    for x in embeddings.in_order(batch_size):
        total += float(((decode(quantised(codes[start : start + len(x)], codebooks)) - x).double() ** 2).sum())
        start += len(x)
    return total / (len(embeddings) * embeddings.dim)


def index_of(model: RQVAE, embeddings: Embeddings, options: Options) -> Index:
    """The index of a trained RQ-VAE at hand (in evaluation mode, on the embeddings' device)."""
    codebooks = [level.embedding.weight.detach() for level in model.rq.vq_layers]
    last = model.rq.vq_layers[-1]
    resolution = resolve(
        latents_of(model, embeddings, options.batch_size),
        codebooks,
        epsilon=last.sk_epsilon or DEFAULT_EPSILON,
        iterations=last.sk_iters,
        max_rounds=options.max_rounds,
        allow_conflicts=options.allow_conflicts,
    )
    error = _mean_squared_error(embeddings, resolution.codes, codebooks, model.decoder, options.batch_size)
    return Index([len(book) for book in codebooks], resolution, error)


def rqvae(embeddings: Embeddings, options: Options) -> Index:
    """The index of a trained RQ-VAE (`options.ckpt_path`)."""
    if not options.ckpt_path:
        raise InputError("--ckpt_path: --method rqvae needs the checkpoint or folder that index/main.py wrote")
    model, content = load_rqvae(options.ckpt_path, embeddings.device)
    index = index_of(model, embeddings, options)
    index.source = {"checkpoint": str(content["path"]), "epoch": content["epoch"]}
    index.source["preset"] = getattr(content["args"], "preset", None)
    return index


def rqkmeans(embeddings: Embeddings, options: Options) -> Index:
    """Residual k-means on the embeddings: a level's codes are the centres of what the levels before left over.

    Collisions go straight to free indices: there are no Sinkhorn rounds of an original to follow.
    """
    rows = torch.cat(list(embeddings.in_order(options.batch_size)))
    picks = np.random.default_rng(options.seed).permutation(len(rows))[:SAMPLE]
    residual = rows[torch.from_numpy(picks).to(rows.device)]
    codebooks = []
    for size in options.num_emb_list:
        book = kmeans_centers(residual, size, options.kmeans_iters, options.seed, starts=1)
        residual = residual - book[squared_distances(residual, book).argmin(-1)]
        codebooks.append(book)
    resolution = resolve(rows, codebooks, max_rounds=0, allow_conflicts=options.allow_conflicts)
    error = _mean_squared_error(embeddings, resolution.codes, codebooks, lambda x: x, options.batch_size)
    return Index(list(options.num_emb_list), resolution, error)


def random_codes(embeddings: Embeddings, options: Options) -> Index:
    """Different random codes for every item, drawn from the seed."""
    sizes = list(options.num_emb_list)
    numbers = draw_distinct(range(math.prod(sizes)), len(embeddings), options.seed)
    return Index(sizes, Resolution(np.array([to_codes(number, sizes) for number in numbers], dtype=np.int64), [0]))


def to_codes(number: int, sizes: Sequence[int]) -> list[int]:
    """The codes of the index with this number among all, in mixed radix (the last level counts fastest)."""
    codes = []
    for size in reversed(sizes):
        number, code = divmod(number, size)
        codes.append(code)
    return codes[::-1]


def draw_distinct(population: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` different elements of `population`, drawn from `seed`.

    Raises:
        InputError: there are fewer.
    """
    if count > len(population):
        raise InputError(f"{count} items but only {len(population)} free indices; give more levels or codes")
    return random.Random(seed).sample(population, count)


def flat(embeddings: Embeddings, options: Options) -> Index:
    """One level with a token of its own for every item."""
    return Index([len(embeddings)], Resolution(np.arange(len(embeddings), dtype=np.int64)[:, None], [0]))


METHODS: dict[str, Callable[[Embeddings, Options], Index]] = {
    "rqvae": rqvae,
    "rqkmeans": rqkmeans,
    "random": random_codes,
    "flat": flat,
}
