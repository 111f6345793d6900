"""Clients in this process, spoken to in bytes: what an engine with a network in between does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fslora.protocol import ClientFn, ClientTask, ClientUpdate, Engine
from fslora.wire import answered, encode_task, received


def over_wire(run: str) -> Engine:
    """Return the engine that runs one client after another through ``fslora.wire``.

    Args:
        run: id of the run, in every message.
    """

    def engine(client: ClientFn, tasks: Iterable[ClientTask]) -> Iterator[ClientUpdate]:
        for task in tasks:
            if task.private:
                yield client(task)
            else:
                yield received(answered(encode_task(task, run), client, run), task, run)

    return engine
