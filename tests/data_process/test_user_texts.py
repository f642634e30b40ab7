"""User texts of an endpoint, against a local server that answers, fails, stalls, throttles and talks nonsense; local models."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chat_server import GOOD, ChatServer, stall
from tiny_models import make_model
from toy_data import INTERS, ITEMS, write_dataset

import provenance
from data import load_data
from data_process import user_texts
from utils import UserError

ROOT = Path(__file__).parents[2]
SECRET = "sk-a-secret-that-nobody-may-see"
# Toy has 4 users; 1 has three items, so no history for a preference: 3 preferences, and 2 intentions of each user
TARGETS = {"train": [2, 5, 0, 0], "test": [4, 3, 1, 4]}
CALLS = 3 + len(set(TARGETS["train"] + TARGETS["test"]))  # intentions for one item are one question


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)  # the waits between tries
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)


def run(toy, server, *more):
    flags = ["--data_path", str(toy), "--dataset", "Toy", "--base_url", server.url, "--model", "m", "--overwrite"]
    user_texts.main([*flags, *more])
    return json.loads((toy / "Toy" / "Toy.user.json").read_text())


def everything_written(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def test_texts_parts_and_targets(toy, capsys):
    with ChatServer() as server:
        content = run(toy, server)
    assert content["made_by"] == {
        "program": "data_process/user_texts.py",
        "seed": 42,
        "method": "endpoint",
        "model": "m",
        "texts_by_model": 11,
        "texts_by_rule": {"preference": 0, "train": 0, "test": 0, "without_history": 1},
        "base_url": server.url,
        "reviews": False,
    }
    assert content["user_explicit_preference"]["0"] == GOOD["preferences"]
    assert content["user_explicit_preference"]["1"] == ["The user has no marked preference yet."]
    for split, back in (("train", 3), ("test", 1)):
        for user, row in content["user_vague_intention"][split].items():
            assert (row["item"], row["inters"]) == (INTERS[user][-back], INTERS[user][:-back])
            assert row["querys"] == [GOOD["user_intention"], GOOD["item_intention"]]
    load_data(str(toy), "Toy", user_parts=("preference", "train", "test"))
    assert len(server.calls) == CALLS
    printed = capsys.readouterr()
    assert "11 texts by m; tokens paid now: 900 + 180" in printed.out
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    assert SECRET not in everything_written(toy) + printed.out + printed.err


def test_preferences_see_nothing_of_the_held_out_items(toy):
    with ChatServer() as server:
        run(toy, server)
    lists = [prompt for prompt in server.prompts() if '"preferences"' in prompt]
    first = next(prompt for prompt in lists if "Red Pen" in prompt and "Blue Pen" in prompt)  # user 0: items 0, 1
    assert all(ITEMS[item]["title"].strip("`! ") not in first for item in "234")


def test_a_restart_pays_for_nothing_twice(toy):
    """Killed after four answers, in the middle of writing a fifth."""
    with ChatServer(lambda call, body: json.dumps(GOOD) if call < 4 else (401, {})) as server:
        with pytest.raises(UserError, match="says 401"):
            run(toy, server, "--concurrency", "1")
        assert len(server.calls) == 5
    answers = toy / "Toy" / "Toy.user.answers.jsonl"
    assert len(answers.read_text().splitlines()) == 4 and not _half_written(toy)
    with open(answers, "a") as file:
        file.write('{"key": "abc", "answ')
    with ChatServer() as server:
        content = run(toy, server)
        assert len(server.calls) == CALLS - 4 and content["made_by"]["texts_by_model"] == 11
        run(toy, server)
        assert len(server.calls) == CALLS - 4
    assert [json.loads(line)["key"] for line in answers.read_text().splitlines() if not line.endswith('"answ')]


def _half_written(toy):
    """The old file of user texts is there, whole, and no temporary one."""
    assert "user_explicit_preference" in json.loads((toy / "Toy" / "Toy.user.json").read_text())
    return [path for path in (toy / "Toy").iterdir() if path.name.startswith(".")]


def test_another_model_is_asked_anew(toy):
    with ChatServer() as server:
        run(toy, server)
        run(toy, server, "--model", "other")
        assert len(server.calls) == 2 * CALLS


@pytest.mark.parametrize("trouble", [(429, {"Retry-After": "0.01"}), (500, {}), (503, {}), (408, {})])
def test_trouble_that_passes_is_waited_for(toy, trouble):
    with ChatServer(lambda call, body: trouble if call % 3 else json.dumps(GOOD)) as server:
        assert run(toy, server, "--retries", "20")["made_by"]["texts_by_model"] == 11
    assert len(server.calls) > CALLS


def test_silence_is_waited_for_and_asked_again(toy):
    def answer(call, body):
        if call < 3:
            stall(1.0)
        return json.dumps(GOOD)

    with ChatServer(answer) as server:
        assert run(toy, server, "--timeout", "0.4")["made_by"]["texts_by_model"] == 11


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda call, body: (503, {}), "says 503 even after 3 tries"),
        (lambda call, body: (429, {}), "says 429 even after 3 tries"),
        (lambda call, body: stall(0.6) or (500, {}), r"does not answer, tried 3 times"),
        (lambda call, body: (401, {}), "says 401 "),
        (lambda call, body: (404, {}), "says 404 "),
        (lambda call, body: (400, {}), "refuses every question"),
    ],
)
def test_trouble_that_stays_is_one_line(toy, answer, message):
    with ChatServer(answer) as server, pytest.raises(UserError, match=message) as error:
        run(toy, server, "--retries", "2", "--timeout", "0.2")
    assert "the same command goes on" in str(error.value) and not _half_written(toy)


def test_no_endpoint_there(toy):
    with ChatServer() as server:
        pass
    with pytest.raises(UserError, match="does not answer, tried 1 times"):
        run(toy, server, "--retries", "0")


NONSENSE = [
    "I cannot help with that.",
    "",
    "{",
    '{"preferences": "one text"}',
    '{"preferences": [], "user_intention": 5, "item_intention": "no"}',
    '{"preferences": [" "], "user_intention": "…", "item_intention": "…"}',
    json.dumps({"preferences": ["word " * 200], "user_intention": "word " * 200, "item_intention": "a fine thing"}),
    b"<html>502 but with status 200</html>",
    b"[" * 200_000,
    b'{"choices": ' + b"9" * 5000 + b"}",
    b'{"choices": [{"message": {"content": 5}}], "usage": {"prompt_tokens": 1e999, "completion_tokens": -1}}',
    b"\xff\xfe" * 50,
    b"\x1f\x8b\x08" + bytes(50),
    '{"preferences": ' + "9" * 5000 + "}",
    "{" * 20_000,
    '{"preferences": ["\ud800 likes pens of all kinds"], "user_intention": "\0", "item_intention": 3}',
    b"[]",
    b"null",
    b'{"choices": []}',
    b'{"choices": [{"message": {"content": null}}]}',
    b'{"choices": [{"message": {"content": [1, 2]}}]}',
    b'{"error": "x"}',
]


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_is_asked_again_then_made_by_rule_and_counted(toy, nonsense, capsys):
    with ChatServer(lambda call, body: nonsense) as server:
        content = run(toy, server, "--tries", "2")
        assert len(server.calls) == 2 * CALLS
        run(toy, server, "--tries", "2")
        assert len(server.calls) == 2 * CALLS  # nonsense has been paid for too
    by_rule = {"preference": 3, "train": 4, "test": 4, "without_history": 1}
    assert content["made_by"]["texts_by_rule"] == by_rule and content["made_by"]["texts_by_model"] == 0
    assert "by rule, as no answer was well formed: 3 preference, 4 train, 4 test" in capsys.readouterr().out
    load_data(str(toy), "Toy", user_parts=("preference", "train", "test"))
    assert "red pen" in content["user_explicit_preference"]["0"][0]


def test_the_second_answer_counts_and_has_another_seed(toy):
    def answer(call, body):
        return json.dumps(GOOD) if body["seed"] else "Sure!"

    with ChatServer(answer) as server:
        assert run(toy, server)["made_by"]["texts_by_model"] == 11
        assert len(server.calls) == 2 * CALLS


def test_settings_for_models_that_want_others(toy):
    with ChatServer() as server:
        run(toy, server, "--settings", '{"max_completion_tokens": 9, "response_format": {"type": "json_object"}}')
        assert server.calls[0].keys() == {"model", "messages", "max_completion_tokens", "response_format"}
        for wrong in ("[]", "{", '{"model": "x"}'):
            with pytest.raises(UserError, match="--settings"):
                run(toy, server, "--settings", wrong)
        run(toy, server, "--model", "m2", "--temperature", "0.1")
    sent = {name: value for name, value in server.calls[-1].items() if name != "messages"}
    assert sent == {"model": "m2", "temperature": 0.1, "max_tokens": 200, "seed": 0}


def test_a_question_that_is_refused_is_left_to_the_rule(toy):
    def answer(call, body):
        return (400, {}) if "Glue" in body["messages"][-1]["content"] else "```json\n" + json.dumps(GOOD) + "\n```"

    with ChatServer(answer) as server:
        content = run(toy, server, "--concurrency", "1")
    refused = sum("Glue" in prompt for prompt in set(server.prompts()))
    assert sum(content["made_by"]["texts_by_rule"].values()) - 1 == refused > 0


def test_titles_are_taken_out_of_their_own_query(toy):
    """A model that names every item: the target's title goes, other titles may stay."""
    titles = [item["title"].strip(" .!`") for item in ITEMS.values()]
    told = GOOD | {
        "user_intention": f"I need {', '.join(titles)} for work.",
        "item_intention": "GLUE that sticks well.",
    }
    with ChatServer(lambda call, body: json.dumps(told)) as server:
        content = run(toy, server)
    for part in content["user_vague_intention"].values():
        for row in part.values():
            text = " ".join(row["querys"]).lower()
            assert titles[row["item"]].lower() not in text
            assert titles[(row["item"] + 1) % 5].lower() in text


def test_not_more_at_once_than_allowed(toy):
    def answer(call, body):
        stall(0.05)
        return json.dumps(GOOD)

    with ChatServer(answer) as server:
        run(toy, server, "--concurrency", "3")
    assert 1 < server.busiest <= 3


def test_the_key_is_not_written_even_if_the_endpoint_repeats_it(toy, capsys):
    with ChatServer(lambda call, body: json.dumps(GOOD | {"preferences": [f"key {SECRET} was used"]})) as server:
        run(toy, server)
    wrong_key = pytest.raises(UserError, match=r"wrong key \*\*\*")
    with ChatServer(lambda call, body: (401, {}, f"wrong key {SECRET}")) as server, wrong_key as error:
        run(toy, server, "--model", "other")
    printed = capsys.readouterr()
    assert SECRET not in everything_written(toy) + printed.out + printed.err + str(error.value)


def test_dry_run_counts_and_asks_nothing(toy, capsys):
    (toy / "Toy" / "Toy.user.json").unlink()
    with ChatServer() as server:
        flags = ["--data_path", str(toy), "--dataset", "Toy", "--base_url", server.url, "--model", "m", "--dry_run"]
        user_texts.main([*flags, "--price_in", "1000000", "--price_out", "0", "--max_tokens", "50"])
        printed = capsys.readouterr().out
        assert not server.calls and not (toy / "Toy" / "Toy.user.json").exists()
        run(toy, server)
        letters = sum(len(message["content"]) for call in server.calls for message in call["messages"])
        assert f"{CALLS} calls for 11 texts" in printed
        assert (
            f"about {letters // 4:,} tokens in the questions, about {80 * CALLS} in the answers, {50 * CALLS}"
            in printed
        )
        assert f"about ${letters // 4:,}.00" in printed
        user_texts.main(flags)
        assert "0 calls" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base_url", "http://x/v1"], "--base_url and --model: give both"),
        (["--base_url", "http://x/v1", "--model", "m", "--local_model", "x"], "give one of them"),
        (["--base_url", "ftp://x", "--model", "m"], "--base_url: give an address"),
        (["--base_url", "http://me:word@x/v1", "--model", "m"], "leave user, password and query out"),
        (["--dry_run"], "cost nothing"),
        (["--concurrency", "0"], "--concurrency: '0' is not"),
        (["--timeout", "0"], "--timeout: '0' is not"),
        (["--price_in", "nan"], "--price_in: 'nan' is not"),
        (["--local_model", "./nowhere"], "no such folder"),
    ],
)
def test_wrong_flags(toy, flags, message):
    with pytest.raises(UserError, match=message):
        user_texts.main(["--data_path", str(toy), "--dataset", "Toy", "--overwrite", *flags])


def test_the_official_endpoint_wants_a_key(toy, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    flags = ["--data_path", str(toy), "--dataset", "Toy", "--overwrite", "--model", "m"]
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        user_texts.main([*flags, "--base_url", "https://api.openai.com/v1"])
    with ChatServer() as server:  # one's own endpoint may want none
        user_texts.main([*flags, "--base_url", server.url])
        assert server.headers[0]["authorization"] == "Bearer none"


# ---- reviews ----


def write_reviews(toy, change=None):
    reviews = {
        user: [{"item": item, "text": f"Review of {item}<br>by {user}", "rating": 4.5, "time": 1} for item in items]
        for user, items in INTERS.items()
    }
    if change:
        change(reviews)
    (toy / "Toy" / "Toy.review.json").write_text(json.dumps(reviews))


def test_reviews_go_into_the_questions(toy):
    def change(reviews):
        reviews["2"][0] |= {"text": None, "rating": None}
        reviews["0"][4]["summary"] = "Five stars"

    write_reviews(toy, change)
    with ChatServer() as server:
        content = run(toy, server)
    assert content["made_by"]["reviews"] is True
    notes = provenance.notes_of(toy / "Toy", "Toy")
    assert list(notes["Toy.user.json"]["inputs"]) == ["Toy.inter.json", "Toy.item.json", "Toy.review.json"]
    assert provenance.verify(toy / "Toy", notes) == []
    text = "\n".join(server.prompts())
    assert "- Red Pen., rated 4.5; the user wrote: Review of 0 by 0" in text
    assert "The user's review: Five stars: Review of 4 by 0" in text
    assert "Review of 3 by 1" in text and "Review of 3 by 0" not in text  # user 0's item 3 is the validation target
    assert "Review of 2 by 2" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(x=[]), r"user 'x' is not a user of the interaction file"),
        (lambda r: r["0"].pop(), r"user '0': the reviews' items must be those of the interaction file, in its order"),
        (lambda r: r["0"].reverse(), "in its order"),
        (lambda r: r["0"][1].update(text=5), "'text' of review 1 is no text"),
        (lambda r: r["0"][1].update(rating="x"), "'rating' of review 1"),
        (lambda r: r.update({"0": {"1": "text"}}), "must have a list of objects"),
    ],
)
def test_wrong_reviews_are_one_line(toy, change, message):
    write_reviews(toy, change)
    with ChatServer() as server, pytest.raises(UserError, match=message):
        run(toy, server)
    assert not server.calls


# ---- a killed process, local models ----


@pytest.mark.slow
def test_killed_in_the_middle(toy):
    """A real process, killed while answers arrive: what was answered is not asked again."""

    def answer(call, body):
        stall(0.2)
        return json.dumps(GOOD)

    with ChatServer(answer) as server:
        command = [sys.executable, str(ROOT / "data_process" / "user_texts.py"), "--data_path", str(toy), "--overwrite"]
        flags = ["--dataset", "Toy", "--base_url", server.url, "--model", "m", "--concurrency", "1"]
        answers = toy / "Toy" / "Toy.user.answers.jsonl"
        process = subprocess.Popen([*command, *flags], env=os.environ.copy())
        while process.poll() is None and not (answers.exists() and answers.read_text().count("\n") >= 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = answers.read_text().count("\n")
        assert 3 <= kept < CALLS
        before = len(server.calls)
        assert run(toy, server)["made_by"]["texts_by_model"] == 11
        assert len(server.calls) - before == CALLS - kept


def test_a_local_model_of_chance(toy, tmp_path):
    """A random model writes nonsense: everything by rule, in bounded time, and nothing is generated twice."""
    make_model("llama", tmp_path / "model")
    flags = ["--data_path", str(toy), "--dataset", "Toy", "--overwrite", "--local_model", str(tmp_path / "model")]
    user_texts.main([*flags, "--max_tokens", "8", "--tries", "2", "--batch_size", "4"])
    made_by = json.loads((toy / "Toy" / "Toy.user.json").read_text())["made_by"]
    assert made_by["method"] == "local_model"
    assert made_by["texts_by_model"] + sum(made_by["texts_by_rule"].values()) == 12
    rows = [json.loads(line) for line in (toy / "Toy" / "Toy.user.answers.jsonl").read_text().splitlines()]
    assert all(row["answer"].startswith(('{"preferences": ["', '{"user_intention": "')) for row in rows)
    assert CALLS <= len(rows) <= 2 * CALLS and all(row["tokens"]["answer"] <= 8 for row in rows)


@pytest.mark.slow
def test_smollm2_writes_texts(tmp_path, smollm2_folder):
    toy = write_dataset(tmp_path / "data", inter={"0": INTERS["0"]}, user=None)  # a user: minutes on one core
    flags = ["--data_path", str(toy), "--dataset", "Toy", "--local_model", str(smollm2_folder)]
    user_texts.main([*flags, "--max_tokens", "100", "--tries", "2"])
    content = json.loads((toy / "Toy" / "Toy.user.json").read_text())
    assert content["made_by"]["texts_by_model"] > 0
    load_data(str(toy), "Toy", user_parts=("preference", "train", "test"))
