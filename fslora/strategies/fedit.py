"""FedIT: federated averaging of A and B, every client at the same rank.

    A ← (1/N) Σᵢ Aᵢ,    B ← (1/N) Σᵢ Bᵢ

so the server's product is mean(B) mean(A), which is not mean(BA). Unequal ranks are not possible:
``fedit`` gives every client all R ranks, ``fedit-max`` those that the strongest device carries and
``fedit-min`` those that the weakest one does, the bounds between which heterogeneous methods lie.
The clients' rank S is the first S of the R global ranks, the others are zero, and the scale is
α/R whatever S is.

Bytes of one client and round, each way: Σ over modules of S (D + E) · itemsize, plus heads whole.

Source: arXiv 2305.05644; here clients weigh alike, there by their number of examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fslora.aggregation import ServerOptimizer, averaged
from fslora.assignment import client_tasks, common_rank, first_ranks, without_tail
from fslora.protocol import (
    Adapters,
    ClientTask,
    ClientUpdate,
    Extras,
    LocalRule,
    ServerState,
    Strategy,
)
from fslora_kernels.sampling import sketch_size


def fedit(
    _ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy in which every client trains all R ranks."""
    return _at(1.0, local, server_optimizer, server_lr)


def fedit_min(
    ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy in which every client trains as few ranks as the weakest one."""
    return _at(min(ratios.values()), local, server_optimizer, server_lr)


def fedit_max(
    ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy in which every client trains as many ranks as the strongest one."""
    return _at(max(ratios.values()), local, server_optimizer, server_lr)


def _at(ratio: float, local: LocalRule, optimizer: ServerOptimizer, lr: float) -> Strategy:
    def init(adapters: Adapters, extras: Extras, seed: int) -> ServerState:
        size = sketch_size(common_rank(adapters), ratio)
        return ServerState(0, without_tail(adapters, size), extras, seed)

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        rank = common_rank(state.adapters)
        sketches = first_ranks(list(state.adapters), rank, sketch_size(rank, ratio))
        return client_tasks(state, dict.fromkeys(cohort, sketches), local)

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        return averaged(state, tasks, updates, optimizer, lr)

    return Strategy(init, assign, aggregate)
