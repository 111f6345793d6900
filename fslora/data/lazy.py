"""Clients' examples, tokenised when they are first asked for: most of ten thousand never are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import overload

from fslora.data.tasks import Examples


class LazyExamples(Sequence[Examples]):
    """What each client has, in the order of the clients.

    What was asked for by its position is kept; going through all keeps nothing more, so that a pass
    over all clients does not need the memory for all of them.
    """

    def __init__(self, count: int, encode: Callable[[int], Examples]) -> None:
        self._count, self._encode = count, encode
        self._kept: dict[int, Examples] = {}

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, client: int) -> Examples: ...
    @overload
    def __getitem__(self, client: slice) -> list[Examples]: ...
    def __getitem__(self, client: int | slice) -> Examples | list[Examples]:
        """The examples of the client at a position, or of several."""
        if isinstance(client, slice):
            return [self[place] for place in range(*client.indices(self._count))]
        place = range(self._count)[client]
        if place not in self._kept:
            self._kept[place] = self._encode(place)
        return self._kept[place]

    def __iter__(self) -> Iterator[Examples]:
        for place in range(self._count):
            kept = self._kept.get(place)
            yield self._encode(place) if kept is None else kept


class NamedExamples(Mapping[str, Examples]):
    """Examples by the client's name; as lazy as the sequence is."""

    def __init__(self, names: Sequence[str], clients: Sequence[Examples]) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._clients = clients

    def __getitem__(self, name: str) -> Examples:
        return self._clients[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
