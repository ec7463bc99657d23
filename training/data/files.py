"""Reads values from files: JSON, JSON Lines, CSV, TSV, Parquet and plain text, optionally gzipped.

The format is detected from the content; only CSV, TSV and plain text are recognized by their file name.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from training.data.errors import BadRow
from training.errors import DataError

_GZIP, _PARQUET, _UTF_16 = b"\x1f\x8b", b"PAR1", (b"\xff\xfe", b"\xfe\xff")
_JSON_ENDINGS = {".json", ".jsonl", ".ndjson"}
_JSON_BEGINS = re.compile(r'\s*(\[\s*)?\{\s*["}]')
_BETWEEN = re.compile(r"[ \t\r\n,]*")

_WRAPPERS = ("data", "train", "validation", "test", "rows", "examples", "instances", "samples")
"""Keys under which a file may hold its list of rows."""

csv.field_size_limit(1 << 30)  # a cell may hold a whole conversation; the default is 128 KiB


def read_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place (`12`, or `row 12` in a Parquet file) and value of every row.

    The value of a broken row is a BadRow. Raises DataError if the file cannot be read any further. A line of plain text
    is a `text` row. CSV cells are text; empty cells are skipped.
    """
    try:
        with path.open("rb") as file:
            is_gzip = file.peek(2)[:2] == _GZIP
            yield from _read(path.name, gzip.GzipFile(fileobj=file) if is_gzip else file)
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "the file is damaged"
        raise DataError(f"{path.name}: cannot be read: {reason}") from error


def _read(name: str, file: Any) -> Iterator[tuple[str, Any]]:
    head: bytes = file.peek(4096)
    if head.startswith(_PARQUET):
        return _read_parquet(name, file)
    begin = head.decode("utf-8-sig", errors="replace")
    lines = _decode(name, file)
    if "\r" in begin and "\n" not in begin:  # line ends of old Macs, and of Excel on them
        lines = (f"{line}\n" for line in "".join(lines).split("\r"))
    ending = Path(name.lower().removesuffix(".gz")).suffix
    if ending in _JSON_ENDINGS or _JSON_BEGINS.match(begin):
        return _read_array(name, lines) if begin.lstrip().startswith("[") else _read_objects(name, lines)
    if ending in {".csv", ".tsv"}:
        return _read_csv(name, lines)
    if ending == ".txt":
        return ((str(at), {"text": line.strip()}) for at, line in enumerate(lines, 1) if line.strip())
    raise DataError(
        f"{name}: not a data file: expected JSON, JSON Lines or Parquet, or a name that ends in .csv, .tsv or .txt; "
        "to exclude it from a folder, use a pattern such as `data/*.jsonl`"
    )


def _decode(name: str, file: BinaryIO) -> Iterator[str]:
    """Yield decoded lines, including line ends."""
    at = 0
    for raw in file:
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            encoding = "utf-16" if at == 0 and raw.startswith(_UTF_16) else "gb18030"
            raise DataError(
                f"{name}: byte {at + error.start} is not UTF-8; convert the file first, for example "
                f"`iconv -f {encoding} -t utf-8`"
            ) from error
        yield line.removeprefix("\ufeff")  # on any line, since files may be concatenated
        at += len(raw)


def _read_objects(name: str, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Read JSON Lines, or a file with one object: a row, or a list of rows under a key such as `data`."""
    head: list[str] = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    begin = _json_or_none("".join(head))
    if begin is None or _lists_of_rows(begin):
        head += lines
        whole = _json_or_none("".join(head))
        if isinstance(whole, dict):
            return _unwrapped(name, whole)
    return _read_json_lines(chain(head, lines))


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _lists_of_rows(value: Any) -> list[str]:
    """Return the keys of lists of rows; a key of a single row, such as `messages`, is not one."""
    if not isinstance(value, dict):
        return []
    return [
        name
        for name, some in value.items()
        if name in _WRAPPERS
        and isinstance(some, list)
        and some
        and all(isinstance(one, dict) for one in some)
    ]


def _unwrapped(name: str, whole: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    lists = _lists_of_rows(whole)
    if len(lists) > 1:
        raise DataError(
            f"{name}: contains several lists of rows, {' and '.join(lists)}: move the rows to train on to a separate "
            "file"
        )
    if not lists:
        yield "1", whole
        return
    for number, value in enumerate(whole[lists[0]], 1):
        yield f"{lists[0]}[{number}]", value


def _read_json_lines(lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield str(number), json.loads(line.rstrip())
            except (ValueError, RecursionError) as error:
                yield str(number), BadRow(_not_json(error))


def _read_array(name: str, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    """Yield the elements of one JSON array, each with its first line."""
    text = "".join(lines)
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _next_element(text, at)
        line += text.count("\n", counted, at)
        counted = at
        if text.startswith("]", at):
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(f"{name}:{line}: {_not_json(error)}") from error
        yield str(line), value
    if text[at + 1 :].strip():
        raise DataError(f"{name}:{line}: unexpected text after the array: put all rows into one array")


def _next_element(text: str, at: int) -> int:
    between = _BETWEEN.match(text, at)
    return between.end() if between else at


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return f"not JSON: {'nested too deeply' if isinstance(error, RecursionError) else 'a number has too many digits'}"


def _read_csv(name: str, lines: Iterator[str]) -> Iterator[tuple[str, Any]]:
    first = next(lines, "")
    # Excel separates cells with semicolons where the comma is the decimal separator.
    delimiter = next((mark for mark in "\t,;" if mark in first), ",")
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    begin = 1
    try:
        columns = [cell.strip() for cell in next(reader, [])]
        named = [column for column in columns if column]
        if len(set(named)) < len(named):
            raise DataError(f"{name}:1: two columns have the same name")
        begin = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield str(begin), _by_column(columns, cells)
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name}:{begin}: not CSV: {error}; quote cells that contain quotes, and double the quotes in them"
        ) from error


def _by_column(columns: list[str], cells: list[str]) -> dict[str, str] | BadRow:
    if len(cells) != len(columns):
        return BadRow(f"the row has {len(cells)} cells, but the first line names {len(columns)} columns")
    return {column: cell for column, cell in zip(columns, cells, strict=True) if column and cell.strip()}


def _read_parquet(name: str, file: Any) -> Iterator[tuple[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]  # noqa: PLC0415 - needed for Parquet files only
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]  # noqa: PLC0415

    number = 0
    try:
        # The index of a Parquet file is at its end, to which a gzip stream cannot seek.
        table = ParquetFile(io.BytesIO(file.read()) if isinstance(file, gzip.GzipFile) else file)
        for batch in table.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield f"row {number}", value
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: damaged, or not a Parquet file, after row {number}") from error
