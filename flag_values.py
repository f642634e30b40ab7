"""Kinds of values that flags take: each turns a text into a value, or says what is wrong with it. Used as argparse types.

That a text is one which UTF-8 can write is checked for all of them at once (arguments.Parser).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from utils import is_plain_name

TRILLION = 10**12


def file_name(value: str) -> str:
    """A kind: the path of a file."""
    if Path(value).name in ("", "..") or value.endswith("/"):
        raise argparse.ArgumentTypeError(f"{value!r} is not the name of a file")
    return value


def folder_name(value: str) -> str:
    """A kind: the path of a folder (a point for this one)."""
    if not value:
        raise argparse.ArgumentTypeError("'' is not the name of a folder")
    return value


def array_file(value: str) -> Path:
    """A kind: the path of a file of an array, so that no other file is overwritten with one."""
    if Path(value).suffix != ".npy":
        raise argparse.ArgumentTypeError(f"{value!r} does not end in .npy")
    return Path(value)


def plain_name(value: str) -> str:
    """A kind: the name of a file or folder, such as a dataset's, without any path in it."""
    if not is_plain_name(value):
        raise argparse.ArgumentTypeError(f"{value!r} is not a plain name such as Games, but a path")
    return value


def whole(low: int, high: int = TRILLION) -> Callable[[str], int]:
    """A kind: whole numbers from `low` to `high`."""

    def kind(value: str) -> int:
        try:
            number = int(value) if len(value) <= 20 else None
        except ValueError:
            number = None
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{value[:40]!r} is not {kind.__doc__}")
        return number

    kind.__doc__ = f"a whole number from {low}" + (" on, 10^12 at most" if high == TRILLION else f" to {high}")
    return kind


def real(low: float, below: float = math.inf, above_low: bool = False) -> Callable[[str], float]:
    """A kind: finite numbers from `low` (or above it) and smaller than `below`."""

    def kind(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not low <= number < below or (above_low and number == low):
            raise argparse.ArgumentTypeError(f"{value[:40]!r} is not {kind.__doc__}")
        return number

    end = "" if below == math.inf else f" and below {below:g}"
    kind.__doc__ = f"a number {'above' if above_low else 'from'} {low:g}{end}" + ("" if above_low or end else " on")
    return kind


def batch_size(value: str) -> int | str:
    """A kind: a positive number, or `auto`."""
    if value == "auto":
        return value
    try:
        return whole(1)(value)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{value!r} is neither a positive number nor auto") from None


def steps_or_all(value: str) -> int:
    """A kind: -1 for all, or a whole number from 1 on."""
    number = whole(-1)(value)
    if number == 0:
        raise argparse.ArgumentTypeError("0 is nothing; -1 means all")
    return number


SEEDS = whole(0, 2**32 - 1)
