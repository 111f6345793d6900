"""Rows of text from wherever a user keeps them: files, the built-in corpus, Hugging Face."""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from fslora.data.files import TYPES, Rows, as_text, file_type, read_file
from fslora.data.python_docs import python_docs

__all__ = ["BUILT_IN", "Rows", "column", "column_name", "columns", "read_rows"]

BUILT_IN = "python-docs"
_DATASET_ID = re.compile(r"(?P<name>\w[\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
_FILE_SUFFIX = re.compile(r"\.[A-Za-z]\w*")


def read_rows(
    source: str,
    *,
    reader: Literal["auto", "play"] = "auto",
    header: bool = True,
    split: str = "train",
) -> Rows:
    """Read a data set as rows of strings.

    Args:
        source: what to read. In this order: a file or folder that exists (a folder is all its
            files of a known type, sorted by name; a pattern such as `texts/part_*` those of that
            folder that it matches; rows of several files have their file's name as the column
            `file`); `python-docs`, the built-in corpus; else the
            id of a Hugging Face data set, with `:config` where it has several.
        reader: `play` reads text files as plays, one row per turn, columns `speaker` and `text`.
        header: whether the first line of a tsv or csv names its columns.
        split: the split of a Hugging Face data set; files have none.

    Raises:
        FileNotFoundError: `source` looks like a path, and there is nothing.
        ValueError: the data is empty, malformed or cannot be loaded.
    """
    path, play = Path(source).expanduser(), reader == "play"
    try:
        with suppress(FileNotFoundError):  # perhaps it is the name of a data set on the hub
            path.stat()
    except OSError as error:
        raise ValueError(f"cannot read {source[:80]}: {error.strerror}; name other data") from None
    if path.is_file():
        return read_file(path, header=header, play=play)
    if path.is_dir() or (path.parent.is_dir() and _is_pattern(path.name)):
        files = _files_in(path)
        parts = [read_file(file, header=header, play=play) for file in files]
        if len(files) > 1:
            for name, part in zip(_names_of(files), parts, strict=True):
                for row in part:
                    row.setdefault("file", name)
        return [row for part in parts for row in part]
    if reader == "play":
        _refuse_missing_path(source, must_be_path=True)
    if source == BUILT_IN:
        return python_docs()
    _refuse_missing_path(source, must_be_path=False)
    return _read_hub(source, split)


def column_name(rows: Rows, name: str | int) -> str:
    """The name of a column given by its name or else by its position (from 0).

    Raises:
        ValueError: there is no such column.
    """
    names = list(rows[0]) if rows else []
    if str(name) in names:
        return str(name)
    if str(name).isdecimal() and int(name) < len(names):
        return names[int(name)]
    raise ValueError(f"no column {name!r}; the columns are {', '.join(map(repr, names))}")


def column(rows: Rows, name: str | int) -> list[str]:
    """The values of one column, by its name or else by its position (from 0).

    Raises:
        ValueError: there is no such column, or a row lacks it.
    """
    key = column_name(rows, name)
    lacking = next((number for number, row in enumerate(rows) if key not in row), None)
    if lacking is not None:
        raise ValueError(f"row {lacking} has no column {key!r}, only {', '.join(rows[lacking])}")
    return [row[key] for row in rows]


def columns(rows: Rows, names: Sequence[str | int]) -> list[tuple[str, ...]]:
    """The values of several columns, row by row."""
    return list(zip(*(column(rows, name) for name in names), strict=True))


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _files_in(path: Path) -> list[Path]:
    """The data files of a folder, or of a pattern of names in one."""
    found = path.iterdir() if path.is_dir() else path.parent.glob(path.name)
    files = sorted(file for file in found if file.is_file() and file_type(file))
    if not files:
        raise ValueError(
            f"{path}: no data file in this folder; known types are "
            f"{', '.join(TYPES)}, also with .gz"
        )
    return files


def _names_of(files: Sequence[Path]) -> list[str]:
    """The files' names without their type; with it where another has the same name."""
    types = f"({'|'.join(map(re.escape, TYPES))})(\\.gz)?$"
    bare = [re.sub(types, "", file.name, flags=re.IGNORECASE) for file in files]
    return [
        name if bare.count(name) == 1 else file.name for name, file in zip(bare, files, strict=True)
    ]


def _refuse_missing_path(source: str, *, must_be_path: bool) -> None:
    """Raise if a source that does not exist was meant as a path."""
    match = _DATASET_ID.fullmatch(source)
    suffix = Path(source.removesuffix(".gz")).suffix
    if must_be_path or match is None or _FILE_SUFFIX.fullmatch(suffix):
        raise FileNotFoundError(
            f"{source}: no such file or folder; name one that exists, `{BUILT_IN}`, or the id of "
            "a Hugging Face data set (org/name, or org/name:config)"
        )


def _read_hub(source: str, split: str) -> Rows:
    """A data set of the Hugging Face hub; a class label becomes its name, -1 and none are empty."""
    match = _DATASET_ID.fullmatch(source)
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source} is no file here; reading it from Hugging Face needs a library: "
            "pip install 'fslora[data]'"
        ) from error
    name, config = (match["name"], match["config"]) if match else (source, None)
    try:
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of the library's many some derive from none but this
        raise ValueError(
            f"cannot load the data set {source} (split {split}) from Hugging Face: {error}; "
            "check the id, the :config and the network, or name a local file"
        ) from error
    class_names = {
        column: feature.names
        for column, feature in data.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    rows = []
    for record in data:
        for column, names in class_names.items():
            known = record[column] is not None and record[column] >= 0
            record[column] = names[record[column]] if known else None
        rows.append({key: as_text(value) for key, value in record.items()})
    if not rows:
        raise ValueError(f"the split {split} of {source} has no rows; name another split")
    return rows
