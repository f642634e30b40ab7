"""A row of a table of abuses, how it is tried, and the ways to break a file."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils import run_main

Break = Callable[[Path], None]  # is given the folder of a fresh copy of the world


@dataclass(frozen=True)
class Abuse:
    """A row of the table.

    Args:
        name: what is wrong.
        command: a name among the table's commands.
        told: a regular expression that the one line must have; None: it must work all the same.
        broken: breaks a copy of the world; None: the flags are the abuse.
        flags: after the command's own; `{w}` is the world's folder.
        room: no file may get longer, as on a disk that is full.
    """

    name: str
    command: str
    told: str | None
    broken: Break | None = None
    flags: tuple[str, ...] = ()
    room: int | None = None

    def __str__(self) -> str:
        return f"{self.command}: {self.name}"


# ---- trying ----


def contents(folder: Path) -> dict[str, bytes | int]:
    """Every path below `folder` with its bytes, or its kind where it is no regular file."""
    found: dict[str, bytes | int] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        found[str(path.relative_to(folder))] = path.read_bytes() if stat.S_ISREG(mode) else stat.S_IFMT(mode)
    return found


def said_of(abuse: Abuse, main: Callable[[list[str]], Any], flags: list[str], capsys: Any) -> list[str] | None:
    """The lines that the command says of a mistake, of which it has to end with status 2; None if it finds none."""
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if abuse.room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (abuse.room, limits[1]))
        run_main(lambda: main(flags))
    except SystemExit as end:
        assert end.code == 2
        return [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return None


def check(
    abuse: Abuse,
    main: Callable[[list[str]], Any],
    own: Callable[[Path], list[str]],
    world: Path,
    copy: Path,
    capsys: Any,
) -> None:
    """Run the command with its `own` flags and those of the row in a broken `copy` of the `world`: one line, nothing lost."""
    shutil.copytree(world, copy, symlinks=True)
    if abuse.broken:
        abuse.broken(copy)
    before = contents(copy)
    said = said_of(abuse, main, [*own(copy), *(flag.replace("{w}", str(copy)) for flag in abuse.flags)], capsys)
    if abuse.told is None:
        assert said is None
        return
    assert said is not None, "nothing was said"
    assert len(said) == 1 and said[0].startswith("error: ") and len(said[0]) < 1000
    assert re.search(abuse.told, said[0]), said[0]
    after = contents(copy)
    assert {path for path in before if before[path] != after.get(path)} == set()
    assert after.keys() - before.keys() == set()


# ---- ways to break a file ----


def write(path: str, content: bytes | str | Any) -> Break:
    """The file has this content: bytes, text, or anything else as JSON."""

    def broken(world: Path) -> None:
        raw = content if isinstance(content, (bytes, str)) else json.dumps(content)
        remove(path)(world)
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        (world / path).write_bytes(raw if isinstance(raw, bytes) else raw.encode())

    return broken


def edit(path: str, change: Callable[[Any], Any], bom: bool = False) -> Break:
    """The JSON file has what `change` made of its content; with `bom` as an editor of another system writes it."""

    def broken(world: Path) -> None:
        content = json.loads((world / path).read_text())
        change(content)
        text = json.dumps(content, indent=1)
        (world / path).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() if bom else text.encode())

    return broken


def put(path: str, *keys: str | int, value: Any) -> Break:
    """The JSON file has `value` at `keys`."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edit(path, change)


def drop(path: str, *keys: str | int) -> Break:
    """The JSON file lacks what was at `keys`."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return edit(path, change)


def rename(path: str, *keys: str) -> Break:
    """The last of `keys` but one of the JSON file is called like the last."""

    def change(content: Any) -> None:
        for key in keys[:-2]:
            content = content[key]
        content[keys[-1]] = content.pop(keys[-2])

    return edit(path, change)


def copy(path: str, to: str) -> Break:
    """The file is at another place too."""

    def broken(world: Path) -> None:
        (world / to).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(world / path, world / to)

    return broken


def link(path: str, to: str) -> Break:
    """A link to another place in the world."""
    return lambda world: (world / path).symlink_to(world / to)


def remove(path: str) -> Break:
    """File or folder is gone."""

    def broken(world: Path) -> None:
        if (world / path).is_dir() and not (world / path).is_symlink():
            shutil.rmtree(world / path)
        else:
            (world / path).unlink(missing_ok=True)

    return broken


def cut(path: str, share: float = 0.5) -> Break:
    """Only the first part of the file is there."""

    def broken(world: Path) -> None:
        content = (world / path).read_bytes()
        (world / path).write_bytes(content[: int(len(content) * share)])

    return broken


def replaced(path: str, make: Callable[[Path], Any]) -> Break:
    """Something else has the name: `make` is given the path."""

    def broken(world: Path) -> None:
        remove(path)(world)
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        make(world / path)

    return broken


def folder(path: str) -> Break:
    """A folder has the file's name."""
    return replaced(path, Path.mkdir)


def pipe(path: str) -> Break:
    """A pipe that nobody writes to has the file's name."""
    return replaced(path, os.mkfifo)


def device(path: str) -> Break:
    """The file is a link to a device without end."""
    return replaced(path, lambda place: place.symlink_to("/dev/zero"))


def loop(path: str) -> Break:
    """The file is a link to itself."""
    return replaced(path, lambda place: place.symlink_to(place.name))


def both(*breaks: Break) -> Break:
    """One after the other."""

    def broken(world: Path) -> None:
        for each in breaks:
            each(world)

    return broken


def weights(path: str, change: Callable[[dict[str, Any]], Any]) -> Break:
    """The safetensors file has what `change` makes of its tensors."""

    def broken(world: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(world / path)
        change(tensors)
        save_file(tensors, world / path, metadata={"format": "pt"})

    return broken


# kind of break → (what is done to a file that must be a JSON object, what the line says beside the file's name)
JSON_BREAKS: dict[str, tuple[Callable[[str], Break], str]] = {
    "missing": (remove, "no such file"),
    "a folder": (folder, "is a folder"),
    "a pipe": (pipe, "not a regular file"),
    "a device": (device, "not a regular file"),
    "a link to itself": (loop, "cannot be read"),
    "empty": (lambda path: write(path, b""), "broken JSON"),
    "cut": (cut, "broken JSON"),
    "nested 200,000 deep": (lambda path: write(path, b"[" * 200_000), "nested too deep"),
    "a number of 5,000 digits": (lambda path: write(path, b'{"0": ' + b"9" * 5000 + b"}"), "thousands of digits"),
    "a list": (lambda path: write(path, b"[]"), "object|is no"),
    "not UTF-8": (lambda path: write(path, b'{"\xff": 1}'), "not UTF-8"),
    "UTF-16": (lambda path: write(path, '{"0": 1}'.encode("utf-16")), "not UTF-8"),
    "half a character": (lambda path: write(path, rb'{"0": "\ud800"}'), "not valid Unicode"),
    "a key twice": (lambda path: write(path, b'{"0": 1, "0": 2}'), "'0' occurs twice"),
    "NUL bytes": (lambda path: write(path, b"\0" * 100), "broken JSON"),
}


def json_rows(command: str, path: str, *but: str, flags: tuple[str, ...] = (), told: str = "") -> list[Abuse]:
    """A row for each of `JSON_BREAKS` but those named; the line names the file, or says `told`."""
    name = Path(path).name.replace(".", r"\.")
    return [
        Abuse(f"{path} is {kind}", command, rf"{told or name}.*{says}", broken(path), flags)
        for kind, (broken, says) in JSON_BREAKS.items()
        if kind not in but
    ]
