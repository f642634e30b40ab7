"""accuracy.sh, search.sh and earlier.sh with a `python` that only writes down what it is asked to do."""

import json

from stub_python import StubPython


def test_accuracy_makes_a_table_of_each_method_and_keeps_recipes_apart(tmp_path):
    accuracy = StubPython(tmp_path, "accuracy.sh")
    done, calls = accuracy.run(SEEDS="1 2")
    assert done.returncode == 0, done.stderr
    trained = [call for call in calls if call.startswith("finetune.py")]
    assert [call.split("--seed ")[1].split()[0] for call in trained] == ["1", "2", "1", "2"]
    assert all("--last_code_weight 3 --swap_items 0.2" in call and "Toy/rqvae-seed" in call for call in trained[:2])
    assert not any("swap_items" in call for call in trained[2:]) and all(
        "Toy/flat-seed" in call for call in trained[2:]
    )
    tables = [call for call in calls if call.startswith("report.py")]
    assert ["rqvae.table.md" in tables[0], "flat.table.md" in tables[1]] == [True, True] and len(tables) == 2
    again, calls = accuracy.run(SEEDS="1 2")
    assert again.returncode == 0 and not any("finetune.py" in call for call in calls)  # it is done
    other, calls = accuracy.run(SEEDS="1", FINETUNE_FLAGS="--epochs 3")
    assert other.returncode == 2 and "rqvae-seed1 was made of other data, settings or scripts" in other.stderr
    trial, calls = accuracy.run(SEEDS="1", FINETUNE_FLAGS="--epochs 3", TRIAL="short", METHOD="rqvae")
    assert trial.returncode == 0 and any(
        "Toy/short-rqvae-seed1/model" in call and "--epochs 3" in call for call in calls
    )


def test_an_index_of_other_flags_has_a_name_of_its_own(tmp_path):
    accuracy = StubPython(tmp_path, "accuracy.sh")
    refused, calls = accuracy.run(INDEX_FLAGS="--preset paper")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not calls
    done, calls = accuracy.run(INDEX_FLAGS="--preset paper", METHOD="x", SEEDS="1")
    assert done.returncode == 0 and any("index-x --preset paper" in call for call in calls), done.stderr


def test_search_tests_each_model_on_both_sets_of_queries(tmp_path):
    search = StubPython(tmp_path, "search.sh")
    done, calls = search.run(SMOLLM2_STEPS="7", WORK=str(tmp_path / "work"))
    assert done.returncode == 0, done.stderr
    trained = [call for call in calls if call.startswith("finetune.py")]
    assert len(trained) == 2 and "--epochs 5" in trained[0] and "--max_steps 7" in trained[1]
    tables = [call for call in calls if call.startswith("benchmarks/search.py")]
    for table, queries in zip(tables, ("plain", "hard"), strict=True):
        assert "tiny, 5 epochs, query alone=" in table and "SmolLM2, 7 steps, query and history=" in table
        assert table.count(f"/{queries}-") == 4
    other, calls = search.run(EPOCHS="6", SMOLLM2_STEPS="0", WORK=str(tmp_path / "work"))
    assert other.returncode == 0 and "tiny--6-epochs-seed42" in " ".join(calls)  # a folder of its own


RUN_STUB = """
echo "run.sh $OUTPUT_DIR $MODELS_DIR $NPROC $DATA_PATH $*" >> "$CALLS"
for stage in "$@"; do
  case "$stage" in
    index) echo {} > "$DATA_PATH/Toy/Toy.index.json" ;;
    test) echo "{\\"mean_results\\": {\\"hit@10\\": 0.2${DATA_PATH: -1}, \\"ndcg@10\\": 0.1}}" > "$RESULTS_DIR/result.json" ;;
  esac
done
"""


def test_earlier_never_reads_a_test_item(tmp_path):
    earlier = StubPython(tmp_path, "earlier.sh")
    (tmp_path / "repository" / "run.sh").write_text(RUN_STUB)
    work = str(tmp_path / "work")
    done, calls = earlier.run(WORK=work, TRIAL="x", FINETUNE_FLAGS="--epochs 3")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "work" / "Toy" / "x-seed42"
    same = f"run.sh {folder}/model {folder}/base 1 {folder}"
    assert calls == [
        f"data_process/user_texts.py --data_path {folder}/cut3 --dataset Toy",
        f"{same}/cut3 embed index base finetune test",
        f"{same}/cut2 test",
        f"{same}/cut1 test",
    ]
    whole = json.loads((tmp_path / "Toy" / "Toy.inter.json").read_text())
    for cut in (3, 2, 1):
        part = json.loads((folder / f"cut{cut}" / "Toy" / "Toy.inter.json").read_text())
        assert part == {user: items[:-cut] for user, items in whole.items() if len(items) >= 6}
        assert len(part) < len(whole)
        assert (folder / f"cut{cut}" / "Toy" / "Toy.index.json").read_text() == "{}\n"
    assert done.stdout.splitlines()[-4:] == [
        "items[-4]          HR@10 0.2300  NDCG@10 0.1000",
        "items[-3]          HR@10 0.2200  NDCG@10 0.1000",
        "items[-2]          HR@10 0.2100  NDCG@10 0.1000",
        "mean of the three  HR@10 0.2200  NDCG@10 0.1000",
    ]
    for settings, said in (
        ({"FINETUNE_FLAGS": "--epochs 4"}, "x-seed42 was made of other data, settings or scripts"),
        (
            {"FINETUNE_FLAGS": "--epochs 3", "BASE_MODEL": "gpt2"},
            "x-seed42 was made of other data, settings or scripts",
        ),
        (
            {"FINETUNE_FLAGS": "--epochs 3", "FORCE": "1"},
            "FORCE=1 is for run.sh",
        ),  # it would bring back the whole histories
    ):
        other, calls = earlier.run(WORK=work, TRIAL="x", **settings)
        assert other.returncode == 2 and said in other.stderr and not calls


def test_earlier_names_a_truncated_file(tmp_path):
    earlier = StubPython(tmp_path, "earlier.sh")
    (tmp_path / "repository" / "run.sh").write_text(RUN_STUB)
    path = tmp_path / "Toy" / "Toy.inter.json"
    path.write_text(path.read_text()[:40])
    done, calls = earlier.run(WORK=str(tmp_path / "work"))
    assert done.returncode == 2 and done.stderr.startswith(f"error: {path}: not a file of histories") and not calls
    assert done.stderr.count("\n") == 1
