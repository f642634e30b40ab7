"""Small helpers that every script needs: clear errors, seeds, distributed facts, atomic files. No domain logic."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


class UserError(Exception):
    """A mistake of the user's (a path, a flag, a file): one sentence that says what, where and what to do."""


def run_main(main: Callable[[], Any]) -> None:
    """Run a script's `main` and end the process: a `UserError` is one line and status 2, a bug a traceback."""
    try:
        main()
    except UserError as error:
        if not is_main():  # let the main process say it; torchrun then ends the others
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # `script | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) with `seed`."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- distributed facts: the global rank, as torchrun sets it (the local rank only picks a GPU) ----


def rank() -> int:
    """The global rank of this process (0 without torchrun)."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """The rank within this node: which GPU to take, nothing else."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """How many processes take part, over all nodes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """True on the one process that writes files and talks."""
    return rank() == 0


def say(*words: Any, file: Any = None) -> None:
    """Print on the main process only, at once."""
    if is_main():
        print(*words, file=file or sys.stdout, flush=True)


# ---- files ----


def read_json(path: str | Path) -> Any:
    """The content of a UTF-8 JSON file.

    Raises:
        UserError: the file is missing, unreadable or not JSON; the message names file, line and column.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: broken JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place when the block ends well, else it is removed.

    Folders on the way are made. A reader never sees half a file, and a crash leaves the old one.
    """
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
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any, indent: int | None = 2) -> None:
    """Write `content` to `path` as UTF-8 JSON, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=indent)
        file.write("\n")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """The complete `checkpoint-N` folders, the oldest first. (A checkpoint gets its name when all of it is written.)"""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return sorted((p for p in found if p.name[11:].isdecimal()), key=lambda path: int(path.name[11:]))


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of the installed `packages`, for the record beside a result."""
    found = {"python": platform.python_version()}
    for package in packages or ("torch", "transformers", "tokenizers", "accelerate", "peft", "deepspeed", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
