"""Where clients train, one after another: in memory that is made once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from fslora.protocol import LocalRule
from fslora.ranks import SameRanks
from fslora.stacks import Kind, Stacks

_MOST = 64  # places; where clients' layouts are more than a few, none comes back for long


class Places:
    """A place to train in for each way that clients' factors may lie.

    All places are in the same memory, that of the client with most ranks so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: dict[Kind, list[Tensor]] = {}  # leaves and their gradients
        self._places: dict[Hashable, SameRanks] = {}

    def place(self, received: Stacks, head: Sequence[nn.Parameter], rule: LocalRule) -> SameRanks:
        """Return the place for factors that lie as these do, trained by a rule with some heads."""
        key = received.layout, rule, *map(id, head)
        if key not in self._places:
            if not self._fits(received) or len(self._places) == _MOST:
                self._places.clear()
            parts = [
                [tensor[: len(rows)] for tensor in self._room(kind, rows)]
                for kind, rows in zip(received.layout.kinds, received.tensors, strict=True)
            ]
            leaves = Stacks(received.layout, [leaf for leaf, _ in parts])
            gradients = [gradient for _, gradient in parts]
            self._places[key] = SameRanks(leaves, gradients, head, rule)
        return self._places[key]

    def _fits(self, received: Stacks) -> bool:
        """Whether there is memory for as many rows of each kind."""
        needed = zip(received.layout.kinds, received.tensors, strict=True)
        return all(
            kind in self._memory and len(self._memory[kind][0]) >= len(t) for kind, t in needed
        )

    def _room(self, kind: Kind, rows: Tensor) -> list[Tensor]:
        """Return memory of a kind for some rows at least, made anew where there is less."""
        if kind not in self._memory or len(self._memory[kind][0]) < len(rows):
            self._memory.pop(kind, None)
            self._memory[kind] = [torch.zeros_like(rows, device=self._device) for _ in range(2)]
        return self._memory[kind]
