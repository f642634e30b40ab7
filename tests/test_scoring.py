"""test.py in one process: what it writes, resumes, refuses, and how it copes with too little memory."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring_world import make_world

import data_check
import evaluate
import results
import scoring
import test as test_script
import test_ddp as test_ddp_script
import testing
from data import load_data
from prompt import load_prompts
from prompt_style import PromptStyle
from run_folder import RunRecord, model_fingerprint
from tasks import HistoryFormat
from utils import UserError, sha256


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def score(world: Path, results: Path, *more: str, main: Callable = test_script.main) -> dict:
    flags = ["--ckpt_path", str(world / "ckpt"), "--data_path", str(world), "--dataset", "toy", "--num_beams", "8"]
    flags += ["--metrics", "hit@1,hit@8,ndcg@8", "--results_file", str(results), "--test_batch_size", "4", *more]
    main(flags)
    return json.loads(results.read_text())


def lines(results: Path) -> list[dict]:
    with open(results.with_name(f"{results.stem}.predictions.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_sample_once_for_every_prompt(world, tmp_path):
    found = score(world, tmp_path / "new/folder/r.json", "--test_prompt_ids", "3,0")
    rows = lines(tmp_path / "new/folder/r.json")
    users = list(json.loads((world / "toy/toy.inter.json").read_text()).items())
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(p, n) for p in (3, 0) for n in range(len(users))]
    index = json.loads((world / "toy/toy.index.json").read_text())
    for row in rows:
        user, items = users[row["sample"]]
        assert (row["user"], row["target_item"]) == (user, items[-1])
        assert index[str(row["target"])] == index[str(items[-1])] and row["target"] <= items[-1]
        assert len({tuple(index[str(item)]) for item in row["items"]}) == 8
        assert row["scores"] == sorted(row["scores"], reverse=True)
    assert found["test_prompt_ids"] == "3,0" and len(found["all_prompt_results"]) == 2
    assert sorted(path.name for path in (tmp_path / "new/folder").iterdir()) == ["r.json", "r.predictions.jsonl"]


def test_items_that_share_an_index_count_as_the_first_of_them(world, tmp_path):
    score(world, tmp_path / "r.json")
    assert any(row["target"] != row["target_item"] for row in lines(tmp_path / "r.json"))
    index = [tuple(row) for row in json.loads((world / "toy/toy.index.json").read_text()).values()]
    shared = sum(index.count(row) > 1 for row in index)
    assert json.loads((tmp_path / "r.json").read_text())["config"]["items_that_share_an_index"] == shared > 0


def test_results_are_recomputable_from_the_predictions(world, tmp_path, capsys):
    found = score(world, tmp_path / "r.json", "--test_prompt_ids", "all")
    capsys.readouterr()
    evaluate.main(["--predictions", str(tmp_path / "r.predictions.jsonl"), "--metrics", "hit@1,hit@8,ndcg@8"])
    again = json.loads(capsys.readouterr().out)
    for key in ("mean_results", "min_results", "max_results", "all_prompt_results"):
        assert found[key] == again[key]
    assert len(found["all_prompt_results"]) == 17


def test_batch_size_changes_nothing(world, tmp_path):
    wanted = score(world, tmp_path / "a.json", "--test_batch_size", "1")
    for size in ("7", "auto"):
        found = score(world, tmp_path / f"{size}.json", "--test_batch_size", size)
        assert found["mean_results"] == wanted["mean_results"]
        for row, other in zip(lines(tmp_path / f"{size}.json"), lines(tmp_path / "a.json"), strict=True):
            assert row["items"] == other["items"]
            assert np.allclose(row["scores"], other["scores"], atol=1e-5, rtol=0)


def test_one_process_of_test_ddp_finds_the_same(world, tmp_path):
    wanted = score(world, tmp_path / "a.json")
    assert score(world, tmp_path / "b.json", main=test_ddp_script.main)["mean_results"] == wanted["mean_results"]
    assert lines(tmp_path / "a.json") == lines(tmp_path / "b.json")


# ---- resuming ----


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory) -> Path:
    """A folder with the results of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    score(world, folder / "r.json", "--test_prompt_ids", "0,5")
    return folder


def stop_after(monkeypatch, batches: int) -> None:
    """Let the run end with an error after so many batches."""
    decode = scoring.Scorer.decode
    calls = iter(range(10**6))

    def limited(self, ids):
        if next(calls) >= batches:
            raise KeyboardInterrupt
        return decode(self, ids)

    monkeypatch.setattr(scoring.Scorer, "decode", limited)


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.61, 0.999, 1.0])
def test_goes_on_from_whatever_an_interruption_left(world, whole, tmp_path, monkeypatch, cut):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 9)
        score(world, tmp_path / "r.json", "--test_prompt_ids", "0,5")
    part = tmp_path / "r.partial/part-00000.jsonl"
    part.write_bytes(part.read_bytes()[: math.floor(part.stat().st_size * cut)])  # kill -9 in the midst of a write
    made = []
    append = results.Store.append
    monkeypatch.setattr(results.Store, "append", lambda self, rows: (made.extend(rows), append(self, rows)))
    score(world, tmp_path / "r.json", "--test_prompt_ids", "0,5")
    wanted = contents(whole)
    found = contents(tmp_path)
    assert found["r.predictions.jsonl"] == wanted["r.predictions.jsonl"]
    assert found["r.json"].replace(str(tmp_path).encode(), str(whole).encode()) == wanted["r.json"]
    assert set(found) == set(wanted)
    if cut == 1.0:
        assert len(made) < len(lines(tmp_path / "r.json"))


def test_an_interruption_while_the_results_are_written(world, whole, tmp_path, monkeypatch):
    for step in ("write_json", "_remove_partial"):
        folder = tmp_path / step
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            target = results.Store if step.startswith("_") else results
            original = getattr(target, step)

            def broken(*args, original=original):
                if isinstance(args[0], results.Store) or str(args[0]).endswith("r.json"):
                    raise KeyboardInterrupt
                return original(*args)

            patch.setattr(target, step, broken)
            score(world, folder / "r.json", "--test_prompt_ids", "0,5")
        assert (folder / "r.partial").is_dir()
        score(world, folder / "r.json", "--test_prompt_ids", "0,5")
        assert (folder / "r.predictions.jsonl").read_bytes() == (whole / "r.predictions.jsonl").read_bytes()
        assert not (folder / "r.partial").exists()


def test_a_complete_run_is_only_summed_up_again(world, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "c")
    monkeypatch.setattr(testing, "load_for_test", None)  # the model is not even loaded
    found = score(world, tmp_path / "c/r.json", "--test_prompt_ids", "0,5", "--metrics", "hit@3")
    assert list(found["mean_results"]) == ["hit@3"]
    assert (tmp_path / "c/r.predictions.jsonl").read_bytes() == (whole / "r.predictions.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num_beams", "9"], "num_beams"),
        (["--max_his_len", "3"], "max_his_len"),
        (["--sample_num", "5"], "sample_num"),
        (["--test_prompt_ids", "0"], "prompt_ids"),
        (["--dtype", "bfloat16"], "dtype"),
    ],
)
def test_other_flags_are_refused(world, whole, tmp_path, flags, named):
    shutil.copytree(whole, tmp_path / "c")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"another {named}.*--restart"):
        score(world, tmp_path / "c/r.json", *["--test_prompt_ids", "0,5", *flags])
    assert contents(tmp_path) == before
    assert score(world, tmp_path / "c/r.json", *["--test_prompt_ids", "0,5", *flags, "--restart"])


def test_another_checkpoint_and_other_data_are_refused(world, whole, tmp_path):
    shutil.copytree(world, tmp_path / "w")
    shutil.copytree(whole, tmp_path / "c")
    weights = tmp_path / "w/ckpt/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="another checkpoint"):
        score(tmp_path / "w", tmp_path / "c/r.json", "--test_prompt_ids", "0,5")
    shutil.copy(world / "ckpt/model.safetensors", weights)
    inters = json.loads((tmp_path / "w/toy/toy.inter.json").read_text())
    inters["0"].append(3)
    (tmp_path / "w/toy/toy.inter.json").write_text(json.dumps(inters))
    with pytest.raises(UserError, match="another data file inter"):
        score(tmp_path / "w", tmp_path / "c/r.json", "--test_prompt_ids", "0,5")


@pytest.mark.parametrize("name", ["r.json", "r.predictions.jsonl"])
def test_files_of_others_are_not_overwritten(world, tmp_path, name):
    (tmp_path / name).write_text('{"mean_results": {}}\n')
    for restart in ([], ["--restart"]):
        with pytest.raises(UserError, match="name another --results_file"):
            score(world, tmp_path / "r.json", *restart)
        assert contents(tmp_path) == {name: b'{"mean_results": {}}\n'}


@pytest.mark.parametrize(
    "line",
    [b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"prompt_id": 0, "sample": 0, "target": 1, "items": []}']
    + [b'{"prompt_id": 0, "sample": 0, "target": 99, "items": [1, 2, 3, 4, 5, 6, 7, 8]}'],
)
def test_partial_lines_of_something_else_are_made_anew(world, whole, tmp_path, monkeypatch, line):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 9)
        score(world, tmp_path / "r.json", "--test_prompt_ids", "0,5")
    part = tmp_path / "r.partial/part-00000.jsonl"
    part.write_bytes(line + b"\n" + b"\n".join(part.read_bytes().split(b"\n")[1:]))
    score(world, tmp_path / "r.json", "--test_prompt_ids", "0,5")
    assert (tmp_path / "r.predictions.jsonl").read_bytes() == (whole / "r.predictions.jsonl").read_bytes()


# ---- tasks and prompts ----


def test_test_time_choices_are_the_same_on_every_run(world, tmp_path):
    for name in ("a", "b"):
        score(world, tmp_path / f"{name}.json", "--test_task", "ItemSearch", "--test_prompt_ids", "all")
    assert lines(tmp_path / "a.json") == lines(tmp_path / "b.json")
    assert len({row["prompt_id"] for row in lines(tmp_path / "a.json")}) == 11


def test_fusion_has_four_prompts_that_answer_with_an_item(world, tmp_path):
    found = score(world, tmp_path / "r.json", "--test_task", "fusionseqrec", "--test_prompt_ids", "all")
    assert found["config"]["prompt_ids"] == [8, 9, 10, 11]
    with pytest.raises(UserError, match="template 2 of fusionseqrec answers with title.*8, 9, 10, 11"):
        score(world, tmp_path / "s.json", "--test_task", "FusionSeqRec", "--test_prompt_ids", "8,2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--test_prompt_ids", "17"], "templates 0 to 16, not 17"),
        (["--test_prompt_ids", "a"], "numbers separated by commas"),
        (["--test_task", "Seq"], "SeqRec, ItemSearch or FusionSeqRec"),
        (["--metrics", "hit"], "--metrics"),
        (["--num_beams", "0"], "--num_beams"),
        (["--sample_num", "0"], "--sample_num"),
        (["--ckpt_path", ""], "--ckpt_path"),
        (["--max_his_len", "-1", "--his_sep", " and then " * 40], "--max_his_len"),
    ],
)
def test_mistakes_are_told(world, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        score(world, tmp_path / "r.json", *flags)


def test_a_model_is_asked_as_it_was_trained_unless_a_flag_says_otherwise(world, tmp_path, capsys):
    shutil.copytree(world / "ckpt", tmp_path / "ckpt")
    flags = ("--his_sep", " | ", "--no_eos", "--max_his_len", "3")
    frame = {
        "sft_prompt": "{instruction} = {response}",
        "all_prompt": {"seqrec": [{"instruction": "{inters}", "response": "{item}"}]},
    }
    (tmp_path / "p.json").write_text(json.dumps(frame))
    told = score(world, tmp_path / "told.json", *flags, "--prompt_file", str(tmp_path / "p.json"))
    form = HistoryFormat(3, False, " | ")
    data = load_data(str(world), "toy")
    PromptStyle(load_prompts(str(tmp_path / "p.json")), form, True, "toy").save(tmp_path / "ckpt", data)
    known = score(world, tmp_path / "known.json", "--ckpt_path", str(tmp_path / "ckpt"))
    assert (tmp_path / "known.predictions.jsonl").read_bytes() == (tmp_path / "told.predictions.jsonl").read_bytes()
    for key in ("max_his_len", "his_sep", "no_eos", "add_prefix"):
        assert known["config"]["arguments"][key] == told["config"]["arguments"][key]
    capsys.readouterr()
    score(world, tmp_path / "other.json", "--ckpt_path", str(tmp_path / "ckpt"), "--max_his_len", "2", "--no_eos")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: --")]
    assert len(notes) == 1 and "--max_his_len 2 instead of 3" in notes[0]
    assert lines(tmp_path / "other.json") != lines(tmp_path / "known.json")


def test_an_index_file_that_changed_since_the_training_is_refused(world, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "w")
    data = load_data(str(world), "toy")
    PromptStyle(load_prompts(), HistoryFormat(), False, "toy").save(tmp_path / "w/ckpt", data)
    path = tmp_path / "w/toy/toy.index.json"
    index = json.loads(path.read_text())
    index["4"], index["7"] = index["7"], index["4"]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"toy\.index\.json: item 4 is .* the model learned .*--allow_other_index"):
        score(tmp_path / "w", tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()
    assert score(tmp_path / "w", tmp_path / "r.json", "--allow_other_index")
    assert "warning: " in capsys.readouterr().out


def test_prompts_of_a_users_own_file(world, tmp_path):
    prompts = {
        "sft_prompt": "{instruction} = {response}",
        "all_prompt": {"seqrec": [{"instruction": "{inters}", "response": "{item}"}]},
    }
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    own = score(world, tmp_path / "own.json", "--prompt_file", str(tmp_path / "p.json"), "--test_prompt_ids", "all")
    assert own["config"]["prompt_ids"] == [0]
    score(world, tmp_path / "ours.json")
    assert [row["scores"] for row in lines(tmp_path / "own.json")] != [
        row["scores"] for row in lines(tmp_path / "ours.json")
    ]


# ---- memory ----


def test_too_little_memory_halves_the_batch_and_never_the_beams(world, tmp_path, monkeypatch):
    score(world, tmp_path / "a.json", "--test_batch_size", "8")
    sizes, search = [], scoring.beam_search

    def small_gpu(model, trie, input_ids, *rest):
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return search(model, trie, input_ids, *rest)

    monkeypatch.setattr(scoring, "beam_search", small_gpu)
    score(world, tmp_path / "b.json", "--test_batch_size", "8")
    assert sizes[:3] == [8, 4, 2] and 8 not in sizes[1:] and 4 not in sizes[2:]
    assert [row["items"] for row in lines(tmp_path / "a.json")] == [row["items"] for row in lines(tmp_path / "b.json")]
    monkeypatch.setattr(scoring, "beam_search", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(UserError, match="exceeds memory"):
        score(world, tmp_path / "c.json")


def verify(folder: Path) -> None:
    """data.py --verify of the world in `w/` and the results beside it."""
    words = ["--verify", "--data_path", str(folder / "w"), "--dataset", "toy", "--results_file", str(folder / "r.json")]
    data_check.main(words)


def test_results_are_verified_against_what_lies_there_now(world, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "w")
    score(tmp_path / "w", tmp_path / "r.json")
    verify(tmp_path)
    assert "every file is as it was" in capsys.readouterr().out
    items = tmp_path / "w/toy/toy.item.json"
    items.write_text(items.read_text() + "\n")
    (tmp_path / "w/ckpt/config.json").write_text((tmp_path / "w/ckpt/config.json").read_text() + "\n")
    with pytest.raises(UserError, match="2 files are not what they were"):
        verify(tmp_path)
    shown = capsys.readouterr().out
    assert "toy.item.json: is not the file" in shown and "ckpt: is not the model" in shown


def test_files_of_the_training_are_verified_too(world, tmp_path, capsys):
    shutil.copytree(world, tmp_path / "w")
    users = tmp_path / "w/toy/toy.user.json"
    files = {"user": {"path": str(users), "sha256": sha256(users)}}
    RunRecord([], {}, 1, "", {}, files, {}).write(tmp_path / "w/ckpt")
    score(tmp_path / "w", tmp_path / "r.json")
    verify(tmp_path)
    users.write_text(users.read_text() + "\n")
    with pytest.raises(UserError, match="1 files are not what they were"):
        verify(tmp_path)
    assert "toy.user.json: is not the file that the model was trained with" in capsys.readouterr().out


def test_other_errors_are_not_taken_for_memory(world, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "beam_search", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        score(world, tmp_path / "r.json")


def test_a_model_without_finite_numbers_is_told(world, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "beam_search", lambda *_: (torch.zeros(4, 8).long(), torch.full((4, 8), torch.nan)))
    with pytest.raises(UserError, match="not finite"):
        score(world, tmp_path / "r.json")


def test_fingerprint_sees_every_part(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(2_000_000))
    before = model_fingerprint(tmp_path)
    for content in (bytes(2_000_001), b"\1" + bytes(1_999_999), bytes(1_999_999) + b"\1"):
        (tmp_path / "model.safetensors").write_bytes(content)
        assert model_fingerprint(tmp_path) != before


def test_progress_is_told_once_a_minute(monkeypatch, capsys):
    now = iter([0.0, 30.0, 61.0, 90.0])
    monkeypatch.setattr(scoring.time, "monotonic", lambda: next(now))
    progress = scoring.Progress(100, "hit@1,ndcg@5")
    for _ in range(3):
        progress.add([{"target": 4, "items": [3, 4]}] * 10)
    progress.close()
    told = capsys.readouterr().out.splitlines()
    assert told == ["20 of 100 predictions, 0.3 a second, 0:04:04 left; hit@1 0.0000, ndcg@5 0.6309"]


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        test_script.main(["--help"])
    shown = capsys.readouterr().out
    for flag in ("--test_task", "--test_prompt_ids", "--prompt_file", "--restart", "--dtype", "--num_beams"):
        assert flag in shown
