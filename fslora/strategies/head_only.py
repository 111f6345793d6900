"""Federated training of the head alone: the reference that an adapter has to beat.

The adapter keeps its first values (B = 0, so the base model as it is); clients receive, train and
return the heads only, and the server averages them.

Bytes of one client and round, each way: the heads, whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fslora.aggregation import ServerOptimizer, averaged
from fslora.assignment import client_tasks
from fslora.protocol import (
    Adapters,
    ClientTask,
    ClientUpdate,
    Extras,
    LocalRule,
    ServerState,
    Strategy,
)


def head_only(
    _ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy; the arguments are those of ``fslora``, and no ratio matters.

    Raises:
        ValueError: in ``init``: the model has no head to train.
    """

    def init(adapters: Adapters, extras: Extras, seed: int) -> ServerState:
        if not extras:
            raise ValueError("head-only needs a head to train: use it with --task classification")
        return ServerState(round=0, adapters=adapters, extras=extras, key=seed)

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        return client_tasks(state, {client_id: {} for client_id in cohort}, local)

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        return averaged(state, tasks, updates, server_optimizer, server_lr)

    return Strategy(init, assign, aggregate)
