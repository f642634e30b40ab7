"""Raw tables of any size, a block at a time: CSV, TSV and JSON lines (gzipped or not) and Parquet, as text with line numbers.

Every reader yields polars frames whose columns are text (or lists of texts) plus `line`, the number of the line (of the row,
for Parquet) from 1. What cannot be read is counted in `BadLines` and left out; `BadLines.settle` then ends the run or goes on.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import UserError, say

BLOCK = 32 << 20  # bytes read at once
LONGEST_LINE = 64 << 20
SURROGATE = re.compile("[\ud800-\udfff]")
TEXT, TEXTS = pl.String, pl.List(pl.String)


@dataclass
class BadLines:
    """What was left out of the raw files: how many lines, and the first of them with their reasons."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, path: Path, line: int, reason: str) -> None:
        """Count one line."""
        self.count += 1
        if len(self.examples) < 5:
            self.examples.append(f"{path}: line {line} {reason}")

    def add_all(self, path: Path, lines: pl.Series, reason: str) -> None:
        """Count the lines with these numbers."""
        for line in lines.head(5):
            self.add(path, line, reason)
        self.count += max(0, len(lines) - 5)

    def settle(self, skip_bad: bool) -> None:
        """Say what is left out. Raises UserError if there is something and `skip_bad` is false."""
        if not self.count:
            return
        some = f"{self.count:,} bad {'line' if self.count == 1 else 'lines'}"
        shown = "; ".join(self.examples) + ("; …" if self.count > len(self.examples) else "")
        if not skip_bad:
            raise UserError(f"{shown} ({some}; --skip_bad leaves them out)")
        say(f"note: {some} left out: {shown}")


# ---- bytes ----


def open_raw(path: Path) -> BinaryIO:
    """The file's bytes, unpacked if they are gzipped. Raises UserError if it is missing, no regular file or unreadable."""
    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return gzip.open(path, "rb") if packed else open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def head_line(path: Path) -> bytes:
    """The file's first line without its end and without a byte order mark."""
    with open_raw(path) as file:
        try:
            return file.readline(LONGEST_LINE).removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be unpacked ({error})") from None


def _last_end(block: bytes, quoted: bool) -> int:
    """Where the last whole line ends; where fields are quoted, a line break between quotes ends no line. 0: nowhere."""
    end, quotes = len(block), block.count(b'"') if quoted else 0
    while (at := block.rfind(b"\n", 0, end)) >= 0:
        if not quoted:
            return at + 1
        quotes -= block.count(b'"', at, end)
        if quotes % 2 == 0:
            return at + 1
        end = at
    return 0


def line_blocks(path: Path, quoted: bool = False) -> Iterator[tuple[int, bytes]]:
    """The number of the first line and the bytes of whole lines, each ended by a line feed, about `BLOCK` bytes at a time.

    Raises:
        UserError: the file is missing, its packing is broken or cut off, or a line is longer than `LONGEST_LINE`.
    """
    line, rest = 1, b""
    with open_raw(path) as file, ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(file.read, BLOCK)  # unpacked while the block before it is parsed
        while True:
            try:
                chunk, ahead = ahead.result(), reader.submit(file.read, BLOCK)
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: cannot be unpacked after line {line} ({error}); fetch it again") from None
            if line == 1 and not rest:
                chunk = chunk.removeprefix(b"\xef\xbb\xbf")
            block = rest + chunk
            end = _last_end(block, quoted) if chunk else len(block)
            if not end and len(block) > LONGEST_LINE:
                what = "is longer than 64 MB: one record a line is expected" + (", or a quote stays open" * quoted)
                raise UserError(f"{path}: line {line} {what}")
            rest = block[end:]
            if end:
                yield line, block[:end] if block[end - 1] == 10 else block[:end] + b"\n"
                line += block.count(b"\n", 0, end)
            if not chunk:
                return


# ---- JSON lines ----


def json_lines(path: Path, fields: dict[str, pl.DataType], bad: BadLines) -> Iterator[pl.DataFrame]:
    """Objects, one a line: the named fields as `TEXT` or `TEXTS`, null where absent; numbers become their digits."""
    for first, block in line_blocks(path):
        try:
            frame = pl.read_ndjson(block, schema=fields)
        except pl.exceptions.PolarsError:
            frame = None
        if frame is not None and frame.height == block.count(b"\n"):
            yield frame.with_columns(line=pl.int_range(first, first + frame.height, dtype=pl.Int64))
        else:
            yield _json_one_by_one(path, first, block, fields, bad)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _text(value: object) -> str | None:
    """A value as text: as it is, a number's digits, anything else as JSON."""
    if value is None:
        return None
    if isinstance(value, str):
        return SURROGATE.sub("\x00", value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return SURROGATE.sub("\x00", json.dumps(value, ensure_ascii=False))


def _texts(value: object) -> list[str | None] | None:
    if value is None or isinstance(value, list):
        return value and [_text(part) for part in value]
    return [_text(value)]


def _json_one_by_one(path: Path, first: int, block: bytes, fields: dict, bad: BadLines) -> pl.DataFrame:
    """The block's lines by Python's own parser: bad lines are found, and a text may stand where a list is expected."""
    rows: dict[str, list] = {name: [] for name in [*fields, "line"]}
    for number, line in enumerate(block.split(b"\n"), first):
        if not line.strip():
            continue
        try:
            content = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        except UnicodeDecodeError:
            bad.add(path, number, "is not UTF-8")
        except (ValueError, RecursionError) as error:
            bad.add(path, number, f"is not JSON ({str(error).split(':')[0]})")
        else:
            if not isinstance(content, dict):
                bad.add(path, number, "is not an object")
                continue
            for name, kind in fields.items():
                rows[name].append((_texts if kind == TEXTS else _text)(content.get(name)))
            rows["line"].append(number)
    return pl.DataFrame(rows, schema={**fields, "line": pl.Int64})


# ---- separated values ----


@dataclass(frozen=True)
class Layout:
    """How a file separates its values: the separator, whether quotes are quotes, and the fields' names.

    `names` None: the first line has them, whole or (with `typed`) before a colon, as in RecBole's atomic files.
    """

    separator: str = ","
    quoted: bool = True
    names: tuple[str, ...] | None = None
    typed: bool = False


def header(path: Path, layout: Layout) -> list[str]:
    """The fields' names. Raises UserError if line 1 names none, or one twice."""
    if layout.names:
        return list(layout.names)
    quoting = csv.QUOTE_MINIMAL if layout.quoted else csv.QUOTE_NONE
    try:
        line = head_line(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: line 1 is not UTF-8") from None
    try:
        names = [name.strip() for name in next(csv.reader([line], delimiter=layout.separator, quoting=quoting), [])]
    except csv.Error as error:
        raise UserError(f"{path}: line 1 names no fields ({error})") from None
    if layout.quoted and line.count('"') % 2:
        raise UserError(f"{path}: line 1: a field's name has a line break, or a quote stays open")
    if layout.typed and not all(":" in name for name in names) or not names:
        raise UserError(f"{path}: line 1 must name the fields{' as name:type' if layout.typed else ''}")
    names = [name.rsplit(":", 1)[0] for name in names] if layout.typed else names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: line 1 names the field {twice[0]!r} twice")
    return names


def separated(path: Path, wanted: list[str], layout: Layout, bad: BadLines) -> Iterator[pl.DataFrame]:
    """The wanted columns of a CSV or TSV file as text. Raises UserError if one of them is not there."""
    names = header(path, layout)
    need(path, names, wanted)
    for first, block in line_blocks(path, layout.quoted):
        if first == 1 and not layout.names:
            first, block = 2, block[block.index(b"\n") + 1 :]
        if block:
            frame = _plain(block, names, first, layout)
            frame = _csv_one_by_one(path, block, names, first, layout, bad) if frame is None else frame
            yield frame.select([*wanted, "line"])


def need(path: Path, names: list[str], wanted: list[str]) -> None:
    """Raises UserError if a wanted field is not among the names."""
    if missing := [name for name in wanted if name not in names]:
        raise UserError(f"{path}: has no field {missing[0]!r}; it has {', '.join(names)}")


def _plain(block: bytes, names: list[str], first: int, layout: Layout) -> pl.DataFrame | None:
    """The block by polars, if it has no quotes and every line has as many fields as there are names; else None."""
    lines = block.count(b"\n")
    if layout.quoted and b'"' in block or block.count(layout.separator.encode()) != lines * (len(names) - 1):
        return None
    try:
        frame = pl.read_csv(
            block,
            has_header=False,
            new_columns=names,
            separator=layout.separator,
            quote_char=None,
            infer_schema=False,
        )
    except pl.exceptions.PolarsError:
        return None
    if frame.height != lines or frame.width != len(names):
        return None
    return frame.with_columns(line=pl.int_range(first, first + lines, dtype=pl.Int64))


def _csv_one_by_one(
    path: Path, block: bytes, names: list[str], first: int, layout: Layout, bad: BadLines
) -> pl.DataFrame:
    """The block's records by Python's own reader, which knows quotes and line numbers."""
    csv.field_size_limit(LONGEST_LINE)
    text = io.StringIO(block.decode("utf-8", errors="surrogateescape"), newline="")
    quoting = csv.QUOTE_MINIMAL if layout.quoted else csv.QUOTE_NONE
    reader = csv.reader(text, delimiter=layout.separator, quoting=quoting)
    rows, numbers, number = [], [], first
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            bad.add(path, number, f"is no record ({error})")
            number = first + reader.line_num
            continue
        if row is None:
            break
        if any(SURROGATE.search(value) for value in row):
            bad.add(path, number, "is not UTF-8")
        elif row and len(row) != len(names):
            bad.add(path, number, f"has {len(row)} fields instead of {len(names)}")
        elif row:
            rows.append([value or None for value in row])
            numbers.append(number)
        number = first + reader.line_num
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, TEXT), orient="row")
    return frame.with_columns(line=pl.Series(numbers, dtype=pl.Int64))


# ---- Parquet ----


def parquet(path: Path, wanted: list[str]) -> Iterator[pl.DataFrame]:
    """The wanted columns of a Parquet file as text; a time becomes seconds since 1970, lists are joined by blanks."""
    if not path.is_file():
        raise UserError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    try:
        frame = pl.scan_parquet(path, glob=False)
        schema = frame.collect_schema()
        need(path, list(schema), wanted)
        columns = [_as_text(name, schema[name]) for name in wanted]
        yield from (
            frame.with_row_index("line", offset=1).select(*columns, pl.col("line").cast(pl.Int64)).collect_batches()
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be read as Parquet ({reason})") from None


def _as_text(name: str, kind: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if kind.is_temporal():
        column = column.cast(pl.Datetime("us")).dt.timestamp("us") / 1e6
    if isinstance(kind, pl.List):
        column = column.cast(TEXTS).list.join(" ", ignore_nulls=True)
    return column.cast(TEXT)


# ---- any of them ----


def table_files(pattern: str) -> list[Path]:
    """The files of a path, a folder (all Parquet, CSV and JSONL files in it, or below it) or a pattern, sorted by name."""
    path = Path(pattern)
    if pattern and path.is_dir():
        found = sorted(file for file in path.rglob("*") if table_kind(file) and not file.name.startswith(("_", ".")))
    else:
        try:
            found = [path] if pattern and path.exists() else sorted(Path(path.anchor).glob(pattern.lstrip("/")))
        except (NotImplementedError, ValueError, re.error):
            found = []
    if not found:
        raise UserError(f"{pattern!r}: no such file, or no table in this folder (.csv, .tsv, .jsonl, .parquet)")
    return found


def table_kind(path: Path) -> str:
    """csv, tsv, jsonl or parquet by the name's ending (.gz apart); empty if it is none of them."""
    ending = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    return {"ndjson": "jsonl", "json": "jsonl", "pq": "parquet"}.get(
        ending, ending if ending in ("csv", "tsv", "jsonl", "parquet") else ""
    )


def table(path: Path, wanted: list[str], bad: BadLines) -> Iterator[pl.DataFrame]:
    """The wanted columns of one table as text, whatever its format. Raises UserError for an unknown ending."""
    kind = table_kind(path)
    if kind == "parquet":
        yield from parquet(path, wanted)
    elif kind == "jsonl":
        seen = set()
        for frame in json_lines(path, dict.fromkeys(wanted, TEXT), bad):
            seen |= {name for name in wanted if frame[name].null_count() < frame.height}
            yield frame
        if missing := [name for name in wanted if name not in seen]:
            raise UserError(f"{path}: no line has the field {missing[0]!r}")
    elif kind:
        yield from separated(path, wanted, Layout(separator="\t" if kind == "tsv" else ","), bad)
    else:
        raise UserError(f"{path}: the ending must be .csv, .tsv, .jsonl or .parquet (.gz may follow)")
