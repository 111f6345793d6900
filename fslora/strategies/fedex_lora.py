"""FedEx-LoRA: FedIT, and what its averaging of factors misses is added to the base weights.

    A ← (1/N) Σᵢ Aᵢ,    B ← (1/N) Σᵢ Bᵢ,    W₀ ← W₀ + s [(1/N) Σᵢ BᵢAᵢ − B A]

so that the effective weight is the exact mean of the clients'. Every client trains all R ranks.
The residual is the stack of the Bᵢ, Aᵢ and the averaged pair, or the matrix where that is smaller.

Bytes of one client and round: up Σ over modules of R (D + E) · itemsize; down that plus Σ over
modules of min(K (D + E), D E) · itemsize, K = Σ (N + 1) R over the rounds since it last took part
(all rounds where it never did). Heads whole, each way.

Source: arXiv 2410.09432, without its optional truncation; here clients weigh alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fslora.aggregation import (
    ServerOptimizer,
    averaged,
    mean_products,
    require_plain_average,
)
from fslora.assignment import client_tasks, common_rank, first_ranks, first_state
from fslora.lowrank import stack
from fslora.protocol import (
    ClientTask,
    ClientUpdate,
    LocalRule,
    ServerState,
    Strategy,
)
from fslora.residual import grown, held_bytes


def fedex_lora(
    _ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy; the arguments are those of ``fslora``, and no ratio matters.

    Raises:
        ValueError: the server does not average plainly.
    """
    require_plain_average(
        "fedex-lora", "makes the mean of the products exact", server_optimizer, server_lr
    )

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        rank = common_rank(state.adapters)
        sketches = first_ranks(list(state.adapters), rank, rank)
        residual = state.base_residual
        return [
            replace(
                task,
                residual=residual,
                held_bytes=held_bytes(state, task.client_id),
            )
            for task in client_tasks(state, dict.fromkeys(cohort, sketches), local)
        ]

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        accepted = list(updates)
        new = averaged(state, tasks, accepted, server_optimizer, server_lr)
        if not accepted:
            return new
        missed = {
            name: stack([product, new.adapters[name]], [1.0, -1.0])
            for name, product in mean_products(tasks, accepted).items()
        }
        return grown(new, tasks, missed)

    return Strategy(first_state, assign, aggregate)
