"""Each text is tokenised once and its tokens are kept in memory-mapped files, whatever template an epoch draws.

A fast tokenizer cuts a text at the item tokens first and tokenises what is between them each by itself (and only the very
first of these pieces may differ for being the first). So the pieces are what is kept: a separator or a template's beginning
once for all samples, an item's description once for each template. Samples are put together from them. In memory are a hash and
a number for each piece: about 120 bytes. `check` compares with the tokenizer itself.

Files: `<folder>/<hash of the tokenizer>/<random>.tokens`, one for each process that found something new. Such a file only
grows. A record is a piece's hash (4 words), the number of its tokens, a checksum (CRC-32) of both and of the tokens, and the
tokens, in words of 32 bits (little-endian). A record that is cut off or damaged, and what follows it, is as if it were not there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import uuid
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from data import ITEM_TOKEN
from utils import say

CUT = re.compile(f"({ITEM_TOKEN.pattern})")  # a split keeps the item tokens
BEGUN_ITEM_TOKEN = re.compile(r"<([a-z]+(_\d*)?)?$")
WORD = np.dtype("<u4")
MAGIC = b"LC-Rec tokens 1\n"
HEAD = 6  # words before a record's tokens
SHORT, MOST_SHORT = 32, 1 << 16  # pieces of so few characters stay in memory too, up to so many: separators
OFFSET_BITS = 40

Piece = tuple[bool, str]  # is it the beginning of a text; the text between two item tokens


class TokenStore:
    """Token ids of texts, without BOS and EOS, from a memory-mapped store that grows with what is new.

    Several processes and runs may use one folder at a time: each appends to a file of its own and reads all.

    Args:
        tokenizer: a fast tokenizer with item tokens among its added tokens.
        folder: where the files go; made if missing.

    Raises:
        ValueError: this tokenizer does not tokenise the texts between item tokens by themselves.
    """

    def __init__(self, tokenizer: Any, folder: str | Path):
        self._tokenizer = _separate_copy(tokenizer)
        self._items = _item_ids(tokenizer)
        self._before = next(iter(self._items))  # an item token, put before a piece that does not begin its text
        self.folder = Path(folder) / _name(self._tokenizer)
        self._files: list[_TokenFile] = []
        self._places: dict[bytes, int] = {}  # a piece's hash → file number and the record's first word
        self._short: dict[Piece, list[int]] = {}
        self._own: _Writer | None = None
        self._writes = True  # what is new is kept
        self.tokenised = self.found = 0  # pieces since this process began
        self.refresh()

    def refresh(self) -> None:
        """Look for what other processes have written since."""
        known = {file.path for file in self._files}
        self._files += [_TokenFile(path) for path in sorted(self.folder.glob("*.tokens")) if path not in known]
        for number, file in enumerate(self._files):
            for key, place in file.new_records():
                self._places.setdefault(key, number << OFFSET_BITS | place)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids that `tokenizer(text, add_special_tokens=False)` has for each text."""
        split = [self._split(text) for text in texts]
        ids = self._ids_of({part for parts in split for part in parts if not isinstance(part, int)})
        return [
            [token for part in parts for token in ((part,) if isinstance(part, int) else ids[part])] for parts in split
        ]

    def _split(self, text: str) -> list[int | Piece]:
        parts: list[int | Piece] = []
        piece = ""  # what looks like an item token but is none in this vocabulary is text
        for part in CUT.split(text):
            item = self._items.get(part)
            if item is None:
                piece += part
                continue
            if piece:
                parts.append((not parts, piece))
            parts.append(item)
            piece = ""
        return [*parts, (not parts, piece)] if piece else parts

    def _ids_of(self, pieces: set[Piece]) -> dict[Piece, list[int]]:
        ids: dict[Piece, list[int]] = {}
        missing: dict[Piece, bytes] = {}
        for piece in pieces:
            if (kept := self._short.get(piece)) is not None:
                ids[piece] = kept
                continue
            key = _key(piece)
            place = self._places.get(key)
            if place is not None:
                kept = self._files[place >> OFFSET_BITS].tokens(place & ((1 << OFFSET_BITS) - 1))
                if kept is None:
                    self._stop("its files cannot be read any more")
            if kept is None:
                missing[piece] = key
                continue
            ids[piece] = kept
            self._remember(piece, kept)
        self.found += len(pieces) - len(missing)
        if missing:
            self.tokenised += len(missing)
            new = self._tokenise(list(missing))
            self._append(list(missing.values()), new)
            for piece, tokens in zip(missing, new, strict=True):
                self._remember(piece, tokens)
                ids[piece] = tokens
        return ids

    def _remember(self, piece: Piece, ids: list[int]) -> None:
        if len(piece[1]) <= SHORT and len(self._short) < MOST_SHORT:
            self._short[piece] = ids

    def _tokenise(self, pieces: list[Piece]) -> list[list[int]]:
        texts = [text if first else self._before + text for first, text in pieces]
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids if first else one.ids[1:] for one, (first, _) in zip(found, pieces, strict=True)]

    def _append(self, keys: list[bytes], rows: list[list[int]]) -> None:
        if not self._writes:
            return
        try:
            if self._own is None or self._own.process != os.getpid():  # a forked process writes a file of its own
                self._own = _Writer(self.folder)
                self._files.append(_TokenFile(self._own.path))
            number = next(i for i, file in enumerate(self._files) if file.path == self._own.path)
            for key, place in zip(keys, self._own.append(keys, rows), strict=True):
                self._places[key] = number << OFFSET_BITS | place
        except OSError as error:
            self._stop(error.strerror)

    def _stop(self, reason: str) -> None:
        if self._writes:
            self._writes = False
            say(f"note: {self.folder}: no more tokens are kept there ({reason}); training goes on")

    def close(self) -> None:
        """Let go of all files, so that they can be removed; what is asked for afterwards is tokenised anew."""
        self._files, self._places, self._own, self._writes = [], {}, None, False

    def check(self, tokenizer: Any, texts: list[str]) -> None:
        """Compare with the tokenizer itself. Raises ValueError if a text has other ids there."""
        if self.encode(texts) != tokenizer(texts, add_special_tokens=False)["input_ids"]:
            raise ValueError("the tokenizer reads a text between item tokens in different ways")


class _TokenFile:
    """A file of records, mapped into memory; it may grow."""

    def __init__(self, path: Path):
        self.path = path
        self._words = np.zeros(0, WORD)
        self._seen = len(MAGIC) // WORD.itemsize

    def _map(self) -> None:
        try:
            size = self.path.stat().st_size // WORD.itemsize
            if size > len(self._words):
                self._words = np.memmap(self.path, WORD, "r", shape=(size,)).view(np.ndarray)
        except OSError:  # removed, or somebody else's: what is mapped stays
            return

    def new_records(self) -> list[tuple[bytes, int]]:
        """Hash and first word of each whole record that was not there the last time."""
        self._map()
        words, records = self._words, []
        if words[: len(MAGIC) // WORD.itemsize].tobytes() != MAGIC:
            return []
        while (start := self._seen) + HEAD <= len(words):
            count, checksum = words[start + 4 : start + HEAD].tolist()
            end = start + HEAD + count
            if end > len(words) or _checksum(words[start : start + 5], words[start + HEAD : end]) != checksum:
                break
            records.append((words[start : start + 4].tobytes(), start))
            self._seen = end
        return records

    def tokens(self, start: int) -> list[int] | None:
        """The tokens of the record that begins at word `start`; None if the file was removed before they were mapped."""
        if start + HEAD > len(self._words):
            self._map()
            if start + HEAD > len(self._words):
                return None
        return self._words[start + HEAD : start + HEAD + int(self._words[start + 4])].tolist()


class _Writer:
    """Appends records to a new file in `folder`."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.process = folder / f"{uuid.uuid4().hex}.tokens", os.getpid()
        with open(self.path, "xb") as file:
            self._words = file.write(MAGIC) // WORD.itemsize

    def append(self, keys: list[bytes], rows: list[list[int]]) -> list[int]:
        """Write a record for each of `rows`; the first word of each."""
        parts, places = [], []
        for key, row in zip(keys, rows, strict=True):
            head, tokens = key + np.array([len(row)], WORD).tobytes(), np.array(row, WORD).tobytes()
            places.append(self._words)
            parts += [head, np.array([_checksum(head, tokens)], WORD).tobytes(), tokens]
            self._words += HEAD + len(row)
        content = b"".join(parts)
        with open(self.path, "r+b", buffering=0) as file:  # not "ab", which would begin a removed file anew
            file.seek(0, os.SEEK_END)
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return places


def _checksum(head: Any, tokens: Any) -> int:
    return zlib.crc32(tokens, zlib.crc32(head, zlib.crc32(MAGIC)))  # of nothing but zeros it is not zero


def _name(tokenizer: Tokenizer) -> str:
    """What tells one tokenizer from another: its settings and the version of the library that carries them out."""
    text = f"{tokenizers.__version__}\n{tokenizer.to_str()}"
    return hashlib.sha256(MAGIC + text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _key(piece: Piece) -> bytes:
    first, text = piece
    return hashlib.blake2b((b"\1" if first else b"\0") + text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _separate_copy(tokenizer: Any) -> Tokenizer:
    """The tokenizer's own tokenizer, whose settings nobody else changes."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("it is not a fast tokenizer")
    if getattr(tokenizer, "split_special_tokens", False):
        raise ValueError("the tokenizer splits special tokens")
    try:
        copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # noqa: BLE001  (the library raises nothing more special for parts written in Python)
        raise ValueError(f"the tokenizer cannot be copied: {error}") from None
    copy.no_padding()
    copy.no_truncation()
    return copy


def _item_ids(tokenizer: Any) -> dict[str, int]:
    """The item tokens, which cut a text wherever they stand."""
    added = tokenizer.added_tokens_decoder
    items = {token.content: number for number, token in added.items() if ITEM_TOKEN.fullmatch(token.content)}
    if not items:
        raise ValueError("the tokenizer has no item tokens")
    for token in added.values():
        if token.content in items:
            if token.normalized or token.lstrip or token.rstrip or token.single_word:
                raise ValueError(f"the tokenizer does not find {token.content} everywhere, or takes blanks with it")
        elif ITEM_TOKEN.search(token.content) or BEGUN_ITEM_TOKEN.search(token.content[1:]):
            raise ValueError(f"the token {token.content!r} may overlap an item token")
    return items
