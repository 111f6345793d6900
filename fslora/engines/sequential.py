"""One client after another in this process: the reference that other engines must equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fslora.protocol import ClientFn, ClientTask, ClientUpdate


def sequential(client: ClientFn, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate]:
    """Yield each task's update as soon as it is done."""
    for task in tasks:
        yield client(task)
