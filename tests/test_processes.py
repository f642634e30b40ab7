"""The end of one of several processes: nothing that happens in the interpreter's own end may make a finished job fail."""

import os
import subprocess
import sys

import torch.distributed as dist
from running import ROOT, free_port

import processes


def test_a_group_is_left_once_and_none_is_no_fault():
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    processes.leave()
    assert not dist.is_initialized()
    processes.leave()


def test_a_library_that_aborts_at_the_end_does_not_fail_a_finished_job():
    code = "import atexit, os; from utils import run_main; atexit.register(os.abort); run_main(lambda: print('done'))"
    for world, status in (("2", 0), ("1", -6)):
        job = {**os.environ, "WORLD_SIZE": world, "RANK": "0", "LOCAL_RANK": "0"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=job, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (status, "done\n")
