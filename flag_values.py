"""Kinds of values that flags take: each turns a text into a value, or says what is wrong with it. Used as argparse types."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def text(value: str) -> str:
    """A kind: any text that UTF-8 can write."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not valid UTF-8") from None
    return value


def file_name(value: str) -> str:
    """A kind: the path of a file."""
    if not Path(text(value)).name:
        raise argparse.ArgumentTypeError(f"{value!r} is not the name of a file")
    return value


def folder_name(value: str) -> str:
    """A kind: the path of a folder (a point for this one)."""
    if not text(value):
        raise argparse.ArgumentTypeError("'' is not the name of a folder")
    return value


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A kind: whole numbers from `low` to `high`."""

    def kind(value: str) -> int:
        try:
            number = int(value) if len(value) <= 20 else None
        except ValueError:
            number = None
        if number is None or number < low or (high is not None and number > high):
            raise argparse.ArgumentTypeError(f"{value[:40]!r} is not {kind.__doc__}")
        return number

    kind.__doc__ = f"a whole number from {low}" + (f" to {high}" if high is not None else " on")
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
