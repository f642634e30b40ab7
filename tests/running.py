"""Scripts of the repository as a user starts them, for tests: without the seconds that imports take."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = "numpy torch torch.distributed transformers.trainer transformers.models.llama.modeling_llama peft deepspeed"


def as_script(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """What `python WORDS…` does in `cwd`, the script named as seen from the root, but in this process."""
    path, argv, places = ROOT / words[0], sys.argv, list(sys.path)
    out, err, status = io.StringIO(), io.StringIO(), 0
    try:
        sys.argv, sys.path[:] = list(map(str, words)), [str(path.parent), *places]
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv, sys.path[:] = argv, places
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def together(function: Callable[[list[str]], Any], flags: list[str], processes: int = 2, nodes: int = 1) -> str:
    """Call `function(flags)` in so many processes of one job, as torchrun does; what they print. All must end well.

    They are forks of a process that has imported the libraries once for all tests.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED.split())
    with patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu"):
        forkserver.ensure_running()
    job = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes // nodes, "MASTER_PORT": free_port()}
    with tempfile.NamedTemporaryFile("r") as log:
        ranks = []
        for rank in range(processes):
            own = {"RANK": rank, "LOCAL_RANK": rank % (processes // nodes), "GROUP_RANK": rank * nodes // processes}
            ranks.append(context.Process(target=_of_rank, args=(job | own, log.name, function, flags)))
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(240)
            process.kill()
        text = log.read()
    assert [process.exitcode for process in ranks] == [0] * processes, text[-6000:]
    return text


def _of_rank(environment: dict[str, Any], log: str, function: Callable[[list[str]], Any], flags: list[str]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    os.chdir(ROOT)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(flags)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
