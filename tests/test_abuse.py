"""A table of abuses: whatever is wrong with a file or a flag is one line with its name, and nothing is written or removed.

The rows are in `abuse_rows*.py`, the world that they break in `abuse_world.py`.
"""

from __future__ import annotations

import re
import resource
import shutil
import signal
import stat
from pathlib import Path

import pytest
from abuse_rows import ASKING, DATA, FLAGS, PLACES
from abuse_rows_models import ADAPTERS, ARRAYS, DEEPSPEED, MODELS, RUNS
from abuse_rows_results import RESULT
from abuse_world import COMMANDS, Abuse, make_abuse_world

from utils import run_main

ROWS = [*DATA, *ASKING, *FLAGS, *PLACES, *MODELS, *ADAPTERS, *ARRAYS, *DEEPSPEED, *RUNS, *RESULT]
SECONDS = 60  # what takes longer hangs


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_abuse_world(tmp_path_factory.mktemp("abuse"))


@pytest.fixture
def clock():
    """Ends a command that waits for ever."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, bytes | int]:
    """Every path below `folder` with its bytes, or its kind where it is no regular file."""
    found: dict[str, bytes | int] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        found[str(path.relative_to(folder))] = path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
    return found


def run(abuse: Abuse, world: Path, capsys) -> list[str] | None:
    """The lines that the command says of a mistake, of which it has to end with status 2; None if it finds none."""
    main, own = COMMANDS[abuse.command]
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if abuse.room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (abuse.room, limits[1]))
        run_main(lambda: main([*own(world), *(flag.replace("{w}", str(world)) for flag in abuse.flags)]))
    except SystemExit as end:
        assert end.code == 2
        return [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return None


@pytest.mark.parametrize("abuse", ROWS, ids=str)
def test_it_is_one_line_and_nothing_is_lost(world, tmp_path, clock, capsys, abuse):
    copy = tmp_path / "w"
    shutil.copytree(world, copy, symlinks=True)
    if abuse.broken:
        abuse.broken(copy)
    before = contents(copy)
    said = run(abuse, copy, capsys)
    if abuse.told is None:
        assert said is None
        return
    assert said is not None, "nothing was said"
    assert len(said) == 1 and said[0].startswith("error: ") and len(said[0]) < 1000
    assert re.search(abuse.told, said[0]), said[0]
    after = contents(copy)
    assert {path for path in before if before[path] != after.get(path)} == set()
    assert after.keys() - before.keys() == set()


def test_the_table_is_long_and_no_row_is_there_twice():
    assert len(ROWS) >= 150
    assert len(set(map(str, ROWS))) == len(ROWS)
