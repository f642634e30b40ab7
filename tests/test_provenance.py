"""The record of where files come from: every change of an input or output is found, and nothing else."""

import json

import pytest

import provenance
from utils import UserError


@pytest.fixture
def chain(tmp_path):
    """raw.csv → D.item.json → D.emb.npy, each step noted."""
    folder = tmp_path / "data/D"
    folder.mkdir(parents=True)
    raw, items, vectors = tmp_path / "raw.csv", folder / "D.item.json", folder / "D.emb.npy"
    path = provenance.record_path(tmp_path / "data", "D")
    raw.write_text("raw")
    items.write_text("items")
    provenance.note_made(path, "from_table.py", [items], [raw])
    vectors.write_text("vectors")
    provenance.note_made(path, "embed.py", [vectors], [items], ("torch",))
    return path, raw, items, vectors


def test_all_is_well(chain):
    path, raw, *_ = chain
    assert provenance.verify(path.parent, provenance.read_provenance(path)) == []
    notes = provenance.read_provenance(path)
    assert list(notes["D.item.json"]["inputs"]) == [str(raw)]
    assert list(notes["D.emb.npy"]["inputs"]) == ["D.item.json"]  # a neighbour by its name: the folder can be moved
    assert set(notes["D.emb.npy"]["versions"]) == {"python", "torch"} and notes["D.emb.npy"]["command"]


def test_no_password_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["user_texts.py", "--base_url", "https://me:secret@host/v1"])
    (tmp_path / "D.user.json").write_text("")
    provenance.note_made(tmp_path / "D.provenance.json", "user_texts.py", [tmp_path / "D.user.json"], [])
    note = provenance.read_provenance(tmp_path / "D.provenance.json")["D.user.json"]
    assert note["command"] == "user_texts.py --base_url https://host/v1"


def test_a_moved_folder_is_still_well(chain, tmp_path):
    path, *_ = chain
    moved = path.parent.rename(tmp_path / "elsewhere")
    assert provenance.verify(moved, provenance.read_provenance(moved / path.name)) == []


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (lambda raw, items, vectors: raw.write_text("new"), ["D.item.json: was made from another"]),
        (
            lambda raw, items, vectors: items.write_text("new"),
            [
                "D.item.json: was changed after from_table.py",
                "D.emb.npy: was made from another D.item.json; run embed.py",
            ],
        ),
        (lambda raw, items, vectors: vectors.write_text("new"), ["D.emb.npy: was changed after embed.py made it"]),
        (lambda raw, items, vectors: vectors.unlink(), ["D.emb.npy: is not there any more (made by embed.py)"]),
        (lambda raw, items, vectors: raw.unlink(), ["raw.csv, which is not there any more"]),
    ],
)
def test_every_change_is_found(chain, change, faults):
    path, *files = chain
    change(*files)
    found = provenance.verify(path.parent, provenance.read_provenance(path))
    assert len(found) == len(faults) and all(part in fault for part, fault in zip(faults, found, strict=True))


@pytest.mark.parametrize(
    "content", [[], {"x": 1}, {"x": {"step": "a", "sha256": "b"}}, {"x": {"step": "a", "sha256": 1, "inputs": {}}}]
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no record of provenance"):
        provenance.read_provenance(tmp_path / "r.json")
