"""Ranking metrics with one right answer per sample: the one definition that evaluate.py and metrics.py share.

Every metric is a function of the target's rank in the list of recommendations: 0 for the first place, -1 where the
target is not in the list. The metric of a data set is the mean over its samples.
"""

import math


def hit(rank: int, k: int) -> float:
    """HR@k, the hit rate (with one target it equals recall@k): 1 if the target is among the first k."""
    return 1.0 if 0 <= rank < k else 0.0


def ndcg(rank: int, k: int) -> float:
    """NDCG@k with one target: 1 / log2(place + 1) with places from 1, if it is among the first k (ideal DCG is 1)."""
    return 1.0 / math.log2(rank + 2) if 0 <= rank < k else 0.0


def mrr(rank: int, k: int) -> float:
    """MRR@k: 1 / place of the target, if it is among the first k."""
    return 1.0 / (rank + 1) if 0 <= rank < k else 0.0


METRICS = {"hit": hit, "ndcg": ndcg, "mrr": mrr}


def parse_metrics(names: str) -> list[tuple[str, str, int]]:
    """Read a comma list such as `hit@1,ndcg@10`.

    Returns:
        (name as given, key of `METRICS`, k) for each, in the order given, without repetitions.

    Raises:
        ValueError: an unknown metric or a k that is no positive number.
    """
    parsed = []
    for name in dict.fromkeys(part.strip() for part in names.split(",") if part.strip()):
        kind, _, k = name.partition("@")
        if kind.lower() not in METRICS or not (k.isascii() and k.isdecimal() and len(k) < 10) or int(k) < 1:
            known = ", ".join(f"{known}@k" for known in METRICS)
            raise ValueError(f"unknown metric {name[:40]!r}: write one of {known}, with a number such as 10 for k")
        parsed.append((name, kind.lower(), int(k)))
    if not parsed:
        raise ValueError("no metric is named")
    return parsed


def rank_of(target: int, items: list[int]) -> int:
    """The place of `target` in `items`, from 0, or -1."""
    return items.index(target) if target in items else -1


def means(ranks: list[int], names: str) -> dict[str, float]:
    """Each metric's mean over the samples' `ranks`; the sum is exact (`fsum`), so the samples' order plays no part.

    Raises:
        ValueError: there is no sample, or `parse` refuses `names`.
    """
    if not ranks:
        raise ValueError("there are no samples to evaluate")
    return {
        name: math.fsum(METRICS[kind](rank, k) for rank in ranks) / len(ranks) for name, kind, k in parse_metrics(names)
    }
