"""Where a dataset's files come from: for each output its command, versions and input hashes, and a check of the whole chain.

`<data_path>/<D>/<D>.provenance.json` is `{"<output>": {"step", "command", "versions", "finished", "sha256", "inputs":
{"<file>": "<sha256>"}}}`. A file beside the record is named by its name alone, any other by its path, so that a dataset's folder
can be moved. Other files may be outputs too (an index, embeddings, user texts): every step adds its own.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from utils import UserError, read_json, sha256, versions, write_json


def record_path(data_path: str | Path, dataset: str) -> Path:
    """The record of a dataset. Raises UserError if what has its name is none: before the work, not after it."""
    return record_in(Path(data_path) / dataset, dataset)


def record_in(folder: Path, dataset: str) -> Path:
    """`record_path` for a dataset whose files are in `folder`."""
    path = folder / f"{dataset}.provenance.json"
    if path.exists():
        read_provenance(path)
    return path


def refuse_input(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise a UserError if one of `outputs` is one of `inputs`: it would be lost."""
    there = [path for path in outputs if path.exists()]
    for file in inputs:
        if any(path.samefile(file) for path in there if file.exists()):
            raise UserError(f"{file}: is read, and would be overwritten; name another file to write")


def note_made(
    path: Path, step: str, outputs: Iterable[Path], inputs: Iterable[Path], packages: tuple[str, ...] = ("numpy",)
) -> None:
    """Note in the record at `path` that this process's command made `outputs` from `inputs`; other outputs' notes stay.

    Args:
        step: the script, such as `data_process/embed.py`.
        packages: whose versions matter for the result.
    """
    entries = read_provenance(path) if path.exists() else {}
    note = {
        "step": step,
        "command": re.sub(r"//[^/@\s]+@", "//", shlex.join(sys.argv)),  # no password of an address
        "versions": versions(*packages),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    hashes = {_name(path, file): sha256(file) for file in inputs}
    for output in outputs:
        entries[_name(path, output)] = {**note, "sha256": sha256(output), "inputs": hashes}
    write_json(path, entries)


def _name(record: Path, file: Path) -> str:
    file = file.resolve()
    return file.name if file.parent == record.parent.resolve() else str(file)


def read_provenance(path: Path) -> dict[str, dict[str, Any]]:
    """The notes by output. Raises UserError if the file is no such record."""
    content = read_json(path)
    for output, note in content.items() if isinstance(content, dict) else [("", None)]:
        note = note if isinstance(note, dict) else {}
        if not isinstance(note.get("inputs"), dict) or not all(
            isinstance(note.get(k), str) for k in ("step", "sha256")
        ):
            raise UserError(f"{path}: {output!r} must have step, sha256 and inputs; it is no record of provenance")
    return content


def notes_of(folder: Path, name: str, index_file: str = ".index.json") -> dict[str, dict[str, Any]]:
    """How the files of a dataset were made, by output: its record, and what index/ notes in the index's report."""
    path = folder / f"{name}.provenance.json"
    notes = read_provenance(path) if path.is_file() else {}
    report = folder / f"{name}{index_file.removesuffix('.json')}.report.json"
    content = read_json(report) if report.is_file() else None
    made = content.get("made") if isinstance(content, dict) else None
    if isinstance(made, dict) and isinstance(made.get("inputs"), dict) and isinstance(made.get("step"), str):
        notes = notes | {f"{name}{index_file}": made}
    return notes


def verify(folder: Path, entries: dict[str, dict[str, Any]]) -> list[str]:
    """Compute all hashes again: one sentence for every output or input that is not what it was, none if all is well.

    An input that is itself an output is checked in both roles: it may have been made again after what was made from it.

    Args:
        folder: where files that are named without a folder lie.
        entries: `notes_of` a dataset; of a note without "sha256" the output itself is not compared.
    """
    found: dict[str, str | None] = {}
    faults: list[str] = []
    for name in sorted(set(entries) | {file for note in entries.values() for file in note["inputs"]}):
        file = folder / name
        found[name] = sha256(file) if file.is_file() else None
    for name, note in entries.items():
        if found[name] is None:
            faults.append(f"{folder / name}: is not there any more (made by {note['step']})")
        elif found[name] != note.get("sha256", found[name]):
            faults.append(f"{folder / name}: was changed after {note['step']} made it")
        for file, digest in note["inputs"].items():
            if found[file] is None:
                faults.append(f"{folder / name}: was made from {file}, which is not there any more")
            elif found[file] != digest:
                faults.append(f"{folder / name}: was made from another {file}; run {note['step']} again")
    return faults
