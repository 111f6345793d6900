"""Writing so that a crash at any instruction, or a full disk, leaves the old content or the new.

New content is written beside the old, brought to the disk, and only then renamed into place; the
folder is brought to the disk too, because a rename is a change of the folder.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

_PARTIAL = ".partial"
LOCK_FILE = ".lock"
_OWNER_FILE = ".lock.owner"


def write_atomically(path: Path, data: bytes, *, keep: Path | None = None) -> None:
    """Replace a file by new content in one step: readers see the old or the new, never a part.

    Args:
        path: the file; its folder is made where it is missing.
        data: the new content.
        keep: where the old content stays, whole. Between two renames it is there and ``path`` is
            not.

    Raises:
        OSError: it cannot be written; the old content is whole, at ``path`` or at ``keep``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None:
            with suppress(FileNotFoundError):
                path.replace(keep)
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def append_line(path: Path, line: str) -> None:
    """Append a line to a file that is there, and bring it to the disk.

    Raises:
        OSError: it cannot be written; a part of the line may be.
    """
    with path.open("ab") as file:
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())


def replace_folder(folder: Path, write: Callable[[str], object]) -> None:
    """Let ``write`` fill a folder, and put it in place only when it is whole.

    Raises:
        OSError: it cannot be written; the old folder is in place, or beside it for one instant.
    """
    partial, old = _beside(folder), _beside(folder.with_name(f"{folder.name}.old"))
    try:
        write(str(partial))
        for file in partial.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        with suppress(FileNotFoundError):
            folder.replace(old)
        partial.replace(folder)
        sync_folder(folder.parent)
    finally:
        for rest in (partial, old):
            shutil.rmtree(rest, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Bring what was created, renamed and deleted in a folder to the disk, where systems can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")


@contextmanager
def locked(folder: Path, kept: Callable[[Path], str] = lambda _: "") -> Iterator[None]:
    """Keep other processes out of a folder, and clear away what a killed one left half written.

    The lock is the operating system's: it ends with the process, however that ends.

    Args:
        folder: made where it is missing.
        kept: as ``explained_errors``.

    Raises:
        ValueError: another process is in it, which is named, or it cannot be written to.
    """
    owner, lock = folder / _OWNER_FILE, FileLock(folder / LOCK_FILE, timeout=0)
    with explained_errors(folder, kept):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"{folder} is in use by {_name_in(owner)}; let it end, or choose another --out"
            ) from None
    try:
        with explained_errors(folder, kept):
            owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
            for rest in [*folder.glob(f".*{_PARTIAL}"), *folder.glob(f"*/.*{_PARTIAL}")]:
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        yield
    finally:
        lock.release()


def _name_in(owner: Path) -> str:
    try:
        return owner.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"


@contextmanager
def explained_errors(folder: Path, kept: Callable[[Path], str] = lambda _: "") -> Iterator[None]:
    """Turn a full disk or a read-only folder into one message with the remedy.

    Args:
        folder: where is written.
        kept: says of the folder what is not lost, and is asked after an error only; default
            whatever was there before.

    Raises:
        ValueError: in place of any error of writing inside.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason, whole = getattr(error, "strerror", None) or error, kept(folder)
        resume = ", and go on with --resume" if whole else ""
        raise ValueError(
            f"cannot write to {folder}: {reason}; {whole or 'what was there before'} is intact. "
            f"Make room there, or make it writable{resume}; or choose another --out"
        ) from error


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before the work whose results it is for.

    Raises:
        ValueError: it cannot be made, or nothing can be made in it.
    """
    with explained_errors(folder):
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    with suppress(OSError):  # not left empty where the work comes to nothing
        for made in missing:
            made.rmdir()
