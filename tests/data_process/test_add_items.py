"""New items get numbers after the old ones; everything else stays as it was."""

import json

import pytest

import provenance
from data_process import add_items, from_table
from utils import UserError


@pytest.fixture
def catalogue(tmp_path):
    (tmp_path / "e.csv").write_text(
        "user,item,time\n" + "".join(f"{u},{i},{t}\n" for u in "uv" for t, i in enumerate("bcd"))
    )
    (tmp_path / "i.csv").write_text("item,title,description\nb,B,\nc,C,\nd,D,\n")
    files = ["--interactions", str(tmp_path / "e.csv"), "--items", str(tmp_path / "i.csv"), "--k_core", "1"]
    from_table.main([*files, "--data_path", str(tmp_path / "data"), "--dataset", "Old"])
    return tmp_path


def add(root, table, *flags):
    (root / "n.csv").write_text(table)
    common = ["--data_path", str(root / "data"), "--dataset", "Old", "--new_dataset", "New"]
    add_items.main([*common, "--items", str(root / "n.csv"), *flags])
    return root / "data/New"


def test_old_numbers_stay(catalogue):
    new, old = (
        add(catalogue, "item,title,description\na,<b>A</b>,first\nc,other,\nz,,\na,twice,\ne,E,\n"),
        catalogue / "data/Old",
    )
    items, before = (json.loads(path.read_text()) for path in (new / "New.item.json", old / "Old.item.json"))
    assert {n: items[n] for n in before} == before
    assert [(n, items[n]["title"], items[n]["description"]) for n in items if n not in before] == [
        ("3", "A", "first"),
        ("4", "E", ""),
    ]
    assert (new / "New.item2id").read_text() == "b\t0\nc\t1\nd\t2\na\t3\ne\t4\n"
    assert (new / "New.inter.json").read_bytes() == (old / "Old.inter.json").read_bytes()
    assert provenance.verify(new, provenance.notes_of(new, "New")) == []
    (old / "Old.item.json").write_text("{}")
    assert provenance.verify(new, provenance.notes_of(new, "New"))


@pytest.mark.parametrize(
    ("table", "flags", "message"),
    [
        ("item,title,description\nb,B,\n", [], "no new item with a text"),
        ("item,title,description\n,B,\n", [], "line 2 has no item"),
        ("item,title\nx,B\n", [], "has no field 'description'"),
        ("item,title,description\nx,X,\n", ["--new_dataset", "Old"], "is the old one's name"),
        ("item,title,description\nx,X,\n", ["--new_dataset", "../x"], "is not a plain name"),
        ("item,title,description\nx,X,\n", ["--dataset", "None"], r"None\.item\.json: no such file"),
    ],
)
def test_refusals_write_nothing(catalogue, table, flags, message):
    with pytest.raises(UserError, match=message):
        add(catalogue, table, *flags)
    assert [path.name for path in (catalogue / "data").iterdir()] == ["Old"]


def test_what_is_there_is_replaced_only_if_asked(catalogue):
    table = "item,title,description\nx,X,\n"
    add(catalogue, table)
    with pytest.raises(UserError, match="--overwrite replaces it"):
        add(catalogue, table)
    add(catalogue, table, "--overwrite")
