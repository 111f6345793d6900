"""Federated Sketching LoRA as its paper states it.

Round t: the server draws for each client i of the cohort and each module an index set Iᵢ of Sᵢ of
the R ranks, uniformly; A and B of a module share it, and it stays for all H local steps. Client i
receives only A[Iᵢ] and B[:, Iᵢ], trains them with forward W₀ + (α/R)(R/Sᵢ) B[:, Iᵢ] A[Iᵢ], and
returns their change Δᵢ. The server scatters and averages over participants,

    X ← X + (1/N) Σᵢ Δᵢ,    X = (B, A),

not over those who trained a rank. Sᵢ = R for all is FedAvg-LoRA.

Bytes of one client and round, each way: Σ over modules of Sᵢ (D + E) · itemsize, plus heads whole.

Options. ``forward="full"``: the client computes with the whole adapter, W₀ + (α/R) BA, of which
only its sketch trains; it downloads Σ over modules of R (D + E) · itemsize and computes with all R
ranks. ``averaging`` by the count of those who trained a rank or by the inverse probability of its
being drawn, and the ``sampler``: ``options.expected_step`` says how long a step each makes on
average, ``sketch.cohort_sketches`` how sets are drawn.

Source: arXiv 2501.19389, Algorithm 1; the options are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fslora.aggregation import ServerOptimizer, averaged
from fslora.assignment import (
    check_ratios,
    client_task,
    common_rank,
    first_state,
    gather_each,
    gather_rest,
)
from fslora.options import Averaging, Forward, Sampler, check_options, expected_step
from fslora.protocol import (
    ClientTask,
    ClientUpdate,
    LocalRule,
    ServerState,
    Strategy,
)
from fslora.sketch import cohort_sketches
from fslora_kernels.sampling import sketch_size


def fslora(
    ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
    forward: Forward = "sketched",
    averaging: Averaging = "participants",
    sampler: Sampler = "uniform",
    per_round: int | None = None,
) -> Strategy:
    """Build the strategy; the options' defaults are the paper's.

    Args:
        ratios: client id to its sketch ratio S/R in (0, 1].
        local: how clients train.
        server_optimizer: as ``aggregation.server_step``; the paper's is "fedavg".
        server_lr: the server's learning rate; the paper's is 1.
        forward: "sketched", or "full".
        averaging: "participants", "count" or "inverse".
        sampler: as ``sketch.cohort_sketches``.
        per_round: clients a round, for the factor of a warning; default all.

    Returns:
        ``init``, ``assign`` and ``aggregate``.

    Raises:
        ValueError: a ratio is not in (0, 1], or the options do not go together.

    Warns:
        UserWarning: the sketched forward is averaged by count, a longer step than the gradient's.
    """
    check_ratios(ratios)
    check_options(forward, averaging, sampler)
    if forward == "sketched" and averaging == "count":
        cohort = len(ratios) if per_round is None else per_round
        of_all = [ratios[client_id] for client_id in sorted(ratios)]
        factor = expected_step(of_all, cohort, forward, averaging, sampler)
        warnings.warn(
            f"--forward sketched with --averaging count moves a rank {factor:.3g} times as far as "
            "the full gradient would (expected, linear loss, SGD clients); lower --server-lr, or "
            "use --forward full",
            stacklevel=2,
        )

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        rank = common_rank(state.adapters)
        sizes = {client_id: sketch_size(rank, ratios[client_id]) for client_id in cohort}
        drawn = cohort_sketches(state.key, state.round + 1, sizes, state.adapters, sampler)
        gathered, tasks = gather_each(state.adapters, drawn), []
        for client_id, size in sizes.items():
            task = client_task(state, client_id, drawn[client_id], local, gathered[client_id])
            if forward == "full":
                rest = gather_rest(state.adapters, drawn[client_id])
                tasks.append(replace(task, frozen=rest))
            else:
                tasks.append(replace(task, scale=rank / size))
        return tasks

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        return averaged(state, tasks, updates, server_optimizer, server_lr, averaging)

    return Strategy(first_state, assign, aggregate)
