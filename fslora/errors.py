"""Which errors are told to the user in a line, without a traceback."""

from __future__ import annotations


class StoppedRunError(RuntimeError):
    """A run cannot go on; the state before the round is the last good one, and is kept."""


_OURS = ("fslora", "fslora_kernels", "tyro")


def is_for_the_user(error: Exception, *others: str) -> bool:
    """Whether the message says it all: it was raised in our own packages, or derives from it.

    Args:
        error: what was raised.
        others: packages whose messages count like our own.
    """
    if not isinstance(
        error, ValueError | FileNotFoundError | NotImplementedError | StoppedRunError
    ):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.split(".")[0] in (*_OURS, *others)
