"""One client that has all the data, at full rank: what federation costs is what it falls short.

In each round it takes H optimizer steps for every client that a federated round would wait for, so
that the same number of examples is seen; like a client it begins each round with a new optimizer.

Bytes: none; the data would have to travel, which is what federated learning is there to avoid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fslora.aggregation import ServerOptimizer, averaged
from fslora.assignment import client_tasks, common_rank, first_ranks, first_state
from fslora.protocol import (
    POOLED,
    ClientTask,
    ClientUpdate,
    LocalRule,
    ServerState,
    Strategy,
)


def centralised(
    _ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
    per_round: int | None = None,
) -> Strategy:
    """Build the strategy; the arguments are those of ``fslora``, and no ratio matters.

    Args:
        local: how a client would train.
        server_optimizer: as ``fslora``.
        server_lr: as ``fslora``.
        per_round: how many clients' answers a round would take at most; default all.
    """

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        if not cohort:
            return []
        rank = common_rank(state.adapters)
        clients = min(len(cohort), per_round or len(cohort))
        rule = replace(local, steps=local.steps * clients)
        sketches = first_ranks(list(state.adapters), rank, rank)
        (task,) = client_tasks(state, {POOLED: sketches}, rule)
        return [replace(task, private=True)]

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        return averaged(state, tasks, updates, server_optimizer, server_lr)

    return Strategy(first_state, assign, aggregate)
