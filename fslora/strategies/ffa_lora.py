"""FFA-LoRA: A keeps its random first values for ever, clients train B alone.

    B ← (1/N) Σᵢ Bᵢ,    so that    mean(Bᵢ A) = mean(Bᵢ) A exactly.

Every client trains all R ranks; A follows from the seed and never travels.

Bytes of one client and round, each way: Σ over modules of R E · itemsize, plus heads whole.

Source: arXiv 2403.12313; here clients weigh alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fslora.aggregation import ServerOptimizer, averaged
from fslora.assignment import client_tasks, common_rank, first_ranks, first_state
from fslora.protocol import (
    ClientTask,
    ClientUpdate,
    LocalRule,
    ServerState,
    Strategy,
)


def ffa_lora(
    _ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy; the arguments are those of ``fslora``, and no ratio matters.

    Raises:
        ValueError: the server optimizer decays weights, A's too.
    """
    if server_optimizer == "fedadamw":
        raise ValueError(
            "ffa-lora keeps A, which the weight decay of fedadamw would shrink; use "
            "--server-opt fedadam"
        )
    local = replace(local, trainable="b")

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        rank = common_rank(state.adapters)
        sketches = first_ranks(list(state.adapters), rank, rank)
        seeded = sum(pair.lora_a.nbytes for pair in state.adapters.values())
        return [
            replace(task, held_bytes=seeded)
            for task in client_tasks(state, dict.fromkeys(cohort, sketches), local)
        ]

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        return averaged(state, tasks, updates, server_optimizer, server_lr)

    return Strategy(first_state, assign, aggregate)
