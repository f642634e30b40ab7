"""Ending a process group: an end that is left to the interpreter may abort a run that has saved its model."""

import torch.distributed as dist
from running import free_port

import processes


def test_a_group_is_left_once_and_none_is_no_fault():
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    processes.leave()
    assert not dist.is_initialized()
    processes.leave()
