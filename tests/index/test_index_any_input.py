"""Anything at all is handed over to index/: an answer, or one line that names the file; never another exception."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[2] / "index"))

from checkpoints import load_checkpoint, model_from_checkpoint
from commands import InputError
from embeddings import Embeddings
from extension import read_index
from index_report import item_titles
from index_world import make_index_world, with_header


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_index_world(tmp_path_factory.mktemp("sound"))


READERS: dict[str, Callable[[Path], Any]] = {
    "e.npy": lambda path: Embeddings(path, torch.device("cpu")),
    "D.index.json": read_index,
    "D.item.json": lambda path: item_titles(path, 90),
    "run/best_collision_model.pth": lambda path: model_from_checkpoint(load_checkpoint(path), path),
}
ANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("<a_1>"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("0 1 2 01 ² title".split()), inner),
    max_leaves=12,
)


def read_or_refuse(read: Callable[[Path], Any], path: Path) -> None:
    try:
        read(path)
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)


@pytest.mark.parametrize("name", READERS)
@ANY
@given(data=st.data())
def test_mutated_bytes(sound: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    content = bytearray((sound / name).read_bytes())
    end = data.draw(st.sampled_from([150, 1500, len(content)]))  # headers are where it hurts
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, min(end, len(content)) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "drop", "repeat"]))
        if kind == "set":
            content[position] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[max(position, 1) :]
        elif kind == "drop":
            del content[position : position + 3]
        else:
            content[position:position] = content[position : position + 40]
        if not content:
            break
    path = tmp_path / "x"
    path.write_bytes(content)
    read_or_refuse(READERS[name], path)


@pytest.mark.parametrize("name", ["D.index.json", "D.item.json"])
@ANY
@given(value=VALUES)
def test_any_json(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "x.json").write_text(json.dumps(value), encoding="utf-8")
    read_or_refuse(READERS[name], tmp_path / "x.json")


@ANY
@given(words=st.text("{}()[]'\"descr:fotan_sphue<f4,-0123456789 TrueFals", max_size=110))
def test_any_array_header(tmp_path: Path, words: str) -> None:
    (tmp_path / "e.npy").write_bytes(with_header(words))
    read_or_refuse(READERS["e.npy"], tmp_path / "e.npy")
