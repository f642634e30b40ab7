"""Folders that are written whole or not at all, one process at a time, and of which only what was written is ever removed.

    with new_folder(target, overwrite, reads=[base]) as partial:
        model.save_pretrained(partial)              # `target` is there, complete, when the block has ended well

Every folder so written lists its files in `.written.json`. `overwrite` replaces only a folder that has such a list and
holds nothing else, `remove_written` removes only what is on it. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from utils import UserError, is_disk_full, missing_folders, read_json, write_json

WRITTEN = ".written.json"
LOADERS = ("config.json", "adapter_config.json")  # without one of them nothing loads a folder


@contextlib.contextmanager
def new_folder(target: str | Path, overwrite: bool = False, reads: Iterable[Path] = ()) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well, and is removed when it does not.

    Until then it is `.<target>.partial` beside it. What a killed process left there is cleared up by the next call.

    Args:
        overwrite: replace `target` if it is a folder of ours, which holds nothing else.
        reads: folders that the block reads from; `target` must be none of them, nor hold one.

    Raises:
        UserError: `target` exists and is not to be replaced, another process writes it, or the disk fails or is full.
    """
    target = _real(target)
    _refuse_inputs(target, reads)
    _refuse_existing(target, overwrite)
    partial, old = partial_of(target), _beside(target, "old")
    with locked(target):
        _recover(target, old)
        _refuse_existing(target, overwrite)
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            write_json(partial / WRITTEN, {"files": _files(partial)})
            to_disk(partial)
            if target.exists():
                target.rename(old)
            partial.rename(target)
        except Exception as error:  # libraries have classes of their own for a full disk
            if not isinstance(error, (OSError, SafetensorError)) and not is_disk_full(error):
                raise
            raise UserError(f"{what_failed(error, target, partial)}; {target} is as it was before") from None
        finally:
            _recover(target, old)
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(target: str | Path) -> Iterator[None]:
    """Hold `target`, which need not exist, for this process; the lock goes with the process, however it ends.

    The lock is on the file `.<target>.lock` beside it, which is gone afterwards, and so are folders that it needed.

    Raises:
        UserError: another process holds it, or the place cannot be written.
    """
    target = _real(target)
    path, busy = _beside(target, "lock"), UserError(f"{target}: another process is writing it now; wait for it")
    made = missing_folders(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass  # a file system without locks
        if not path.exists() or os.fstat(handle).st_ino != path.stat().st_ino:
            raise busy  # the other one has just finished and removed it
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def partial_of(target: Path) -> Path:
    """The name that the folder `target` has while it is written."""
    return _beside(target, "partial")


def to_disk(folder: Path) -> None:
    """Give all files in `folder` the usual rights (safetensors makes its own private), and bring them to the disk."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to write `needed` bytes where they do not fit.

    Raises:
        UserError: before anything was written or removed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed * 1.05:
        raise UserError(
            f"{folder}: the disk is too full: {what} about {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "nothing was removed or overwritten. Make room and go on with --resume_from_checkpoint auto"
        )


@contextlib.contextmanager
def disk_full_is_said(folder: Path, what: str = "the checkpoint") -> Iterator[None]:
    """Turn a write of `what` to `folder` that failed for want of space into one line; the half written goes, older files stay."""
    try:
        yield
    except Exception as error:  # OSError, torch's RuntimeError, or safetensors' own, which is neither
        full = is_disk_full(error) or shutil.disk_usage(folder.parent).free < 2**20
        shutil.rmtree(folder, ignore_errors=True)
        if not full:
            raise
        raise UserError(
            f"{folder.parent}: the disk is full; {what} was not written, what was there before is untouched. "
            "Make room and go on with --resume_from_checkpoint auto"
        ) from error


def written(folder: Path) -> list[str] | None:
    """What the folder's record lists: paths below it of the files that were written here; None if it has no record.

    Raises:
        UserError: the record is damaged, or lists a path out of the folder.
    """
    path = folder / WRITTEN
    if not path.is_file():
        return None
    content = read_json(path)
    names = content.get("files") if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: not a record of files")
    if any(Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts for name in names):
        raise UserError(f"{path}: lists a file outside of its folder")
    return names


def remove_written(folder: Path) -> None:
    """Remove the files on the folder's record, the settings first, then the record and every folder that is left empty."""
    names = written(folder) or []
    for name in sorted(names, key=lambda name: name not in LOADERS):
        if (folder / name).parent.resolve().is_relative_to(folder.resolve()):  # no link leads out
            (folder / name).unlink(missing_ok=True)
    (folder / WRITTEN).unlink(missing_ok=True)
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            Path(parent).rmdir()


def what_failed(error: Exception, *places: Path) -> str:
    """What went wrong while the first of `places` was made: a write, or a read if the error names a file outside of them."""
    named, why = getattr(error, "filename", None), getattr(error, "strerror", None) or str(error)
    outside = isinstance(named, (str, os.PathLike)) and not any(Path(named).is_relative_to(place) for place in places)
    if outside and not is_disk_full(error):
        return f"{named}: cannot be read ({why})"
    return f"{places[0]}: cannot be written ({why})"


def _real(target: str | Path) -> Path:
    """The folder itself where `target` is a link to one: it is replaced, not the link."""
    target = Path(target)
    try:
        return target.resolve() if target.is_symlink() else target
    except RuntimeError:
        raise UserError(f"{target}: cannot be read (a link to itself)") from None


def _beside(target: Path, ending: str) -> Path:
    target = target if target.name not in ("", "..") else target.resolve()
    return target.parent / f".{target.name}.{ending}"


def _files(folder: Path) -> list[str]:
    """The paths below `folder` of all that is no folder, sorted; not the record itself. A link to a folder is a file."""
    found = (Path(parent) / name for parent, folders, files in os.walk(folder) for name in (*folders, *files))
    found = (path for path in found if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in found} - {WRITTEN})


def _refuse_inputs(target: Path, reads: Iterable[Path]) -> None:
    ours = target.resolve()
    for folder in reads:
        theirs = Path(folder).resolve()
        if ours == theirs or ours in theirs.parents:
            raise UserError(f"{target}: is what is read from ({folder}); choose another folder to write to")


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: a file is in the way; choose another folder")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target}: exists; choose another folder or add --overwrite")
    names = written(target)
    if names is None:
        raise UserError(f"{target}: was not written here (it has no {WRITTEN}), so it is not replaced")
    foreign = sorted(set(_files(target)) - set(names))
    if foreign:
        raise UserError(
            f"{target}: holds {foreign[0]}, which was not written here; move it away, or choose another folder"
        )


def _recover(target: Path, old: Path) -> None:
    """Bring back the folder that was moved aside if nothing has taken its place; else remove it."""
    if old.exists() and not target.exists():
        old.rename(target)
    remove_written(old)
