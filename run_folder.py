"""The folder of a fine-tuning run (`--output_dir`): what may lie in it, and everything that is done to it.

config.json, model.safetensors, …   the trained model, complete or absent (adapter_config.json, … with --lora)
checkpoint-N/                       what a resumed run needs; it has its name when all of it is on the disk
run.json                            `RunRecord`: command, arguments, versions, hashes, and which files the run wrote
train.log, runs/                    a line for each logging step; the same for TensorBoard
base_with_item_tokens/              until the run has ended: the base model with its new rows
.replaced/                          the run before (--overwrite_output_dir), until this one has a checkpoint
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arguments import Role, defaults, with_role
from folders import LOADERS, locked, partial_of, to_disk
from utils import UserError, checkpoints, is_plain_name, read_json, regular_file, say, sha256, write_json

RECORD, LOG, TENSORBOARD = "run.json", "train.log", "runs"
PREPARED, FINAL, REPLACED, DROPPED = "base_with_item_tokens", ".final", ".replaced", ".replaced.partial"


@dataclass(frozen=True)
class RunRecord:
    """`run.json`.

    Args:
        argv: the command, as words.
        arguments: every flag with its value.
        base_model: `model_fingerprint` of the base.
        samples: `{"train": {task: samples an epoch}, "valid": samples}`.
        files: name → `{"path", "sha256"}` of every file that the run read.
        made: how the data files were made (`provenance.notes_of`).
        written: files that the run left in its folder, by name: they are its own, others are not.
    """

    argv: list[str]
    arguments: dict[str, Any]
    processes: int
    base_model: str
    samples: dict[str, Any]
    files: dict[str, dict[str, str]]
    versions: dict[str, str]
    made: dict[str, Any] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """The record in `path`. Raises UserError if it is none."""
        content = read_json(path)
        kinds = {"argv": list, "arguments": dict, "processes": int, "base_model": str}
        kinds |= {"samples": dict, "files": dict, "versions": dict, "made": dict, "written": list}
        if not isinstance(content, dict) or any(type(content.get(key)) is not kind for key, kind in kinds.items()):
            raise UserError(f"{path}: is no record of a run of finetune.py; put the run's own back, or begin anew")
        if not all(isinstance(file, dict) and {"path", "sha256"} <= file.keys() for file in content["files"].values()):
            raise UserError(f"{path}: 'files' must have path and sha256 of each file")
        if not all(isinstance(name, str) and is_plain_name(name) for name in content["written"]):
            raise UserError(f"{path}: 'written' must be names of files in its folder")
        return cls(**{key: content[key] for key in kinds})

    def write(self, folder: Path) -> None:
        """Write `run.json` to `folder`."""
        write_json(folder / RECORD, asdict(self))

    def check_same(self, now: RunRecord, where: Path) -> None:
        """Refuse to go on as `now` with this run, whose data or settings were other ones.

        Args:
            where: the file of this record, for the message.

        Raises:
            UserError: names the first flag or file that differs.
        """
        free, before_all = with_role(Role.FREE), defaults() | self.arguments  # a flag that is younger than the run
        for flag, value in now.arguments.items():
            before = before_all.get(flag, value)
            if flag not in free and before != value:
                raise UserError(
                    f"--{flag} is {value!r}, but the run to go on with had {before!r} ({where}); "
                    "use the same command, or begin another run in another --output_dir"
                )
        if self.processes != now.processes:
            raise UserError(f"{now.processes} processes, but the run to go on with had {self.processes} ({where})")
        if self.base_model != now.base_model:
            raise UserError(
                f"--base_model {now.arguments['base_model']} is not the model that the run began with ({where})"
            )
        if set(self.files) != set(now.files):
            names = ", ".join(sorted(set(self.files) ^ set(now.files)))
            raise UserError(f"only one of the two runs uses {names} ({where}); use the same command, or begin anew")
        for name, file in now.files.items():
            if self.files[name]["sha256"] != file["sha256"]:
                raise UserError(
                    f"{file['path']} has changed since the run began ({where}); put the old file back, or begin anew"
                )


def model_fingerprint(model: str | Path) -> str:
    """The SHA-256 over names and contents of a local model's settings, tokenizer and weights; a hub id as it is."""
    folder = Path(model)
    if not folder.is_dir():
        return f"hub:{model}"
    patterns = ("*.safetensors", "*.bin", "*.gguf", "*config.json", "tokenizer*", "added_tokens.json")
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}):
        digest.update(f"{path.name}\0{sha256(path)}\0".encode())
    return digest.hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class RunFolder:
    """One run's folder. Only the main process may call what changes it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def record(self, insist: bool = True) -> RunRecord | None:
        """The record of the run that lies here; None if there is none, and unless `insist` if it is broken.

        Raises:
            UserError: it is broken.
        """
        try:
            return RunRecord.read(self / RECORD) if os.path.lexists(self / RECORD) else None
        except UserError:
            if insist:
                raise
            return None

    def refuse_base_model(self, base_model: str) -> None:
        """Raise a UserError if this is the base model's own folder."""
        if Path(base_model).is_dir() and self.path.resolve() == Path(base_model).resolve():
            raise UserError(f"--output_dir {self.path} is the base model's own folder; choose another one")

    def refuse_if_taken(self, overwrite: bool) -> None:
        """Make sure that a new run may begin here.

        Raises:
            UserError: there is a model already and no `overwrite`, or it is not a run's.
        """
        there = [name for name in LOADERS if (self / name).exists()]
        there += sorted(path.name for path in self.path.glob("checkpoint-*"))
        if not there:
            return
        if not overwrite:
            raise UserError(
                f"{self.path} holds a run already ({there[0]}); go on with --resume_from_checkpoint auto, "
                "replace it with --overwrite_output_dir, or choose another --output_dir"
            )
        if self.record() is None:
            raise UserError(
                f"{self.path}: {there[0]} is not of a run of finetune.py (no {RECORD}), so it is not overwritten"
            )

    # ---- one process at a time ----

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and hold it against other runs within the block; an empty one is removed afterwards.

        Raises:
            UserError: another process trains here, or the folder cannot be written to.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(f"--output_dir {self.path}: is there and is no folder")
        with locked(self.path):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--output_dir {self.path}: cannot be written to ({error.strerror})") from None
            try:
                self.refuse_strange()
                yield
            finally:
                with contextlib.suppress(OSError):
                    self.path.rmdir()

    def refuse_strange(self) -> None:
        """Raise a UserError if a link or a pipe has the name of what a run writes, moves or removes."""
        for path in [self / PREPARED, self / FINAL, self / REPLACED, *self.path.glob(".*.partial"), self / TENSORBOARD]:
            if os.path.lexists(path) and (not path.is_dir() or (path.is_symlink() and path.name != TENSORBOARD)):
                raise UserError(f"{path}: is no folder that a run makes; move it away, or choose another --output_dir")
        if os.path.lexists(self / LOG):
            regular_file(self / LOG)

    def clear_partial(self) -> None:
        """Remove what a killed process was writing; the run that it was about to replace comes back."""
        for path in [*self.path.glob(".*.partial"), self / FINAL]:
            shutil.rmtree(path, ignore_errors=True)
        self.restore_replaced()

    # ---- replacing the run before ----

    def own_files(self) -> list[Path]:
        """What the run here wrote, and the models that convert.sh made of its checkpoints."""
        record = self.record()
        names = [RECORD, LOG, TENSORBOARD, *(record.written if record else [])]
        found = [self / name for name in dict.fromkeys(names) if (self / name).exists()]
        found += [path for path in self.path.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
        return found + [p for p in self.path.glob("final-checkpoint-*") if (p / "convert_report.json").is_file()]

    def set_aside(self) -> None:
        """Move the run that lies here into `.replaced/`, from where it comes back if the new one fails to begin.

        The record goes last: without it in `.replaced/` the move was cut off, and nothing new has begun.
        """
        (self / REPLACED).mkdir()
        for path in sorted(self.own_files(), key=lambda path: path.name == RECORD):
            path.rename(self / REPLACED / path.name)

    def restore_replaced(self) -> None:
        """Bring a replaced run back, unless the new one has a checkpoint or a model already."""
        aside = self / REPLACED
        if (aside / RECORD).exists():  # all of it is there
            if checkpoints(self.path) or any((self / name).exists() for name in LOADERS):
                self.drop_replaced()
                return
            for name in (LOG, TENSORBOARD):  # what the new run had begun
                _remove(self / name)
            (aside / RECORD).replace(self / RECORD)
        if aside.is_dir():
            for path in sorted(aside.iterdir()):
                path.rename(self / path.name)
            aside.rmdir()
            say(f"{self.path}: the run that was to be replaced is back")

    def drop_replaced(self) -> None:
        """Remove the run that has been replaced."""
        if (self / REPLACED).is_dir():
            (self / REPLACED).rename(self / DROPPED)  # a removal that is cut off goes on with `clear_partial`
            shutil.rmtree(self / DROPPED, ignore_errors=True)

    def give_up(self) -> None:
        """After a failure: the prepared base goes, and so does what a new run had begun where it was to replace another."""
        shutil.rmtree(self / PREPARED, ignore_errors=True)
        self.restore_replaced()

    # ---- what the run leaves ----

    def finish_checkpoint(self, step: int, best: int, limit: int) -> None:
        """Give `checkpoint-<step>`, which lies in its `partial_of`, its name; then drop the oldest above `limit`, not `best`."""
        final = self / f"checkpoint-{step}"
        to_disk(partial_of(final))
        shutil.rmtree(final, ignore_errors=True)
        partial_of(final).rename(final)
        kept = checkpoints(self.path)
        spare = [path for path in kept[:-1] if path.name != f"checkpoint-{best}"]
        for path in spare[: max(0, len(kept) - limit)]:
            shutil.rmtree(path, ignore_errors=True)

    def finish(self) -> None:
        """Give the files in `.final/` their places: configurations last, since without them nothing loads.

        One by one and not as a folder: this one also holds checkpoints, and what users have put here.
        """
        final = self / FINAL
        to_disk(final)
        names = sorted((path.name for path in final.iterdir()), key=lambda name: (name.endswith("config.json"), name))
        record = RunRecord.read(self / RECORD)
        RunRecord(**{**vars(record), "written": sorted({*record.written, *names})}).write(self.path)
        for name in names:
            (final / name).replace(self / name)
        final.rmdir()
        shutil.rmtree(self / PREPARED, ignore_errors=True)
        self.drop_replaced()


def log_history(checkpoint: Path) -> list[dict[str, float]]:
    """What was logged in training: finite numbers by name, with `step`, from the newest `trainer_state.json` in `checkpoint`."""
    try:
        own = checkpoint / "trainer_state.json"
        newest = own if own.is_file() else checkpoints(checkpoint)[-1] / own.name
        history = read_json(newest)["log_history"]
        rows = [
            {
                str(key): float(value)
                for key, value in row.items()
                if type(value) in (int, float) and abs(float(value)) < 1e30  # nor NaN
            }
            for row in history
        ]
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return []
    return [row for row in rows if "step" in row]
