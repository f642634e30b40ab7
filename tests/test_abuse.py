"""A table of abuses: whatever is wrong with a file or a flag is one line with its name, and nothing is written or removed.

The rows are in `abuse_rows*.py`, the world that they break in `abuse_world.py`.
"""

from __future__ import annotations

import pytest
from abuse_check import Abuse, check
from abuse_rows import ASKING, DATA, FLAGS, PLACES
from abuse_rows_again import AGAIN
from abuse_rows_models import ADAPTERS, ARRAYS, DEEPSPEED, MODELS, RUNS
from abuse_rows_results import RESULT
from abuse_world import COMMANDS

ROWS = [*DATA, *ASKING, *FLAGS, *PLACES, *MODELS, *ADAPTERS, *ARRAYS, *DEEPSPEED, *RUNS, *RESULT, *AGAIN]


@pytest.mark.parametrize("abuse", ROWS, ids=str)
def test_it_is_one_line_and_nothing_is_lost(abuse_world, tmp_path, clock, capsys, abuse: Abuse):
    check(abuse, *COMMANDS[abuse.command], abuse_world, tmp_path / "w", capsys)


def test_the_table_is_long_and_no_row_is_there_twice():
    assert len(ROWS) >= 150
    assert len(set(map(str, ROWS))) == len(ROWS)
