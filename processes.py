"""The processes of a torchrun job: joining them, waiting for them, speaking for them; and the device of each."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils import UserError, is_main, local_rank, say, world_size

LONGEST = timedelta(hours=12)  # that the others wait while one reads, hashes or writes a large model


def join_for_training(deepspeed: bool) -> None:
    """Join the process group: nccl on GPUs, gloo on the CPU; one process alone plays a group of one for DeepSpeed."""
    cpu = not torch.cuda.is_available()
    if cpu:
        say("note: no CUDA device; running on the CPU")
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if deepspeed:
        _join_with_deepspeed(cpu)
    elif world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo" if cpu else "nccl", timeout=LONGEST)
    if not cpu:
        if local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"{local_rank() + 1} processes on this machine, but {torch.cuda.device_count()} GPUs: one GPU each"
            )
        torch.cuda.set_device(local_rank())


def _join_with_deepspeed(cpu: bool) -> None:
    if "RANK" not in os.environ:
        with socket.socket() as server:  # any free port: several runs may share a machine
            server.bind(("127.0.0.1", 0))
            port = str(server.getsockname()[1])
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(alone)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it builds
        import deepspeed

        if cpu:
            # an all-reduce in C++, compiled on the first run: ZeRO has no use for it, it needs a compiler, and a process
            # that is killed while it compiles leaves a lock on which every later run waits for ever
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # before TrainingArguments: zero.Init would otherwise see a single process on a machine without CUDA
        deepspeed.init_distributed(dist_backend="gloo" if cpu else "nccl", verbose=False, timeout=LONGEST)


def join_for_scoring() -> None:
    """Join the other processes (gloo: only small objects travel, and only at the beginning and at the end)."""
    if world_size() > 1 and not dist.is_initialized():
        # The end waits for the slowest process; one that dies breaks its connections, which ends the others at once.
        dist.init_process_group("gloo", timeout=timedelta(days=30))


def pick_device(gpu_id: int | None = None) -> torch.device:
    """The GPU `gpu_id` (default: the local rank's), or the CPU, said in one line, where CUDA is absent."""
    if not torch.cuda.is_available():
        say("note: no CUDA device; running on the CPU")
        return torch.device("cpu")
    number = local_rank() if gpu_id is None else gpu_id
    if number >= torch.cuda.device_count():
        raise UserError(f"GPU {number} does not exist; there are {torch.cuda.device_count()}, counted from 0")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    """Wait for all processes, then end the group."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """The element-wise sum of `values` over all processes, in place."""
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(values)
    return values


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process, on all processes; its `UserError` ends them all, told once."""
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome = [function(), None]
        except UserError as error:
            outcome = [None, str(error)]
    if world_size() > 1:
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        if is_main():
            raise UserError(outcome[1])
        sys.exit(2)
    return outcome[0]
