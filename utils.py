"""Small helpers that every script needs: clear errors, seeds, distributed facts, atomic files. No domain logic."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import importlib.metadata
import json
import os
import pickle
import platform
import random
import re
import signal
import stat
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# what no script can help: disks that are full or read-only, names that are too long, loops of links
SURROUNDINGS = frozenset(
    getattr(errno, name)
    for name in "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO EMFILE ENAMETOOLONG ELOOP ENOTDIR EISDIR".split()
)


PATIENCE = 60  # seconds for what takes one or two, such as a template or patterns of names that a file brings


class UserError(Exception):
    """A mistake of the user's (a path, a flag, a file): one sentence that says what, where and what to do.

    Keys and names of files may hold anything: control characters become blanks, so that it stays one line.
    """

    def __init__(self, message: str):
        super().__init__(re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", message))


def run_main(main: Callable[[], Any]) -> None:
    """Run a script's `main` and end the process: a `UserError` is one line and status 2, a bug a traceback.

    So is what no script can help: a full disk, a place that is read-only, a name that is too long. One of several processes
    that has done its work ends at once, without the interpreter's own end: there a library's thread may still abort it
    (seen with gloo), and torchrun would call a job failed whose model is saved.
    """
    try:
        main()
        if world_size() > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except UserError as error:
        if not is_main():  # let the main process say it; torchrun then ends the others
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if error.errno not in SURROUNDINGS:
            if isinstance(error, BrokenPipeError):  # `script | head`: the reader has what it wanted
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(141)
            raise
        where = f"{str(error.filename)[:300]}: " if error.filename else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as error:  # libraries have classes of their own for these two
        if not (is_out_of_memory(error) or is_disk_full(error)):
            raise
        what = "out of memory" if is_out_of_memory(error) else "the disk is full"
        print(f"error: {what} ({first_line(error)})", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a GPU or the host has no memory left."""
    words = f"{type(error).__name__} {error}"
    return any(part in words for part in ("MemoryError", "out of memory", "can't allocate memory"))


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, whatever its class, says that a disk has no room left."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def set_seed(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) with `seed`."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to load it all the same
        return "a .bin file of it carries code, which was not run"
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is not run"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]


@contextlib.contextmanager
def time_limit(message: str) -> Iterator[None]:
    """A block of Python that may take `PATIENCE` seconds; longer, and it is a `UserError`. (Only in the main thread.)"""

    def late(*_: Any) -> None:
        raise UserError(message)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, rest = signal.signal(signal.SIGALRM, late), signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(rest)
        signal.signal(signal.SIGALRM, before)


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


def regular_file(path: str | Path) -> Path:
    """`path` if it is a regular file: a pipe or a device would be waited for, for ever. Raises UserError."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is not a regular file")
    return path


def is_plain_name(name: str) -> bool:
    """True for a name of a file or folder without any path in it."""
    return bool(name) and name not in (".", "..") and not set("/\\\0\n") & set(name)


def parse_json(content: bytes) -> Any:
    """The value of a UTF-8 JSON text from anybody.

    Raises:
        ValueError: it is not JSON, names a key twice, or holds what no UTF-8 file can (half of a surrogate pair); the
            message says where as far as that is known.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("broken JSON (nested too deep)") from None
    except ValueError as error:
        if "int_max_str_digits" in str(error):
            raise ValueError("broken JSON (a number of thousands of digits)") from None
        raise
    if re.search(rb"\\u[dD][89a-fA-F]", content):
        _refuse_half_characters(value)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return found


def _refuse_half_characters(value: Any) -> None:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, list):
            waiting += each
        elif isinstance(each, str) and re.search("[\ud800-\udfff]", each):
            raise ValueError(f"the text {ascii(each)[:80]} is not valid Unicode (half of a surrogate pair)")


def read_json(path: str | Path) -> Any:
    """The content of a UTF-8 JSON file.

    Raises:
        UserError: the file is missing, no regular file, unreadable or not JSON (`parse_json`); the message names it.
    """
    try:
        return parse_json(regular_file(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place when the block ends well, else it is removed.

    Folders on the way are made. A reader never sees half a file, and a crash leaves the old one. What a killed process left
    of `path` goes: it is known by its lock, which ends with its process.

    Raises:
        UserError: the disk is full, the place is read-only, a file is where a folder should be, and the like.
    """
    path, temporary, handle = Path(path), None, None
    prefix, suffix = f".{path.name[:100]}.", f".partial{path.suffix[:20]}"
    made = missing_folders(path.parent)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: cannot be written (it is not a regular file)")
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f"{glob.escape(prefix)}????????{glob.escape(suffix)}"):
            with contextlib.suppress(OSError, UserError), open(regular_file(left), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error where a living process writes it
                left.unlink()
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=suffix)
        temporary = Path(name)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        made = []
    except OSError as error:
        if error.filename not in (None, str(temporary), str(path)) and temporary is not None:
            raise  # of another file than this one
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)
        with contextlib.suppress(OSError):  # another process has put something there
            for folder in made:
                folder.rmdir()


def missing_folders(folder: Path) -> list[Path]:
    """`folder` and those above it that are not there, the deepest first."""
    return [path for path in (folder, *folder.parents) if not os.path.lexists(path)]


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
