"""How a script of index/ speaks and ends: one line and status 2 for a user's mistake, a traceback for a bug alone."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch


class InputError(Exception):
    """Something handed over is wrong (a path, a flag, a file): one sentence that says what, where and what to do."""


class Interrupted(Exception):
    """The user asked to stop; what was learned is saved, and the message says how to go on."""


def run_command(main: Callable[[], Any]) -> None:
    """Run a script's `main` and end the process: an `InputError` is one line and status 2, an interruption status 130."""
    try:
        main()
    except BrokenPipeError:  # `script | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:  # no path of the user's
            raise
        if isinstance(error, OSError):
            error = f"{error.filename}: {error.strerror}"
        if int(os.environ.get("RANK", 0)) > 0:  # let the main process say it; torchrun then ends the others
            time.sleep(10)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Interrupted as reason:
        print(f"interrupted: {reason}", file=sys.stderr, flush=True)
        sys.exit(130)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def tell(*words: Any) -> None:
    """Print on the main process only, at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


def use_device(name: str) -> torch.device:
    """The device called `name`; a CUDA device becomes this process's own, or the CPU where there is none.

    Raises:
        InputError: no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: no such device; use cpu or cuda:0")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            tell(f"no CUDA here: --device {name} becomes cpu")
            return torch.device("cpu")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        torch.cuda.set_device(device)
    return device
