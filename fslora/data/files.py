"""Reading one data file into rows: text, tables and JSON, each also gzipped.

All values become strings. What is malformed is refused with its line, never repaired.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

Rows = list[dict[str, str]]
Lines = Iterator[tuple[int, list[str]]]  # of a table: the line's number, its fields


def read_file(path: Path, *, header: bool = True, play: bool = False) -> Rows:
    """Read one file by its suffix.

    Args:
        path: a .txt, .tsv, .csv, .json, .jsonl or .parquet file, or one of these with .gz.
        header: whether the first line of a tsv or csv names the columns; else they are named
            by their position, "0", "1", ….
        play: read a .txt as a play: one row per turn, with the columns `speaker` and `text`.

    Raises:
        ValueError: the file cannot be read, is empty or malformed (with the line), or of an
            unknown type.
    """
    suffix = file_type(path)
    if suffix is None:
        raise ValueError(f"{path}: unknown file type; known are {', '.join(TYPES)}, also with .gz")
    if play and suffix != ".txt":
        raise ValueError(f"{path}: the play reader reads .txt files; drop --reader play")
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
        if suffix in _TABLES:
            rows = _rows_of_table(_TABLES[suffix](content), header=header)
        else:
            rows = _read_play(content) if play else _READERS[suffix](content)
    except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply; give each row as one flat object") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows; name a file that has some")
    return rows


def file_type(path: Path) -> str | None:
    """The suffix that says how to read a file, without .gz; None where there is no reader."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in TYPES else None


def as_text(value: object) -> str:
    """A value as the string that a row holds: none is empty, what is no string becomes JSON."""
    if value is None:
        return ""
    if isinstance(value, bytes):  # as some writers of parquet leave text
        with suppress(UnicodeDecodeError):
            return value.decode()
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} is not UTF-8; convert the file to UTF-8") from error


def _read_text(content: bytes) -> Rows:
    text = _decode(content)
    return [{"text": text}] if text.strip() else []


def _read_play(content: bytes) -> Rows:
    """Turns of the form `NAME:`, lines, blank line; those without a word are left out."""
    turns: list[tuple[str, str]] = []
    for paragraph in re.split(r"\n\s*\n", _decode(content).replace("\r\n", "\n").strip()):
        first, _, words = paragraph.partition("\n")
        if (name := first.rstrip()).endswith(":"):
            turns.append((name[:-1], words))
        elif turns:  # a turn of several paragraphs
            turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n\n{paragraph}")
        elif paragraph:
            raise ValueError(
                "line 1 is no `NAME:`; a play's turn is NAME:, its lines, a blank line"
            )
    return [{"speaker": name, "text": words.strip()} for name, words in turns if words.strip()]


def _tsv_lines(content: bytes) -> Lines:
    """Tab-separated values without quoting: a quote is a character like any other, as in GLUE."""
    for number, line in enumerate(_decode(content).split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r").split("\t")


def _csv_lines(content: bytes) -> Lines:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the default of 131,072
    reader = csv.reader(io.StringIO(_decode(content), newline=""), strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise ValueError(
            f"line {reader.line_num}: {error}; a field with a comma or quote in it is quoted, and "
            'a quote in it doubled: "so ""quoted"""'
        ) from None


def _rows_of_table(lines: Lines, *, header: bool) -> Rows:
    names: list[str] = []
    rows = []
    for number, fields in lines:
        if not names:
            names = fields if header else [str(position) for position in range(len(fields))]
            if len(set(names)) < len(names):
                raise ValueError(f"line {number} names a column twice ({names}); --no-header?")
            if header:
                continue
        if len(fields) != len(names):
            raise ValueError(
                f"line {number} has {len(fields)} fields, but the first line has {len(names)}; "
                "correct the line"
            )
        rows.append(dict(zip(names, fields, strict=True)))
    return rows


def _read_json(content: bytes) -> Rows:
    """A list of objects, or one object per line: the content says which."""
    text = _decode(content)
    if text.lstrip().startswith("["):
        return [_json_row(value, f"item {n}") for n, value in enumerate(json.loads(text), 1)]
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number} is no JSON ({error.msg}); a JSON file is a list of objects "
                    "or has one object per line"
                ) from error
            rows.append(_json_row(value, f"line {number}"))
    return rows


def _json_row(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(  # noqa: TRY004 - a malformed file, no caller's mistake
            f"{where} is no object; each row is an object {{column: value, …}}"
        )
    row = {name: as_text(field) for name, field in value.items()}
    try:
        "".join([*row, *row.values()]).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half a character, {error.object[error.start]!r}, as of an emoji cut in "
            "two; take it out"
        ) from None
    return row


def _read_parquet(content: bytes) -> Rows:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("reading parquet needs pyarrow: pip install 'fslora[data]'") from error
    table = parquet.read_table(io.BytesIO(content))
    return [_json_row(row, "a row") for row in table.to_pylist()]


_READERS: dict[str, Callable[[bytes], Rows]] = {
    ".txt": _read_text,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}
_TABLES: dict[str, Callable[[bytes], Lines]] = {".tsv": _tsv_lines, ".csv": _csv_lines}
TYPES = (*_READERS, *_TABLES)
