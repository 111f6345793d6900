"""The model as it came: nobody trains. What every method has to beat.

Bytes: none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fslora.aggregation import ServerOptimizer
from fslora.assignment import first_state
from fslora.protocol import (
    ClientTask,
    ClientUpdate,
    LocalRule,
    ServerState,
    Strategy,
)


def zero_shot(
    _ratios: Mapping[str, float],
    _local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",  # noqa: ARG001
    server_lr: float = 1.0,  # noqa: ARG001
) -> Strategy:
    """Build the strategy; the arguments are those of ``fslora``, and none matters."""

    def assign(_state: ServerState, _cohort: Sequence[str]) -> list[ClientTask]:
        return []

    def aggregate(
        state: ServerState, _tasks: Sequence[ClientTask], _updates: Iterable[ClientUpdate]
    ) -> ServerState:
        return replace(state, round=state.round + 1)

    return Strategy(first_state, assign, aggregate)
