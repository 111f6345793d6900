"""Fed-PLoRA: each client trains some of the R rank-one terms; the others stay in its forward.

    BA = Σⱼ bⱼ aⱼᵀ;    client i draws Iᵢ, Sᵢ of the R terms, and trains them in
    W₀ + s Σ over j ∉ Iᵢ of bⱼ aⱼᵀ (frozen) + s Σ over j ∈ Iᵢ of bⱼ aⱼᵀ;
    (aⱼ, bⱼ) ← mean of it over the clients with j ∈ Iᵢ.

The frozen terms are computed with beside the trained ones. The paper folds them into the base
weight, the same function but lossy where the base is of low precision. Each module has its own Iᵢ.

Bytes of one client and round: down Σ over modules of R (D + E) · itemsize, up Σ over modules of
Sᵢ (D + E) · itemsize, plus heads whole each way.

Source: arXiv 2602.16936, "Select-N-Fold"; heads are averaged over participants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fslora.aggregation import ServerOptimizer, averaged
from fslora.assignment import (
    check_ratios,
    client_key,
    client_tasks,
    common_rank,
    first_state,
    gather_rest,
)
from fslora.protocol import (
    ClientTask,
    ClientUpdate,
    LocalRule,
    ServerState,
    Strategy,
)
from fslora.sketch import draw_sketches
from fslora_kernels.sampling import sketch_size


def fed_plora(
    ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy; the arguments are those of ``fslora``.

    Raises:
        ValueError: a ratio is not in (0, 1].
    """
    check_ratios(ratios)

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        rank = common_rank(state.adapters)
        drawn = {}
        for client_id in cohort:
            key, size = client_key(state, client_id), sketch_size(rank, ratios[client_id])
            drawn[client_id] = draw_sketches(key, list(state.adapters), rank, size)
        return [
            replace(task, frozen=gather_rest(state.adapters, task.sketches))
            for task in client_tasks(state, drawn, local)
        ]

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        return averaged(state, tasks, updates, server_optimizer, server_lr, "count")

    return Strategy(first_state, assign, aggregate)
