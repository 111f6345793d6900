"""A disk that fails from some operation on."""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import safetensors.torch


class CrashError(BaseException):
    """Stands for a process that is no more: nobody catches it."""


class FailingFile:
    """A file whose writes are operations of a disk; a write that fails has written half."""

    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if self.disk.failed or self.disk.count == self.disk.step:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
        self.disk.operation()
        return self.file.write(data)

    def flush(self):
        self.disk.operation()
        self.file.flush()


class FailingDisk:
    """Within it every operation that changes a disk is counted, and fails from ``step`` on.

    ``kind`` is the error's number; None raises ``CrashError`` in place of an error.
    """

    def __init__(self, step, kind):
        self.step, self.kind = step, kind
        self.count, self.failed = 0, False

    def operation(self):
        self.failed = self.failed or self.count == self.step
        self.count += 1
        if self.failed:
            raise CrashError if self.kind is None else OSError(self.kind, os.strerror(self.kind))

    def _counted(self, function):
        def counted(*arguments, **named):
            self.operation()
            return function(*arguments, **named)

        return counted

    def _opening(self, function):
        def opened(path, mode="r", *arguments, **named):
            if not set(mode) & set("wax+"):
                return function(path, mode, *arguments, **named)
            self.operation()
            return FailingFile(function(path, mode, *arguments, **named), self)

        return opened

    def __enter__(self):
        with ExitStack() as stack:
            for owner, name in [
                *((Path, name) for name in ("replace", "mkdir", "unlink")),
                (os, "fsync"),
                (shutil, "rmtree"),
                (safetensors.torch, "save_file"),
            ]:
                right = getattr(owner, name)
                stack.enter_context(patch.object(owner, name, self._counted(right)))
            stack.enter_context(patch.object(Path, "open", self._opening(Path.open)))
            self.patches = stack.pop_all()
        return self

    def __exit__(self, *_):
        self.patches.close()
