"""RoLoRA: all clients train B in odd rounds and A in even ones, the other factor stays.

    round 2t - 1:  B ← (1/N) Σᵢ Bᵢ    with A common to all,
    round 2t:      A ← (1/N) Σᵢ Aᵢ    with B common to all,

so that each round's mean of the products is exact. B is first, because it begins at zero and A
would have no gradient.

Bytes of one client and round: up Σ over modules of R E (odd rounds) or R D (even) · itemsize; down
the factor that the round before changed, if the client took part in it, else both, but A only once
it is no longer what the seed gives (from round 3 on). Heads whole, each way.

Source: arXiv 2502.01755; here clients weigh alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from fslora.aggregation import ServerOptimizer, averaged, require_plain_average
from fslora.assignment import client_tasks, common_rank, first_ranks, first_state
from fslora.protocol import (
    ClientTask,
    ClientUpdate,
    LocalRule,
    ServerState,
    Strategy,
)


def rolora(
    _ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy; the arguments are those of ``fslora``, and no ratio matters.

    Raises:
        ValueError: the server optimizer has a momentum, which would move the factor that stays.
    """
    require_plain_average(
        "rolora", "keeps one factor in each round, which momentum would move", server_optimizer
    )
    rules = replace(local, trainable="a"), replace(local, trainable="b")

    def held(state: ServerState, client_id: str, number: int) -> int:
        """Bytes of the factors that the client has in their latest form."""
        last = int(state.client_state.get(client_id, {}).get("round", torch.tensor(0)))
        seeded = number <= 2  # A is trained in round 2 for the first time
        if not seeded and last != number - 1:
            return 0
        pairs = state.adapters.values()
        return sum(
            (pair.lora_a if seeded or number % 2 == 0 else pair.lora_b).nbytes for pair in pairs
        )

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        number, rank = state.round + 1, common_rank(state.adapters)
        sketches = first_ranks(list(state.adapters), rank, rank)
        return [
            replace(task, held_bytes=held(state, task.client_id, number))
            for task in client_tasks(state, dict.fromkeys(cohort, sketches), rules[number % 2])
        ]

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        new = averaged(state, tasks, updates, server_optimizer, server_lr)
        seen = {task.client_id: {"round": torch.tensor(task.round)} for task in tasks}
        return replace(new, client_state={**state.client_state, **seen})

    return Strategy(first_state, assign, aggregate)
