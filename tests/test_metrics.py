"""evaluate.py and metrics/ against hand-computed values, scikit-learn, and each other."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import ndcg_score, top_k_accuracy_score

import evaluate
from metrics.ranking import means
from utils import UserError

ROOT = Path(__file__).parents[1]
EVERY = "hit@1,hit@5,hit@10,ndcg@5,ndcg@10,mrr@10"


def test_hand_computed_table():
    found = means([0, 2, 9, -1], EVERY)
    assert found == {
        "hit@1": 1 / 4,
        "hit@5": 2 / 4,
        "hit@10": 3 / 4,
        "ndcg@5": pytest.approx((1 + 1 / 2) / 4, abs=1e-15),
        "ndcg@10": pytest.approx((1 + 1 / 2 + 1 / math.log2(11)) / 4, abs=1e-15),
        "mrr@10": pytest.approx((1 + 1 / 3 + 1 / 10) / 4, abs=1e-15),
    }


def random_lists(samples: int, catalogue: int, length: int) -> tuple[list[list[int]], list[int]]:
    rng = np.random.default_rng(7)
    items = [rng.permutation(catalogue)[:length].tolist() for _ in range(samples)]
    return items, rng.integers(catalogue, size=samples).tolist()


@pytest.mark.parametrize("k", [1, 3, 5, 10, 20])
def test_agrees_with_scikit_learn(k):
    items, targets = random_lists(200, 30, 20)
    relevance, scores = np.zeros((200, 30)), np.zeros((200, 30))
    for row, (ranked, target) in enumerate(zip(items, targets, strict=True)):
        relevance[row, target] = 1
        scores[row, ranked] = np.arange(len(ranked), 0, -1)  # items that are not in the list tie at zero, below it
    hits = [target in ranked for ranked, target in zip(items, targets, strict=True)]
    ranks = [ranked.index(t) if t in ranked else -1 for ranked, t in zip(items, targets, strict=True)]
    found = means([rank for rank, hit in zip(ranks, hits, strict=True) if hit], f"hit@{k},ndcg@{k}")
    relevance, scores = relevance[hits], scores[hits]
    assert found[f"ndcg@{k}"] == pytest.approx(ndcg_score(relevance, scores, k=k), abs=1e-12)
    accuracy = top_k_accuracy_score(relevance.argmax(1), scores, k=k, labels=range(30))
    assert found[f"hit@{k}"] == pytest.approx(accuracy, abs=1e-12)


def write_predictions(path: Path, prompts: int = 3) -> None:
    items, targets = random_lists(60 * prompts, 30, 20)
    with open(path, "w", encoding="utf-8") as file:
        for number, (ranked, target) in enumerate(zip(items, targets, strict=True)):
            line = {"prompt_id": number // 60, "sample": number % 60, "user": "u", "target": target, "items": ranked}
            file.write(json.dumps(line) + "\n")


def test_the_module_for_evaluate_agrees_to_the_last_digit(tmp_path):
    """Loaded as users load it: from another folder, where `evaluate` is Hugging Face's package."""
    write_predictions(tmp_path / "p.jsonl", prompts=1)
    code = (
        "import evaluate, json, sys\n"
        "rows = [json.loads(line) for line in open('p.jsonl')]\n"
        "metric = evaluate.load(sys.argv[1])\n"
        "print(metric.compute(predictions=[r['items'] for r in rows], references=[r['target'] for r in rows], "
        "metrics=sys.argv[2]).__repr__())\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "metrics"), EVERY]
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranks = evaluate.ranks_of(evaluate.read_predictions(tmp_path / "p.jsonl"))[0]
    assert done.stdout.strip().splitlines()[-1] == repr(means(ranks, EVERY))


def test_script_summarises_over_prompts(tmp_path, capsys):
    write_predictions(tmp_path / "p.jsonl")
    evaluate.main(["--predictions", str(tmp_path / "p.jsonl"), "--results_file", str(tmp_path / "new/r.json")])
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "new/r.json").read_text())
    assert shown["test_prompt_ids"] == "0,1,2" and len(shown["all_prompt_results"]) == 3
    for name, value in shown["mean_results"].items():
        each = [result[name] for result in shown["all_prompt_results"]]
        assert value == pytest.approx(np.mean(each), abs=1e-15)
        assert (shown["min_results"][name], shown["max_results"][name]) == (min(each), max(each))
    with pytest.raises(UserError, match="exists"):
        evaluate.main(["--predictions", str(tmp_path / "p.jsonl"), "--results_file", str(tmp_path / "new/r.json")])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no predictions"),
        ("{}", "line 1: .*prompt_id"),
        ('{"prompt_id": 0, "sample": 0, "target": "4", "items": []}', "target is not an integer"),
        ('{"prompt_id": 0, "sample": 0, "target": 4, "items": [4]}\n{"prom', "line 2"),
        ('{"prompt_id": 0, "sample": 0, "target": 4, "items": [4]}\n' * 2, "occurs twice"),
        ('{"prompt_id": 0, "sample": 0, "target": 4, "items": [4, 5, 4]}', "names an item twice"),
    ],
)
def test_broken_predictions_are_told(tmp_path, lines, message):
    (tmp_path / "p.jsonl").write_text(lines)
    with pytest.raises(UserError, match=message):
        evaluate.main(["--predictions", str(tmp_path / "p.jsonl")])


@pytest.mark.parametrize("names", ["hits@1", "hit@0", "hit@", "hit", "", "ndcg@x"])
def test_unknown_metrics_are_told(names):
    with pytest.raises(UserError, match="--metrics"):
        evaluate.check_metrics(names)


def test_short_lists_are_noted(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt_id": 0, "sample": 0, "target": 4, "items": [4, 5, 6]}\n')
    evaluate.main(["--predictions", str(tmp_path / "p.jsonl"), "--metrics", "hit@3,ndcg@10"])
    noted = capsys.readouterr().err
    assert "ndcg@10" in noted and "hit@3" not in noted
