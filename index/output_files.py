"""Files that index/ writes: whole or not at all, and nothing left behind by a run that was killed."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from commands import InputError

PARTIAL = ".partial"


def _refusal(path: Path, error: OSError | ValueError) -> InputError:
    return InputError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})")


def check_place(path: Path) -> None:
    """See before the work begins that a file can be written at `path`.

    Raises:
        InputError: a folder or device is there, or no file can be made there.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is there and no file; name a file")
        folder = path.absolute().parent
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise InputError(f"{path}: cannot be written ({folder} is no folder)")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"{path}: cannot be written (no permission in {folder})")
    except (OSError, ValueError) as error:
        raise _refusal(path, error) from None


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes `path`'s place when the block ends well, else it goes.

    The file is locked meanwhile; a lock ends with its process, so `clear_leftovers` knows what nobody writes any more.

    Raises:
        InputError: no place, no permission, disk full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    except (OSError, ValueError) as error:
        raise _refusal(path, error) from None
    temporary = Path(name)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(handle, 0o666 & ~umask)
        os.fsync(handle)
        temporary.replace(path)
    except OSError as error:
        raise _refusal(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def clear_leftovers(folder: Path, name: str) -> None:
    """Remove the temporary files of `name` (`*` for any) in `folder` that killed processes left."""
    for path in folder.glob(f".{name if name == '*' else glob.escape(name)}.????????{PARTIAL}"):
        if path.is_symlink() or not path.is_file():
            continue
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an error where a living process writes it
            path.unlink()


def save_json(path: Path, content: Any) -> None:
    """Write `content` to `path` as UTF-8 JSON, whole."""
    with written_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=2)
        file.write("\n")
