"""Federated Sketching LoRA as its paper states it.

Round t: the server draws for each client i of the cohort and each module an index set Iᵢ of Sᵢ of
the R ranks, uniformly; A and B of a module share it, and it stays for all H local steps. Client i
receives only A[Iᵢ] and B[:, Iᵢ], trains them with forward W₀ + (α/R)(R/Sᵢ) B[:, Iᵢ] A[Iᵢ], and
returns their change Δᵢ. The server scatters and averages over participants,

    X ← X + (1/N) Σᵢ Δᵢ,    X = (B, A),

not over those who trained a rank. Sᵢ = R for all is FedAvg-LoRA.

Bytes of one client and round, each way: Σ over modules of Sᵢ (D + E) · itemsize, plus heads whole.

Source: arXiv 2501.19389, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fslora.aggregation import ServerOptimizer, averaged
from fslora.assignment import client_key, client_task, common_rank
from fslora.protocol import (
    Adapters,
    ClientTask,
    ClientUpdate,
    Extras,
    LocalRule,
    ServerState,
    Strategy,
)
from fslora.sketch import draw_sketches
from fslora_kernels.sampling import sketch_size


def fslora(
    ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy.

    Args:
        ratios: client id to its sketch ratio S/R in (0, 1].
        local: how clients train.
        server_optimizer: "fedavg" (the paper's averaging at ``server_lr`` 1) or "fedadam".
        server_lr: the server's learning rate.

    Returns:
        ``init``, ``assign`` and ``aggregate``.

    Raises:
        ValueError: a ratio is not in (0, 1].
    """
    for ratio in ratios.values():
        sketch_size(1, ratio)

    def init(adapters: Adapters, extras: Extras, seed: int) -> ServerState:
        return ServerState(round=0, adapters=adapters, extras=extras, key=seed)

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        rank = common_rank(state.adapters)
        tasks = []
        for client_id in cohort:
            size = sketch_size(rank, ratios[client_id])
            key = client_key(state, client_id)
            sketches = draw_sketches(key, list(state.adapters), rank, size)
            task = client_task(state, client_id, sketches, local)
            tasks.append(replace(task, scale=rank / size))
        return tasks

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        return averaged(state, tasks, updates, server_optimizer, server_lr)

    return Strategy(init, assign, aggregate)
