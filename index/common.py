"""What every script of index/ needs: clear errors, one place for files, the processes of a torchrun job."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


class UserError(Exception):
    """A mistake of the user's (a path, a flag, a file): one sentence that says what, where and what to do."""


class Interrupted(Exception):
    """The user asked to stop; what was learned is saved, and the message says how to go on."""


def run_main(main: Callable[[], Any]) -> None:
    """Run a script's `main` and end the process: a `UserError` is one line and status 2, a bug a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Interrupted as reason:
        print(f"interrupted: {reason}", file=sys.stderr, flush=True)
        sys.exit(130)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def boolean(text: str) -> bool:
    """An argparse type for flags such as `--bn False`."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


def say(*words: Any) -> None:
    """Print on the main process only, at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*words, flush=True)


def pick_device(name: str) -> torch.device:
    """The device called `name`; a CUDA device becomes this process's own, or the CPU where there is none.

    Raises:
        UserError: no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; use cpu or cuda:0") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            say(f"no CUDA here: --device {name} becomes cpu")
            return torch.device("cpu")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place when the block ends well, else it goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any, indent: int | None = None) -> None:
    """Write `content` to `path` as UTF-8 JSON, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=indent)
        file.write("\n")


def read_json(path: str | Path) -> Any:
    """The content of a UTF-8 JSON file.

    Raises:
        UserError: the file is missing or no JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not UTF-8 JSON ({error})") from None
