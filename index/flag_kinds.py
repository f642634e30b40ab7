"""Kinds of flags: what a value may be stands where the flag is defined, is checked there, and is shown by `--help`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from commands import InputError

Kind = Callable[[str], Any]
MOST = 10**12


def _kind(words: str, convert: Callable[[str], Any]) -> Kind:
    """A kind whose values are those that `convert` takes; anything else "is not `words`"."""

    def kind(text: str) -> Any:
        try:
            return convert(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {words}") from None

    kind.words = words
    return kind


def integer(low: int, high: int = MOST) -> Kind:
    """Whole numbers from `low` to `high`."""

    def convert(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise ValueError
        return number

    return _kind(f"a whole number from {low}" + (" on, 10^12 at most" if high == MOST else f" to {high}"), convert)


def decimal(low: float, high: float = math.inf, *, without_low: bool = False) -> Kind:
    """Finite numbers from `low` (or above it, `without_low`) and below `high`."""

    def convert(text: str) -> float:
        number = float(text)
        if not low <= number < high or (without_low and number == low):
            raise ValueError
        return number

    end = "" if high == math.inf else f" and below {high:g}"
    return _kind(f"a number {'above' if without_low else 'of at least'} {low:g}{end}", convert)


def file_path(text: str) -> Path:
    """The path of a file."""
    if Path(text).name in ("", "..") or text.endswith("/"):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not the name of a file")
    return Path(text)


def epsilon(text: str) -> float:
    """0, or a number with which Sinkhorn can calculate."""
    number = float(text)
    if number != 0 and not 1e-12 <= number <= 1e6:
        raise ValueError
    return number


def truth(text: str) -> bool:
    """True or False, so that `--bn False` is false."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError
    return values[text.lower()]


EPSILON = _kind("0, or a number from 1e-12 to 1e6", epsilon)
TRUTH = _kind("True or False", truth)
SEED = integer(0, 2**32 - 1)
CODES = integer(2, 2**20)
LEVELS = 26  # at most, a letter each


class _Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as written; after each flag's text what its values may be, and its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        facts = [action.type.words] if hasattr(action.type, "words") else []
        if action.default not in (None, "", argparse.SUPPRESS) and action.option_strings and action.nargs != 0:
            default = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
            facts.append(f"default {default}")
        return (action.help or "") + (f" ({'; '.join(facts)})".replace("%", "%%") if facts else "")


class FlagParser(argparse.ArgumentParser):
    """A parser whose complaints are an `InputError`: one line and status 2, as for every other mistake."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise `message`."""
        raise InputError(f"{message.removeprefix('argument ')}; --help explains the flags")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's, for words that UTF-8 can write (reports and messages name them)."""
        parsed = super().parse_known_args(args, namespace)
        for name, value in vars(parsed[0]).items():
            if not str(value).isprintable():
                raise InputError(f"--{name} {str(value)[:80]!r}: has bytes or characters that cannot be printed")
        return parsed

    def recorded(self, flags: argparse.Namespace, source: Any) -> argparse.Namespace:
        """The flags that a file carries, by the same rules as those of a command line; unknown ones are left out.

        Args:
            flags: what was parsed once, or what somebody wrote there instead.
            source: the file, for messages.

        Raises:
            InputError: with the first flag that is out of range.
        """
        words = []
        for name, value in vars(flags).items():
            if isinstance(value, list | tuple):
                words += [f"--{name}", *map(str, value)]
            elif value is not None:
                words.append(f"--{name}={value}")
        try:
            parsed = vars(self.parse_known_args(words)[0])
        except (InputError, ValueError) as error:  # a number of thousands of digits
            raise InputError(f"{source}: its flags are not those of a run ({str(error).split(';')[0]})") from None
        return argparse.Namespace(**{name: parsed[name] for name in vars(flags).keys() & parsed.keys()})
