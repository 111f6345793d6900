"""FlexLoRA: the server averages the products and deals each client their largest singular parts.

    M = (1/N) Σᵢ BᵢAᵢ = U Σ Vᵀ,    client i receives  B = U[:, :Sᵢ] Σ[:Sᵢ, :Sᵢ],  A = Vᵀ[:Sᵢ].

The SVD is computed from QR factors of the stacked Bᵢ and Aᵢ, never from the dense matrix. Of M the
server keeps R ranks, more than any client gets; that is also what is evaluated. The scale is α/R
on every client and on the server, whatever Sᵢ is. Before the first round there is nothing to
decompose and clients get the first Sᵢ ranks; ranks that M does not have keep their A, with B = 0.

Bytes of one client and round, each way: Σ over modules of Sᵢ (D + E) · itemsize, plus heads whole.

Source: arXiv 2402.11505; here clients weigh alike, there by their number of examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fslora.aggregation import ServerOptimizer, mean_heads, mean_products, require_plain_average
from fslora.assignment import check_ratios, client_tasks, first_ranks_each, first_state
from fslora.lowrank import truncated
from fslora.protocol import (
    ClientTask,
    ClientUpdate,
    LocalRule,
    LoRAWeights,
    ServerState,
    Strategy,
)


def flexlora(
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
        "flexlora", "replaces the factors in each round", server_optimizer, server_lr
    )

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        drawn = first_ranks_each(state.adapters, ratios, cohort)
        return client_tasks(state, drawn, local)

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        accepted = list(updates)
        new = replace(state, round=state.round + 1)
        if not accepted:
            return new
        products = mean_products(tasks, accepted)
        adapters = {name: _decomposed(products[name], pair) for name, pair in new.adapters.items()}
        return replace(new, adapters=adapters, extras=mean_heads(state.extras, accepted))

    return Strategy(first_state, assign, aggregate)


def _decomposed(product: LoRAWeights, before: LoRAWeights) -> LoRAWeights:
    """Return the R largest singular parts; missing ranks have their A of before, and B = 0."""
    best = truncated(product, before.rank)
    lora_a, lora_b = before.lora_a.clone(), before.lora_b.new_zeros(before.lora_b.shape)
    lora_a[: best.rank], lora_b[: best.rank] = best
    return LoRAWeights(lora_a, lora_b)
