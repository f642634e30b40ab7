"""Folders whole or not at all: only what was written here is replaced or removed, and one process writes at a time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from folders import WRITTEN, locked, new_folder, remove_written, written
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent


def fill(folder: Path, text: str = "new") -> None:
    (folder / "part").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "part/more.txt"):
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    """Path → text of every file below `folder` but the record."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != WRITTEN]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def names(folder: Path) -> list[str]:
    """What lies in `folder`, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path):
    """A folder that was written here."""
    with new_folder(tmp_path / "target") as partial:
        fill(partial, "old")
    return tmp_path / "target"


def test_the_folder_is_there_when_the_block_has_ended_well(target):
    assert written(target) == ["config.json", "model.safetensors", "part/more.txt"]
    assert set(content(target).values()) == {"old"}
    assert names(target.parent) == ["target"]
    umask = os.umask(0)
    os.umask(umask)
    assert {(target / name).stat().st_mode & 0o777 for name in written(target)} == {0o666 & ~umask}


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_changes_nothing(target, failure):
    with pytest.raises(failure), new_folder(target, overwrite=True) as partial:
        fill(partial)
        raise failure
    assert set(content(target).values()) == {"old"}
    assert names(target.parent) == ["target"]


def test_overwriting_replaces_the_whole_folder(target):
    with pytest.raises(UserError, match="exists; choose another folder or add --overwrite"), new_folder(target):
        pass
    with new_folder(target, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
    assert content(target) == {"config.json": "new"}
    assert names(target.parent) == ["target"]


def test_what_was_not_written_here_is_never_replaced(target, tmp_path):
    (target / "part/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds part/notes.txt, which was not written here"), new_folder(target, True):
        pass
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("mine")
    with pytest.raises(UserError, match="was not written here"), new_folder(tmp_path / "thesis", True):
        pass
    with pytest.raises(UserError, match="a file is in the way"), new_folder(target / "config.json", True):
        pass
    assert content(tmp_path / "thesis") == {"chapter.tex": "mine"}
    assert content(target)["part/notes.txt"] == "mine"


@pytest.mark.parametrize("reads", ["target", "target/part", "target/../target"])
def test_what_is_read_is_not_replaced(target, reads):
    with pytest.raises(UserError, match="is what is read from"), new_folder(target, True, [target.parent / reads]):
        pass


def test_an_empty_folder_and_a_link_are_filled(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with new_folder(tmp_path / "link") as partial:
        fill(partial)
    assert (tmp_path / "link").is_symlink() and len(content(tmp_path / "disk")) == 3
    assert names(tmp_path) == ["disk", "link"]


def test_only_what_was_written_is_removed(target):
    (target / "README.md").write_text("mine")
    remove_written(target)
    assert content(target) == {"README.md": "mine"} and not (target / "part").exists()
    remove_written(target)
    assert content(target) == {"README.md": "mine"}


@pytest.mark.parametrize("text", ["[]", '{"files": "x"}', '{"files": ["../x"]}', '{"files": ["/x"]}', "{"])
def test_a_record_of_another_form_removes_nothing(target, text):
    (target / WRITTEN).write_text(text)
    with pytest.raises(UserError, match=WRITTEN):
        remove_written(target)
    assert len(content(target)) == 3


def test_the_lock_goes_with_its_process(tmp_path):
    script = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from folders import new_folder
with new_folder({str(tmp_path / "target")!r}) as partial:
    (partial / "config.json").write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as other:
        assert other.stdout.readline() == "ready\n"
        for kind in (new_folder, locked):
            with pytest.raises(UserError, match="another process is writing it now"), kind(tmp_path / "target"):
                pass
        other.kill()
    with new_folder(tmp_path / "target") as partial:
        assert names(partial) == []
        fill(partial)
    assert names(tmp_path) == ["target"]


def test_a_folder_moved_aside_by_a_killed_process_comes_back(target):
    target.rename(target.parent / ".target.old")
    with pytest.raises(UserError, match="exists"), new_folder(target):
        pass
    assert len(content(target)) == 3


def test_an_error_says_whether_a_read_or_a_write_failed(tmp_path):
    target, source = tmp_path / "out", tmp_path / "base" / "model.safetensors"
    read = rf"^{source}: cannot be read \(Input/output error\); {target} is as it was before$"
    with pytest.raises(UserError, match=read), new_folder(target):
        raise OSError(errno.EIO, "Input/output error", str(source))
    full = rf"^{target}: cannot be written \(No space left on device\)"
    for named in ((), (str(tmp_path / ".out.partial" / "model.safetensors"),)):
        with pytest.raises(UserError, match=full), new_folder(target):
            raise OSError(errno.ENOSPC, "No space left on device", *named)
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be made"), new_folder(tmp_path / "file" / "target"):
        pass
    assert names(tmp_path) == ["file"]
