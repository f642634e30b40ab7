"""benchmarks/reproduce.sh with a `python` that only writes down what it is asked to do."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stub_python import StubPython


@pytest.fixture
def reproduce(tmp_path):
    """A function that runs the script with rows and settings; it returns the finished process and the calls of Python."""
    stub = StubPython(tmp_path, "reproduce.sh")
    return lambda rows, **settings: stub.run(ROWS=rows, WORK=str(tmp_path / "work"), **settings)


def trained(calls: list[str]) -> dict[str, str]:
    """The flags of each call of finetune.py by its folder, from the row's name on."""
    calls = [call for call in calls if call.startswith("finetune.py")]
    return {call.split("--output_dir ")[1].split()[0].split("-epochs")[1].split("/", 1)[1]: call for call in calls}


def test_every_row_ends_with_the_same_histories_and_language_comes_before_them(reproduce):
    done, calls = reproduce("SEQ +ASY random:+MUT")
    assert done.returncode == 0, done.stderr
    runs = trained(calls)
    assert runs.keys() == {
        "SEQ/model",
        "+ASY/aligned/model",
        "+ASY/model",
        "random:+MUT/aligned/model",
        "random:+MUT/model",
    }
    words = "--init_item_tokens words"
    assert words in runs["SEQ/model"] and words in runs["+ASY/aligned/model"] and words not in runs["+ASY/model"]
    tasks = "--tasks item2index,index2item,fusionseqrec --train_data_sample_num 2000,300,600 --train_prompt_sample_num 1,1,1"
    assert tasks in runs["+ASY/aligned/model"] and "--only_train_response" in runs["+ASY/aligned/model"]
    assert "/+ASY/aligned/model " in runs["+ASY/model"].split("--output_dir")[0]
    assert "smollm2-random-seed42 " in runs["random:+MUT/aligned/model"]
    histories = {runs[name].split("--tasks")[1].replace(f" {words}", "") for name in runs if "aligned" not in name}
    assert len(histories) == 1 and " seqrec --longest_history_only" in next(iter(histories))
    assert "--new_rows_learning_rate 1e-2 " in histories.pop()
    assert all("--new_rows_learning_rate 1e-3 " in runs[name] for name in runs if "aligned" in name)
    (table,) = (call for call in calls if call.startswith("benchmarks/compare.py"))
    assert "--models SASRec" in table and "random:+MUT=" in table
    again, calls = reproduce("SEQ +ASY random:+MUT", BASELINES="")
    assert again.returncode == 0 and not trained(calls) and "--models --seeds 42 --work" in calls[-1]


def test_a_share_has_its_own_folder_and_a_row_that_fails_is_told(reproduce):
    done, calls = reproduce("+MUT SEQ", SHARE="0.1", FAILS="+MUT/aligned")
    assert done.returncode == 1 and "not all rows were done" in done.stderr
    assert "error: +MUT failed; the end of" in done.stderr and "out of luck" in done.stderr
    assert "--train_data_sample_num 200,30 " in trained(calls)["+MUT/aligned/model"]
    assert any(call.startswith("test.py") and "0.5-epochs-share0.1/SEQ/model" in call for call in calls)
    assert not any("compare.py" in call for call in calls)


@pytest.mark.parametrize("row", ["+XYZ", "random:+XYZ"])
def test_an_unknown_row_is_one_line(reproduce, row):
    done, calls = reproduce(f"SEQ {row}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"no row {row}" in done.stderr and not calls


@pytest.mark.parametrize(
    "settings",
    [{"SHARE": "abc"}, {"EPOCHS": "5; x"}, {"USERS": "1.2.3"}, {"SHARE": "-1"}, {"JOBS": "0"}, {"SEED": "1.5"}],
)
def test_a_setting_that_is_no_number_is_one_line(reproduce, settings):
    done, calls = reproduce("SEQ", **settings)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "must be a" in done.stderr and not calls


def test_a_share_of_one_is_the_whole_and_other_words_are_refused(reproduce, tmp_path):
    done, calls = reproduce("SEQ", SHARE="1.0")
    assert done.returncode == 0 and "seed42-5-epochs/SEQ/model" in " ".join(calls)
    stub = StubPython(tmp_path / "again", "reproduce.sh")
    for flag, status, word in (("--help", 0, "SEQ none | +MUT"), ("SEQ", 2, "settings are environment variables")):
        asked = subprocess.run([*stub.command, flag], env=stub.environment(), capture_output=True, text=True)
        assert asked.returncode == status and word in asked.stdout + asked.stderr


def test_what_another_recipe_made_is_refused(reproduce):
    assert reproduce("SEQ")[0].returncode == 0
    done, calls = reproduce("SEQ", FINETUNE_FLAGS="--dropout 0.1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "settings or scripts" in done.stderr and not calls


def eventually(true: Callable[[], object]) -> bool:
    """Whether it becomes true within a minute."""
    return any(true() or time.sleep(0.1) for _ in range(600))


def running(process: int) -> bool:
    """Whether it is there, and no zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_stopping_the_script_stops_its_rows(tmp_path):
    sleeper, stub = tmp_path / "sleeper", StubPython(tmp_path, "reproduce.sh")
    environment = stub.environment(ROWS="SEQ +MUT", SLEEPS=str(sleeper), JOBS="1")
    script = subprocess.Popen(stub.command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert eventually(lambda: sleeper.exists() and sleeper.read_text())
        script.send_signal(signal.SIGTERM)
        script.communicate(timeout=60)
    finally:
        script.kill()
    assert script.returncode == 130
    assert eventually(lambda: not running(int(sleeper.read_text())))
