"""No two items on one index: Sinkhorn rounds against a group-by-group loop, free indices against brute force."""

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[2] / "index"))

import generate_indices
import main as index_main
from collisions import FreeIndices, assign_free, exact_assignment, nearest_codes, quantised, resolve, sinkhorn_rounds
from commands import InputError
from extension import read_index
from figures import collision_groups, collision_rate, index_figures, index_keys
from index_report import draw, title_examples


def catalogue(
    items: int, sizes: tuple[int, ...], dim: int = 3, seed: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Clumped latent vectors (with many collisions) and codebooks that shrink level by level."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(items, dim, generator=generator) * 0.5
    books = [torch.randn(size, dim, generator=generator) * 0.6**level for level, size in enumerate(sizes)]
    return latents, books


# ---- the original's rounds, one group after the other ----


def naive_sinkhorn(distances: torch.Tensor, epsilon: float, rounds: int) -> torch.Tensor:
    middle, half = (distances.max() + distances.min()) / 2, (distances.max() - distances.min()) / 2
    plan = torch.exp(-((distances - middle) / (half + 1e-5)).double() / epsilon)
    plan = plan / plan.sum()
    for _ in range(rounds):
        plan = plan / plan.sum(1, keepdim=True) / plan.shape[0]
        plan = plan / plan.sum(0, keepdim=True) / plan.shape[1]
    equals = plan >= plan.max(1, keepdim=True).values * (1 - 1e-9)  # rows with several codes to themselves: the nearest
    return torch.where(equals, distances, torch.inf).argmin(1)


def original_rounds(codes: np.ndarray, residuals: torch.Tensor, book: torch.Tensor) -> np.ndarray:
    codes = codes.copy()
    for _ in range(20):
        groups: dict[str, list[int]] = {}
        for item, row in enumerate(codes.tolist()):
            groups.setdefault(str(row), []).append(item)
        colliding = [group for group in groups.values() if len(group) > 1]
        if not colliding:
            break
        for group in colliding:
            distances = ((residuals[group][:, None] - book[None]) ** 2).sum(-1)
            codes[group, -1] = naive_sinkhorn(distances, 0.003, 50).numpy()
    return codes


@pytest.mark.parametrize("seed", range(4))
def test_rounds_equal_one_group_after_the_other(seed: int) -> None:
    latents, books = catalogue(150, (6, 5, 16), seed=seed)
    latents[40] = latents[41]
    nearest = nearest_codes(latents.double(), [book.double() for book in books])
    residuals = latents.double() - quantised(nearest[:, :-1], [book.double() for book in books[:-1]])
    found, colliding = sinkhorn_rounds(nearest, residuals, books[-1].double(), epsilon=0.003, iterations=50)
    assert np.array_equal(found, original_rounds(nearest, residuals, books[-1].double()))
    assert colliding[0] == sum(map(len, collision_groups(nearest))) > colliding[-1]


def test_nearest_codes_against_brute_force() -> None:
    latents, books = catalogue(50, (6, 5, 4))
    found = nearest_codes(latents, books)
    for item, row in enumerate(latents):
        for level, book in enumerate(books):
            assert found[item, level] == int(((book - row) ** 2).sum(1).argmin())
            row = row - book[found[item, level]]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), candidates=st.integers(1, 7), seed=st.integers(0, 10_000))
def test_exact_assignment_against_all_permutations(rows: int, candidates: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, c = generator.normal(size=(rows, 2)), generator.normal(size=(candidates, 2))
    chosen = exact_assignment(x, c)
    kept = np.flatnonzero(chosen >= 0)
    assert len(kept) == min(rows, candidates) and len(set(chosen[kept])) == len(kept)
    cost = ((x[kept] - c[chosen[kept]]) ** 2).sum()
    best = min(
        sum(((x[r] - c[k]) ** 2).sum() for r, k in zip(some, perm, strict=True))
        for some in itertools.combinations(range(rows), len(kept))
        for perm in itertools.permutations(range(candidates), len(kept))
    )
    assert cost == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 4), min_size=1, max_size=3),
    share=st.floats(0.05, 1.0),
    same=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_catalogue_that_fits_gets_different_indices(
    sizes: list[int], share: float, same: bool, seed: int
) -> None:
    """Up to a completely full index space, all items equal included: prefixes are full, fallbacks are used."""
    count = max(1, int(share * int(np.prod(sizes))))
    latents, books = catalogue(count, tuple(sizes), seed=seed)
    if same:
        latents = latents[:1].repeat(count, 1)
    result = resolve(latents, books)
    assert collision_rate(result.codes) == 0
    assert (result.codes >= 0).all() and (result.codes < sizes).all()
    assert np.array_equal(result.codes, resolve(latents, books).codes)


def test_items_beyond_the_capacity_end_with_one_line() -> None:
    latents, books = catalogue(10, (3, 3))
    with pytest.raises(InputError, match="10 items but only 9 indices"):
        resolve(latents, books)


def test_only_what_still_collides_moves_and_at_least_cost() -> None:
    latents, books = catalogue(60, (16, 24), seed=3)
    latents = latents * 2
    latents[5] = latents[6] = latents[7]
    kept = resolve(latents, books, allow_conflicts=True).codes
    result = resolve(latents, books)
    colliding = {int(item) for group in collision_groups(kept) for item in group}
    assert {5, 6, 7} <= colliding
    moved = set(np.flatnonzero((result.codes != kept).any(1)).tolist())
    assert moved <= colliding
    (prefix,) = {tuple(kept[item, :-1]) for item in (5, 6, 7)}
    taken = {int(kept[i, -1]) for i in range(60) if tuple(kept[i, :-1]) == prefix and i not in colliding}
    group = sorted(i for i in colliding if tuple(kept[i, :-1]) == prefix)
    free = [code for code in range(24) if code not in taken]
    residual = latents - books[0][torch.from_numpy(kept[:, 0])]

    def cost(items: list[int], codes: list[int]) -> float:
        return sum(float(((residual[i] - books[1][c]) ** 2).sum()) for i, c in zip(items, codes, strict=True))

    best = min(cost(group, codes) for codes in itertools.permutations(free, len(group)))
    assert cost(group, result.codes[group, -1].tolist()) == pytest.approx(best, rel=1e-5)
    added = sum(cost([i], [result.codes[i, -1]]) - cost([i], [kept[i, -1]]) for i in moved)
    assert result.added_error == pytest.approx(added, rel=1e-4, abs=1e-6)


def test_a_full_prefix_falls_back_by_one_level() -> None:
    """Six equal items, four last codes: two go to the nearest other second-level code, none leaves the first-level one."""
    books = [
        torch.tensor([[0.0], [100.0]]),
        torch.tensor([[0.0], [3.0], [9.0]]),
        torch.tensor([[0.0], [0.1], [0.2], [0.3]]),
    ]
    result = resolve(torch.zeros(6, 1), books)
    assert (result.codes[:, 0] == 0).all()
    assert sorted(result.codes[:, 1].tolist()) == [0, 0, 0, 0, 1, 1]
    assert (result.moved_to_other_prefix, result.greedy) == (2, 0)


def test_more_items_than_an_exact_fallback_takes_are_placed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collisions.EXACT_ITEMS", 3)
    latents, books = catalogue(40, (4, 4, 4), seed=1)
    result = resolve(latents[:1].repeat(40, 1), books)
    assert collision_rate(result.codes) == 0 and result.greedy > 0


def test_free_indices_against_a_set() -> None:
    sizes = (2, 3, 4)
    everything = np.array(list(itertools.product(*map(range, sizes))))
    taken = everything[np.random.default_rng(0).permutation(24)[:13]]
    free = FreeIndices(sizes, taken)
    wanted = {tuple(row) for row in taken.tolist()}
    for depth in range(4):
        for prefix in itertools.product(*map(range, sizes[:depth])):
            under = [row for row in map(tuple, everything.tolist()) if row[:depth] == prefix]
            assert free.free_mask(prefix).tolist() == [row not in wanted for row in under]
            assert free.has_room(prefix) == any(row not in wanted for row in under)


def test_assigned_items_keep_away_from_all_others() -> None:
    latents, books = catalogue(30, (3, 4, 5), seed=2)
    codes = nearest_codes(latents, books)
    items = np.unique(np.concatenate(collision_groups(codes)))
    new, _, _ = assign_free(codes, latents[items].double().numpy(), [book.double().numpy() for book in books], items)
    others = np.setdiff1d(np.arange(30), items)
    assert np.array_equal(new[others], codes[others]) and collision_rate(new) == 0


# ---- figures ----


def test_figures_against_a_hand_made_table() -> None:
    codes = np.array([[0, 0], [0, 0], [0, 1], [2, 1], [2, 1], [2, 1], [3, 0], [3, 1]])
    figures = index_figures(codes, [4, 4])
    assert (figures["distinct_indices"], figures["collision_groups"], figures["colliding_items"]) == (5, 2, 5)
    assert (figures["largest_group"], figures["collision_rate"]) == (3, 0.375)
    first = figures["levels"][0]
    assert (first["used"], first["largest_share"]) == (3, 0.375)
    assert first["entropy_bits"] == pytest.approx(-2 * 0.375 * np.log2(0.375) - 0.25 * np.log2(0.25), abs=1e-4)
    assert [group.tolist() for group in collision_groups(codes)] == [[0, 1], [3, 4, 5]]


def test_keys_of_long_indices_do_not_overflow() -> None:
    codes = np.random.default_rng(0).integers(0, 256, size=(500, 12))
    codes[7] = codes[9]
    keys = index_keys(codes)
    assert len(np.unique(keys)) == 499 and keys[7] == keys[9]
    assert np.array_equal(np.argsort(keys, kind="stable"), np.lexsort(codes.T[::-1]))


# ---- generate_indices.py, whole ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with embeddings of 90 items (five of them equal), titles, and a trained RQ-VAE in ckpt/."""
    folder = tmp_path_factory.mktemp("run")
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(9, 12))[np.arange(90) % 9] + 0.1 * generator.normal(size=(90, 12))
    rows[[10, 20, 30, 40]] = rows[50]
    np.save(folder / "D.emb-x-td.npy", rows.astype(np.float32))
    items = {str(i): {"title": f"thing {i % 9}-{i}", "categories": f"kind {i % 9}, all {i % 3}"} for i in range(90)}
    (folder / "D.item.json").write_text(json.dumps(items))
    flags = "--device cpu --num_emb_list 8 8 8 --sk_epsilons 0 0 0.003 --layers 32 16 --e_dim 4 --batch_size 45"
    flags += (
        f" --epochs 20 --warmup_epochs 2 --eval_step 10 --data_path {folder}/D.emb-x-td.npy --ckpt_dir {folder}/ckpt"
    )
    index_main.main(flags.split())
    return folder


def generate(run: Path, *flags: str, name: str = "D.index.json") -> tuple[dict, dict]:
    """The index and the report."""
    generate_indices.main(["--device", "cpu", "--overwrite", "--output_file", str(run / name), *flags])
    stem = name.removesuffix(".json")
    assert (run / f"{stem}.report.png").stat().st_size > 10_000
    return json.loads((run / name).read_text()), json.loads((run / f"{stem}.report.json").read_text())


def test_no_conflicts_by_default_the_originals_on_request(run: Path) -> None:
    index, report = generate(run, "--ckpt_path", str(run / "ckpt"))
    assert list(index) == [str(i) for i in range(90)]
    assert len({tuple(tokens) for tokens in index.values()}) == 90 and report["collision_rate"] == 0
    letters = [token[:3] for tokens in index.values() for token in tokens]
    assert letters == ["<a_", "<b_", "<c_"] * 90
    again, _ = generate(run, "--ckpt_path", str(run / "ckpt"))
    assert again == index
    kept, report = generate(run, "--ckpt_path", str(run / "ckpt"), "--allow_conflicts", name="D.kept.json")
    assert len({tuple(kept[str(i)]) for i in (10, 20, 30, 40, 50)}) == 1
    assert report["collision_rate"] > 0 and report["largest_group"] >= 5
    groups = report["largest_groups"]
    assert [group["size"] for group in groups] == sorted((group["size"] for group in groups), reverse=True)
    (group,) = [group for group in groups if group["index"] == kept["10"]]
    assert group["items"][0] <= 10 and group["size"] >= 5 and groups[0]["size"] == report["largest_group"]
    assert group["titles"] == [f"thing {item % 9}-{item}" for item in group["items"]]


def test_report_shows_meaning(run: Path) -> None:
    _, report = generate(run, "--ckpt_path", str(run / "ckpt"))
    first = report["examples"][0]
    assert first["under"][0]["titles"][0].startswith("thing ")
    assert report["neighbours"][0]["lift"] > 1
    assert len(report["levels"]) == 3 and report["reconstruction_mse"] > 0
    index = json.loads((run / "D.index.json").read_text())
    assert report["first_level_sizes"] == Counter(tokens[0] for tokens in index.values())
    for second in first["under"]:
        for title in second["titles"]:
            assert index[title.split("-")[1]][:2] == [first["token"], second["token"]]
    _, random_report = generate(run, "--method", "random", "--data_path", str(run / "D.emb-x-td.npy"), name="D.r.json")
    assert random_report["neighbours"][0]["lift"] < report["neighbours"][0]["lift"]


def test_any_title_can_be_drawn(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Dollar signs are no formulas, and scripts that the font lacks no reason to warn."""
    titles = ["costs $5 or $6_{", "漢字 " * 40, ""]
    codes = np.array([[0, 0], [0, 1], [1, 0]])
    report = index_figures(codes, [2, 2]) | {"neighbours": [], "examples": title_examples(codes, titles)}
    draw(tmp_path / "x.png", codes, report)
    assert (tmp_path / "x.png").stat().st_size > 10_000 and not len(recwarn)


@pytest.mark.parametrize("method", ["rqkmeans", "random", "flat"])
def test_methods_write_the_same_format(run: Path, method: str) -> None:
    flags = ["--method", method, "--data_path", str(run / "D.emb-x-td.npy"), "--num_emb_list", "8", "8", "8"]
    index, report = generate(run, *flags, name=f"D.{method}.json")
    assert len({tuple(tokens) for tokens in index.values()}) == 90
    assert {len(tokens) for tokens in index.values()} == {1 if method == "flat" else 3}
    assert report["method"] == method
    assert generate(run, *flags, name=f"D.{method}.json")[0] == index


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_extension_keeps_old_indices_and_uses_known_tokens(run: Path, with_checkpoint: bool) -> None:
    old, _ = generate(run, "--ckpt_path", str(run / "ckpt"))
    rows = np.load(run / "D.emb-x-td.npy")
    np.save(run / "new.npy", np.concatenate([rows, rows[:20] + 0.01, rows[50:51], rows[50:51]]))
    flags = ["--extend", str(run / "D.index.json"), "--data_path", str(run / "new.npy")]
    flags += ["--ckpt_path", str(run / "ckpt")] if with_checkpoint else []
    index, report = generate(run, *flags, name="N.index.json")
    assert len(index) == 112 and {item: index[item] for item in old} == old
    assert len({tuple(tokens) for tokens in index.values()}) == 112
    assert {t for tokens in index.values() for t in tokens} == {t for tokens in old.values() for t in tokens}
    assert (report["old_items"], report["new_items"]) == (90, 22)
    assert report["moved_on_last_level"] > 0 and report["added_squared_distance"] > 0  # two texts that an old item has
    near = sum(index[str(90 + i)][0] == old[str(i)][0] for i in range(20))
    assert near > 12  # almost equal to old items: mostly under their first code


def test_extension_refusals(run: Path) -> None:
    data = str(run / "D.emb-x-td.npy")
    generate(run, "--method", "flat", "--data_path", data, name="F.index.json")
    generate(run, "--ckpt_path", str(run / "ckpt"))
    rows = np.load(data)
    np.save(run / "more.npy", np.concatenate([rows, rows[:3]]))
    np.save(run / "wrong.npy", np.roll(np.concatenate([rows, rows[:3]]), 1, axis=0))
    more = ["--data_path", str(run / "more.npy")]
    trained = ["--ckpt_path", str(run / "ckpt")]
    for flags, word in [
        (["--extend", str(run / "F.index.json"), *more], "flat"),
        (["--extend", str(run / "D.index.json"), "--data_path", data], "old ones first"),
        (["--extend", str(run / "D.item.json"), *more], "tokens such as"),
        (["--extend", str(run / "D.index.json"), "--data_path", str(run / "wrong.npy"), *trained], "not the items of"),
        (["--extend", str(run / "D.index.json")], "--data_path"),
        (["--ckpt_path", str(run / "nothing")], "no such file"),
        (["--ckpt_path", str(run)], "no best_collision_model"),
        ([], "--ckpt_path"),
        (["--method", "random", "--data_path", data, "--num_emb_list", "4", "4"], "90 items but only 16"),
    ]:
        with pytest.raises(InputError) as error:
            generate(run, *flags, name="X.index.json")
        assert word in str(error.value)
    with pytest.raises(InputError, match="overwrite"):
        generate_indices.main(["--ckpt_path", str(run / "ckpt"), "--output_file", str(run / "D.index.json")])


def test_index_files_of_others_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"0": ["<a_1>", "<b_2>"], "1": ["<a_1>", "<b_2>"]}')
    assert read_index(path).tolist() == [[1, 2], [1, 2]]
    for text in (
        "{}",
        "[]",
        "{",
        '{"1": ["<a_1>"]}',
        '{"0": ["<b_1>"]}',
        '{"0": ["<a_1>"], "1": ["<a_1>", "<b_1>"]}',
        '{"0": 5}',
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=r"x\.json"):
            read_index(path)
