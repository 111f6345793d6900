"""FLoRA (FedStackLoRA): the clients' factors are stacked, which averages the products exactly.

    W₀ ← W₀ + (1/N) Σᵢ s BᵢAᵢ = W₀ + s [B₁/N … Bₙ/N] [A₁; …; Aₙ]

The sum goes into the base weights and every client starts each round from a fresh adapter of its
own rank: random Aᵢ, Bᵢ = 0. The scale s is α/R on every client and in the base, whatever Sᵢ is,
so the stack needs no scale of its own.

Bytes of one client and round: up Σ over modules of Sᵢ (D + E) · itemsize; down Σ over modules of
min(K (D + E), D E) · itemsize, K = Σⱼ Sⱼ over the clients of every round since it last took part
(of all rounds where it never did). A fresh adapter follows from the seed and does not travel. Heads
whole, each way.

Source: arXiv 2409.05976; here clients weigh alike, there by their number of examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fslora.aggregation import ServerOptimizer, mean_heads, mean_products, require_plain_average
from fslora.assignment import check_ratios, client_key, client_tasks, first_ranks_each
from fslora.protocol import (
    Adapters,
    ClientTask,
    ClientUpdate,
    Extras,
    LocalRule,
    LoRAWeights,
    ServerState,
    Strategy,
)
from fslora.residual import grown, held_bytes
from fslora_kernels.seeds import fold_in


def flora(
    ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy; the arguments are those of ``fslora``.

    Raises:
        ValueError: a ratio is not in (0, 1], or the server does not average plainly.
    """
    check_ratios(ratios)
    require_plain_average(
        "flora", "adds the clients' products to the base as they are", server_optimizer, server_lr
    )

    def init(adapters: Adapters, extras: Extras, seed: int) -> ServerState:
        state = ServerState(round=0, adapters=_zero_b(adapters), extras=extras, key=seed)
        given = {name: pair for name, pair in adapters.items() if pair.lora_b.any()}
        return grown(state, [], given)

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        drawn = first_ranks_each(state.adapters, ratios, cohort)
        return [_begun_anew(state, task) for task in client_tasks(state, drawn, local)]

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        accepted = list(updates)
        new = replace(state, round=state.round + 1)
        if not accepted:
            return new
        new = replace(new, extras=mean_heads(state.extras, accepted))
        return grown(new, tasks, mean_products(tasks, accepted))

    return Strategy(init, assign, aggregate)


def _begun_anew(state: ServerState, task: ClientTask) -> ClientTask:
    """Give a client another A, which follows from its key, and what the base has gained."""
    key = client_key(state, task.client_id)
    fresh = {
        name: pair._replace(lora_a=_fresh(pair.lora_a, fold_in(key, "fresh", name)))
        for name, pair in task.adapters.items()
    }
    known = held_bytes(state, task.client_id)
    seeded = sum(pair.size_bytes for pair in fresh.values())
    return replace(task, adapters=fresh, residual=state.base_residual, held_bytes=known + seeded)


def _zero_b(adapters: Adapters) -> Adapters:
    return {n: LoRAWeights(p.lora_a, torch.zeros_like(p.lora_b)) for n, p in adapters.items()}


def _fresh(like_SD: Tensor, key: int) -> Tensor:
    """Draw A as PEFT does: uniform in ±1/√D."""
    bound = like_SD.shape[1] ** -0.5
    generator = torch.Generator().manual_seed(key)
    return torch.empty_like(like_SD).uniform_(-bound, bound, generator=generator)
