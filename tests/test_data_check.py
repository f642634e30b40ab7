"""python data.py --check: a readable summary, and every fault, not only the first."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
from toy_data import INDEX, INTERS, ITEMS, USERS, write_dataset

import data_check
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent


def test_a_summary_with_samples_of_each_task(toy, capsys):
    data_check.main(["--check", "--data_path", str(toy), "--dataset", "Toy", "--show", "1"])
    shown = capsys.readouterr().out
    facts = dict(line.split("  ", 1) for line in shown.splitlines() if "  " in line and not line.startswith(" "))
    facts = {name: value.strip() for name, value in facts.items()}
    assert facts["users"] == "4" and facts["items"] == "6" and facts["interactions"] == "18"
    assert facts["sparsity"] == "25.0000%"
    assert facts["history lengths"].startswith("least 3, ") and facts["history lengths"].endswith("most 6")
    assert facts["cold items (in no training part)"] == "1"  # item 4 is a last item, and the second but last of nobody
    assert facts["items without a description"] == "1" and facts["items that share an index"] == "0"
    assert "seqrec: 6 samples an epoch" in shown and "preferenceobtain: 3 samples an epoch" in shown
    assert "### Response:<a_" in shown and shown.endswith("no faults\n")


def test_every_fault_is_told_with_file_and_key(tmp_path, capsys):
    users = copy.deepcopy(USERS)
    users["user_vague_intention"]["test"]["0"]["querys"] = ["one"]
    users["user_explicit_preference"]["9"] = ["likes"]
    broken = {
        "inter": {**INTERS, "1": [0, 1], "2": [0, 1, 77], "7": "x"},
        "item": {**ITEMS, "2": {"title": 3}, "5": {"title": "", "description": " "}},
        "index": {**INDEX, "0": ["a"], "6": ["<a_1>"]},
        "user": users,
    }
    root = write_dataset(tmp_path, **broken)
    with pytest.raises(UserError, match="11 faults"):
        data_check.main(["--data_path", str(root), "--dataset", "Toy"])
    shown = capsys.readouterr().out
    for words in (
        "Toy.item.json: item '2' has no text in 'title'",
        "Toy.item.json: item '5' has neither",
        "Toy.inter.json: user '1' has 2 interactions",
        "Toy.inter.json: user '2': 77 is not an item",
        "Toy.inter.json: user '7' must be a list",
        "Toy.index.json: item '0' has 'a'",
        "Toy.index.json: has item '6'",
        "Toy.user.json: user_explicit_preference '9'",
        "'test' '0': 'querys' must be two texts",
    ):
        assert words in shown
    assert shown.count("is not a user of the interaction file") == 3  # 9, and the two users with faults of their own


def test_the_command(toy):
    flags = ["--data_path", str(toy), "--dataset", "Toy"]
    done = subprocess.run([sys.executable, "data.py", "--check", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "no faults" in done.stdout, done.stderr
    (toy / "Toy/Toy.inter.json").write_text("{")
    done = subprocess.run([sys.executable, "data.py", "--check", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "broken JSON at line 1" in done.stdout
