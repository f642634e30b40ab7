"""Random and mutated files, requests and flags: whatever they hold, a `UserError` of one line or an answer; never a traceback."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_data
from abuse_world import prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import make_model

import finetune
import recommend
from adapters import read_lora_config
from arguments import ALL
from convert.folder import find_model
from data import USER_PARTS, load_data
from modeling import grow_vocabulary, load_for_test
from prompt import load_prompts
from prompt_style import PromptStyle, saved_items, saved_style
from reading import load_model, model_config, read_array
from results import parse_prediction, read_predictions, read_results
from run_folder import RunFolder, RunRecord, log_history
from tasks import HistoryFormat
from training_settings import read_deepspeed
from utils import UserError

EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
FEW = settings(EXAMPLES, max_examples=25)
STYLE = PromptStyle(load_prompts(), HistoryFormat(), dataset="Toy")

# ---- what may be written ----

numbers = st.one_of(
    st.integers(-3, 3), st.integers(), st.sampled_from([10**30, 2**63, -(2**64)]), st.floats(), st.booleans(), st.none()
)
texts = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "0", "01", "²", "-1", "\0", "../x", "{item}", "<a_0>", "nan"])
)
values = st.recursive(
    st.one_of(numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


def places(content: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all parts of a JSON value."""
    found = [path]
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


@st.composite
def spoilt(draw: st.DrawFn, raw: bytes) -> bytes:
    """A JSON text in which a part is another value, is missing or has another key, or whose bytes are cut or changed."""
    if draw(st.booleans()):
        start = draw(st.integers(0, len(raw)))
        return raw[:start] + draw(st.binary(max_size=5)) + raw[draw(st.integers(start, len(raw))) :]
    content = json.loads(raw)
    path = draw(st.sampled_from(places(content)))
    if not path:
        return json.dumps(draw(values)).encode("utf-8", "surrogatepass")
    part = content
    for key in path[:-1]:
        part = part[key]
    what = draw(st.integers(0, 2))
    if what == 0:
        part[path[-1]] = draw(values)
    elif what == 1 or isinstance(part, list):
        del part[path[-1]]
    else:
        part[draw(texts)] = part.pop(path[-1])
    return json.dumps(content).encode("utf-8", "surrogatepass")


def tried(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns; None where it says in one line what is wrong."""
    try:
        return function(*args)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return None


# ---- files ----


@pytest.fixture(scope="module")
def toy_path(tmp_path_factory) -> Path:
    return toy_data.write_dataset(tmp_path_factory.mktemp("properties"))


@pytest.mark.parametrize("kind", ["inter", "item", "index", "user"])
@EXAMPLES
@given(draw=st.data())
def test_files_of_a_dataset(toy_path, kind, draw):
    path = toy_path / f"Toy/Toy.{kind}.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(draw.draw(spoilt(whole)))
        data = tried(load_data, str(toy_path), "Toy", ".index.json", USER_PARTS)
        if data is not None:  # it is as good as any other
            assert all(len(items) >= 3 for items in data.inters.values())
            assert len(data.titles) == len(data.indices) == len(data.canonical)
    finally:
        path.write_bytes(whole)


RECORD = RunRecord(
    ["finetune.py"], {"seed": 1}, 1, "0", {}, {"inter": {"path": "x", "sha256": "0"}}, {}, ["config.json"]
)
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
DEEPSPEED = json.loads((Path(__file__).parents[1] / "config/ds_z3_bf16.json").read_text())
STATE = {"log_history": [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.0}], "global_step": 2}


def _deepspeed(folder: Path) -> Any:
    return read_deepspeed(str(folder / "x.json"), 8, 2, {"bf16"})


# what the file holds → its name, what reads it
FILES: dict[str, tuple[str, Any, Callable[[Path], Any]]] = {
    "prompts": ("x.json", prompts(), lambda folder: load_prompts(str(folder / "x.json"))),
    "style": ("prompt_style.json", None, saved_style),
    "items": ("item_index.json", None, saved_items),
    "record": ("run.json", vars(RECORD), lambda folder: RunRecord.read(folder / "run.json").check_same(RECORD, folder)),
    "settings": ("run.json", vars(RECORD), lambda folder: RunFolder(folder).record(insist=False)),
    "log": ("trainer_state.json", STATE, log_history),
    "results": (
        "r.json",
        {"config": {"arguments": {}, "task": "seqrec"}},
        lambda folder: read_results(folder / "r.json"),
    ),
    "DeepSpeed": ("x.json", DEEPSPEED, _deepspeed),
    "adapter": ("adapter_config.json", ADAPTER, lambda folder: read_lora_config(find_model(folder))),
}


@pytest.mark.parametrize("kind", FILES)
@EXAMPLES
@given(draw=st.data())
def test_other_json_files(toy_path, tmp_path, kind, draw):
    name, content, read = FILES[kind]
    if content is None:
        if not (tmp_path / "whole").exists():
            (tmp_path / "whole").mkdir()
            STYLE.save(tmp_path / "whole", load_data(str(toy_path), "Toy"))
        raw = (tmp_path / "whole" / name).read_bytes()
    else:
        raw = json.dumps(content).encode()
    (tmp_path / name).write_bytes(draw.draw(spoilt(raw)))
    tried(read, tmp_path)


@EXAMPLES
@given(draw=st.data())
def test_arrays(tmp_path, draw):
    file = io.BytesIO()
    np.save(file, np.ones((3, 2), np.float32))
    raw = file.getvalue()
    start = draw.draw(st.integers(0, len(raw)))
    changed = raw[:start] + draw.draw(st.binary(max_size=6)) + raw[draw.draw(st.integers(start, len(raw))) :]
    (tmp_path / "x.npy").write_bytes(changed)
    array = tried(read_array, tmp_path / "x.npy")
    assert array is None or array.dtype == np.float32


LINE = {"prompt_id": 0, "sample": 0, "user": "0", "target": 1, "target_item": 1, "items": [1, 2], "scores": [0.5, 0.25]}


@EXAMPLES
@given(draw=st.data())
def test_lines_of_predictions(tmp_path, draw):
    line = draw.draw(spoilt(json.dumps(LINE).encode()))
    try:
        parse_prediction(line)
    except ValueError as error:
        assert "\n" not in str(error)
    (tmp_path / "p.jsonl").write_bytes(line)
    tried(lambda: list(read_predictions(tmp_path / "p.jsonl")))


# ---- models ----


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    make_model("llama", folder)
    return folder


@FEW
@given(draw=st.data())
def test_configurations_of_models(model, tmp_path, draw):
    if not (tmp_path / "model").exists():
        shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model/config.json").write_bytes(draw.draw(spoilt((model / "config.json").read_bytes())))
    if tried(model_config, tmp_path / "model") is not None:
        tried(load_model, tmp_path / "model")


@FEW
@given(start=st.integers(0, 2000), more=st.binary(max_size=8))
def test_weights(model, tmp_path, start, more):
    if not (tmp_path / "model").exists():
        shutil.copytree(model, tmp_path / "model")
    raw = (model / "model.safetensors").read_bytes()
    (tmp_path / "model/model.safetensors").write_bytes(raw[:start] + more + raw[start + len(more) :])
    tried(load_model, tmp_path / "model")


# ---- requests and flags ----


@pytest.fixture(scope="module")
def recommender(model, toy_path, tmp_path_factory) -> recommend.Recommender:
    from modeling import add_item_tokens
    from tokenising import load_tokenizer

    data = load_data(str(toy_path), "Toy")
    folder = tmp_path_factory.mktemp("served")
    tokenizer, net = load_tokenizer(model), load_model(model)
    grow_vocabulary(net, tokenizer, add_item_tokens(tokenizer, data.item_tokens))
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return recommend.Recommender(*load_for_test(folder), data, STYLE, num_beams=3)


REQUESTS = [
    {"user": "1", "id": 7},
    {"history": [1, "Glue"], "top_k": 2, "exclude_history": True},
    {"query": "a pen", "id": {"a": [1]}},
]
HARSH = [b"[" * 200_000, b"9" * 5000, b"\xff\xfe", b'"\\ud800"', b'{"user": {"a": 1}}']
HARSH += [b'{"query": "' + b"word " * 50_000 + b'"}', b'{"history": [' + b"1, " * 20_000 + b"1]}"]
HARSH += [b'{"user": "1", "id": ' + b"[" * deep + b"]" * deep + b"}" for deep in range(900, 1000, 7)]
HARSH += [b'{"id": NaN, "user": "1"}', b'{"id": 1e999, "user": "1"}', b'{"history": ["' + b"9" * 5000 + b'"]}']


@settings(EXAMPLES, max_examples=40)
@given(draw=st.data())
def test_every_line_has_an_answer(recommender, capsys, draw):
    request = st.sampled_from(REQUESTS).flatmap(lambda content: spoilt(json.dumps(content).encode()))
    some = st.one_of(request, st.binary(max_size=20), st.sampled_from(HARSH))
    lines = draw.draw(st.lists(some, min_size=1, max_size=5))
    lines = [line.replace(b"\n", b" ") for line in lines if line.replace(b"\n", b" ").strip()]
    good = {"user": "1", "id": "still there"}
    args = argparse.Namespace(top_k=2, exclude_history=False)
    capsys.readouterr()
    recommend.respond(recommender, [*lines, json.dumps(good).encode()], args, 3, False)

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    told = capsys.readouterr().out.split("\n")[:-1]
    answers = [json.loads(line, parse_constant=refuse) for line in told]
    assert len(answers) == len(lines) + 1
    assert all(("error" in answer) != ("items" in answer) for answer in answers)
    assert answers[-1]["id"] == "still there" and len(answers[-1]["items"]) == 2


def test_the_harshest_lines(recommender, capsys):
    capsys.readouterr()
    recommend.respond(recommender, HARSH, argparse.Namespace(top_k=2, exclude_history=False), 3, False)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(HARSH) and sum('"error"' in line for line in told) >= len(HARSH) - 14


@EXAMPLES
@given(draw=st.data())
def test_flags(draw):
    flags = [flag for flag in ALL if flag.name not in ("lora",)]
    chosen = draw.draw(st.lists(st.sampled_from(flags), min_size=1, max_size=3))
    words = []
    for flag in chosen:
        words.append(f"--{flag.name}")
        if flag.kind is not None:
            words.append(
                draw.draw(st.one_of(texts, st.integers().map(str), st.floats().map(str), st.text(max_size=30)))
            )
    tried(finetune.parse, ["--deepspeed", "none", *words])
