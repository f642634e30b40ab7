"""recommend.py: the answers equal test.py's lists and brute force; mistakes get one clear line."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scoring_world import make_world

import recommend
import test as test_script
from collator import encode_prompts
from data import load_data
from modeling import load_for_test
from prompt import load_prompts
from prompt_style import PromptStyle
from tasks import HistoryFormat
from utils import UserError

ROOT = Path(__file__).parents[1]
STYLE = PromptStyle(load_prompts(), HistoryFormat())


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def recommender(world) -> recommend.Recommender:
    model, tokenizer = load_for_test(str(world / "ckpt"))
    return recommend.Recommender(model, tokenizer, load_data(str(world), "toy"), STYLE)


def flags(world: Path, *more: str) -> list[str]:
    return ["--ckpt_path", str(world / "ckpt"), "--data_path", str(world), "--dataset", "toy", *more]


def run(world: Path, capsys, *more: str) -> list[dict]:
    capsys.readouterr()
    recommend.main(flags(world, *more))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_histories_get_the_lists_of_test_py(world, capsys, tmp_path):
    """test.py predicts the last item from what precedes it: the same lists for these histories."""
    test_script.main(flags(world, "--results_file", str(tmp_path / "r.json"), "--metrics", "hit@10"))
    wanted = [json.loads(line) for line in (tmp_path / "r.predictions.jsonl").read_text().splitlines()]
    inters = json.loads((world / "toy/toy.inter.json").read_text())
    (tmp_path / "q.jsonl").write_text(
        "".join(
            json.dumps({"history": inters[row["user"]][:-1], "id": row["user"], "top_k": 20}) + "\n" for row in wanted
        )
    )
    found = run(world, capsys, "--requests", str(tmp_path / "q.jsonl"), "--batch_size", "5")
    assert [answer["id"] for answer in found] == [row["user"] for row in wanted]
    for answer, row in zip(found, wanted, strict=True):
        assert [item["item"] for item in answer["items"]] == row["items"]
        assert [item["score"] for item in answer["items"]] == pytest.approx(row["scores"], abs=1e-5)


@torch.inference_mode()
def test_scores_are_log_probabilities_of_the_whole_answer(recommender):
    data, model, tokenizer = recommender.data, recommender.scorer.model, recommender.scorer.tokenizer
    answer = recommender.answer([recommender.request({"history": [3, 9, 4], "top_k": 5})])[0]
    inters = HistoryFormat().join([data.index_text(item) for item in (3, 9, 4)])
    prompt = recommender.prompts.prompt(recommender.prompts.of("seqrec")[0], {"inters": inters})
    start = encode_prompts(tokenizer, [prompt])[0]
    for row in answer["items"]:
        end = [*tokenizer.convert_tokens_to_ids(list(data.indices[row["item"]])), tokenizer.eos_token_id]
        logits = model(torch.tensor([start + end])).logits[0, len(start) - 1 : -1].log_softmax(-1)
        assert row["score"] == pytest.approx(float(logits[range(len(end)), end].sum()), abs=1e-4)


def test_users_histories_queries_in_one_call(world, capsys):
    found = run(
        world, capsys, "--users", "0,7", "--history", "3", "5", "--history", "9", "--query", "a lamp", "--top_k", "3"
    )
    assert [set(answer) - {"items"} for answer in found] == [{"user"}, {"user"}, {"history"}, {"history"}, {"query"}]
    titles = {int(i): row["title"] for i, row in json.loads((world / "toy/toy.item.json").read_text()).items()}
    for answer in found:
        assert len(answer["items"]) == 3
        assert all(row["title"] == titles[row["item"]] for row in answer["items"])
    assert run(world, capsys, "--query", "a lamp", "--top_k", "3") == found[-1:]


def test_the_history_can_be_excluded_and_the_list_stays_full(recommender):
    data = recommender.data
    everything = recommender.request({"history": list(range(40)), "top_k": 20, "exclude_history": True})
    answer = recommender.answer([everything])[0]
    assert len(answer["items"]) == len(
        {data.canonical[item] for item in range(60)} - {data.canonical[i] for i in range(40)}
    )
    assert not {row["item"] for row in answer["items"]} & {data.canonical[item] for item in range(40)}
    free = recommender.answer([recommender.request({"history": list(range(40)), "top_k": 60})])[0]
    kept = [row["item"] for row in free["items"] if row["item"] not in {data.canonical[item] for item in range(40)}]
    assert [row["item"] for row in answer["items"]] == kept


def test_an_answer_does_not_depend_on_what_is_asked_beside_it(recommender, monkeypatch):
    """A long list needs more beams, which would find other items for a neighbour."""
    monkeypatch.setattr(recommender, "num_beams", 2)
    few, many = recommend.Request([1, 2], top_k=2), recommend.Request([3], top_k=10**12)
    (alone,), (beside, long) = recommender.answer([few]), recommender.answer([few, many])
    assert beside == alone and len(long["items"]) == len(set(recommender.data.canonical))


def test_items_that_share_an_index_are_named(recommender):
    answer = recommender.answer([recommender.request({"history": [3], "top_k": 60})])[0]
    named = {row["item"]: row["same_index"] for row in answer["items"] if "same_index" in row}
    assert named[0][-1] == 58 and named[1][-1] == 59


def test_items_by_title(recommender):
    title = recommender.data.titles[7]
    assert recommender.item(f" {title.upper()}! ") == recommender.item("7") == recommender.item(7) == 7
    with pytest.raises(UserError, match=rf"nearest: '{title}' \(7\)"):
        recommender.item(title[:-1] + "x7")
    for wrong in ("60", -1, True):
        with pytest.raises(UserError, match="0 to 59"):
            recommender.item(wrong)


def test_a_loaded_process_answers_line_by_line(world):
    """Each line is answered before the next is sent; wrong lines do not end the process."""
    process = subprocess.Popen(
        [sys.executable, "recommend.py", *flags(world, "--requests", "-")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    answers = []
    for line in (
        '{"user": "3", "id": "x"}',
        '{"user": "nobody", "id": 5}',
        "{",
        "[]",
        "[" * 200_000,
        '{"user": ' + "9" * 5000 + "}",
        '{"query": "\\ud800"}',
        "\xff",
        '{"user": "3", "user": "4"}',
        json.dumps({"query": "lamp " * 100_000}),
        '{"user": "3", "exclude_history": "false"}',
        '{"history": [1, 2], "top_k": 1}',
    ):
        process.stdin.write(line.encode("latin-1") + b"\n")
        process.stdin.flush()
        answers.append(json.loads(process.stdout.readline()))
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert answers[0]["id"] == "x" and len(answers[0]["items"]) == 10
    assert answers[1]["id"] == 5 and "nobody" in answers[1]["error"]
    wanted = [
        "broken JSON",
        "an object",
        "nested too deep",
        "broken JSON",
        "surrogate",
        "not UTF-8",
        "'user' occurs twice",
    ]
    wanted += ["the model takes", "must be true or false"]
    for answer, words in zip(answers[2:-1], wanted, strict=True):
        assert words in answer["error"]
    assert answers[-1]["history"] == [1, 2] and len(answers[-1]["items"]) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"user": "3", "query": "x"}, "exactly one"),
        ({"users": "3"}, "unknown key 'users'"),
        ({"history": []}, "at least one item"),
        ({"history": [1.5]}, "neither an id nor a title"),
        ({"history": ["no such title"]}, "nearest"),
        ({"query": " "}, "query must be a text"),
        ({"user": "3", "top_k": 0}, "top_k"),
    ],
)
def test_wrong_requests_are_told(recommender, line, message):
    with pytest.raises(UserError, match=message):
        recommender.request(line)


def test_templates_that_do_not_fit_are_refused(recommender):
    other = recommend.Recommender(
        recommender.scorer.model, recommender.scorer.tokenizer, recommender.data, STYLE, prompt_id=3
    )
    assert other.answer([other.request({"history": [4]})])[0]["items"]
    with pytest.raises(UserError, match="--prompt_id 3: of itemsearch only 6, 7, 8, 9, 10"):
        other.answer([other.request({"query": "x"})])


def test_table_is_readable(world, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"user": "nobody"}\n')))
    capsys.readouterr()
    recommend.main(flags(world, "--history", "3", "5", "--top_k", "2", "--format", "table", "--requests", "-"))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "history [3, 5]" and shown[1].split()[0] == "1" and shown[2].split()[0] == "2"
    assert any("nobody" in line for line in shown)


@pytest.mark.parametrize(
    ("more", "message"),
    [([], "nothing is asked"), (["--requests", "absent.jsonl"], "no such file"), (["--users", "x"], "'x'")],
)
def test_mistakes_are_told(world, more, message):
    with pytest.raises(UserError, match=message):
        recommend.main(flags(world, *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--users", "0"], "the checkpoint, which knows items alone: give --data_path"),
        (["--users", "all"], "the checkpoint, which knows items alone: give --data_path"),
        (["--history", "600"], "item 600 is unknown"),
        (["--history", "no such title"], "nearest"),
    ],
)
def test_what_is_asked_is_understood_before_the_model_is_loaded(world, tmp_path, monkeypatch, more, message):
    folder = tmp_path / "ckpt"
    folder.mkdir()
    (folder / "config.json").write_text("{}")  # nothing that could be loaded
    STYLE.save(folder, load_data(str(world), "toy"))
    with pytest.raises(UserError, match=message):
        recommend.main(["--ckpt_path", str(folder), *more])


def test_a_model_without_items_needs_a_dataset(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="knows no items .*; give --data_path and --dataset"):
        recommend.main(["--ckpt_path", str(world / "ckpt"), "--history", "1"])
    assert "does not say how it wants to be asked" in capsys.readouterr().err


def test_the_model_names_its_dataset(world, tmp_path, capsys):
    shutil.copytree(world / "ckpt", tmp_path / "ckpt")
    PromptStyle(load_prompts(), HistoryFormat(), dataset="toy").save(tmp_path / "ckpt", load_data(str(world), "toy"))
    recommend.main(["--ckpt_path", str(tmp_path / "ckpt"), "--data_path", str(world), "--users", "0"])
    shown = capsys.readouterr()
    assert shown.err.count("note: --dataset toy, as ") == 1 and json.loads(shown.out.splitlines()[-1])["user"] == "0"
    assert "Loading weights" not in shown.err
    with pytest.raises(UserError, match="other: no such folder"):
        recommend.main(
            ["--ckpt_path", str(tmp_path / "ckpt"), "--data_path", str(world), "--dataset", "other", "--users", "0"]
        )
