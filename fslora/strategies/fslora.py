"""Federated Sketching LoRA as its paper states it.

Round t: the server draws for each client i of the cohort and each module an index set Iᵢ of Sᵢ of
the R ranks, uniformly; A and B of a module share it, and it stays for all H local steps. Client i
receives only A[Iᵢ] and B[:, Iᵢ], trains them with forward W₀ + (α/R)(R/Sᵢ) B[:, Iᵢ] A[Iᵢ], and
returns their change Δᵢ. The server scatters and averages over participants,

    X ← X + (1/N) Σᵢ Δᵢ,    X = (B, A),

not over those who trained a rank. Sᵢ = R for all is FedAvg-LoRA.

Bytes of one client and round, each way: Σ over modules of Sᵢ (D + E) · itemsize, plus heads whole.

Options; ``options.expected_step`` says how long a step they make on average.

``forward="full"``: the client computes with the whole adapter, W₀ + (α/R) BA, of which only its
sketch trains; it downloads Σ over modules of R (D + E) · itemsize and computes with all R ranks.

``averaging``: by the count of those who trained a rank, or by the inverse probability of its being
trained in a step.

``sampler``: as ``sketch.cohort_sketches``. With "importance" and the sketched forward the client
computes with Σ over j in Iᵢ of bⱼaⱼᵀ/πⱼ. As π follows from ranks that it does not have, 1/π is
sent: Σ over modules of Sᵢ · itemsize more down.

``redraw="step"``: a new Iᵢ for each of the H steps, drawn by client and server alike from the
task's key (``sketch.draw_steps``). Down and up go the ranks that any step trains, Σ over modules of
|Uᵢ| (D + E) · itemsize with Uᵢ = ∪ Iᵢ, E|Uᵢ| = R (1 - (1 - Sᵢ/R)ᴴ), and with the full forward all R
down; the client keeps moments of |Uᵢ| ranks, and each step computes with Sᵢ (R).

``depth``: a client trains its sketches in the upper layers only, as many as are drawn for it and
the round, and the lower ones stay in its forward pass whole. Layer l trains with probability πₗ
(``Depth.probabilities``), which averaging by inverse probability makes up for. Down Σ over all
modules of R (D + E) · itemsize, up Σ over the trained ones of Sᵢ (D + E) · itemsize. With "top:K"
the layers below the top K never have an adapter: nothing of theirs travels, and what they could
have learnt is lost.

Source: arXiv 2501.19389, Algorithm 1; the options are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fslora.aggregation import ServerOptimizer, averaged
from fslora.assignment import (
    check_ratios,
    client_tasks,
    common_rank,
    first_state,
    gather_rest,
    inverse_probabilities,
    task_key,
    upper_layers,
)
from fslora.depth import read_depth
from fslora.options import Averaging, Forward, Redraw, Sampler, check_options, expected_step
from fslora.protocol import (
    Adapters,
    ClientTask,
    ClientUpdate,
    Extras,
    LocalRule,
    ServerState,
    Sketch,
    Strategy,
)
from fslora.sketch import cohort_sketches, step_unions
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
    redraw: Redraw = "round",
    depth: str = "all",
    depth_min_probability: float = 0.1,
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
        redraw: a client's sketch is drawn for the "round", or for every "step".
        depth: "all" layers, or as ``depth.read_depth``.
        depth_min_probability: with which a layer is trained at least, where depth is drawn.
        per_round: clients a round, for the factor of a warning; default all.

    Returns:
        ``init``, ``assign`` and ``aggregate``.

    Raises:
        ValueError: a ratio is not in (0, 1], or the options do not go together.

    Warns:
        UserWarning: the sketched forward is averaged by count, a longer step than the gradient's;
            or some layers are never trained.
    """
    check_ratios(ratios)
    check_options(forward, averaging, sampler, redraw, depth, depth_min_probability)
    reach = read_depth(depth)
    if forward == "sketched" and averaging == "count":
        draws = local.steps if redraw == "step" else 1
        _warn_of_longer_steps(ratios, per_round or len(ratios), sampler, draws)
    if reach.kind == "top":
        warnings.warn(
            f"--depth {depth} is biased: it never trains the layers below; --depth uniform does",
            stacklevel=2,
        )

    def init(adapters: Adapters, extras: Extras, seed: int) -> ServerState:
        ever = reach.ever_trained(adapters)
        return first_state({name: adapters[name] for name in ever}, extras, seed)

    def draw(state: ServerState, sizes: Mapping[str, int]) -> dict[str, Mapping[str, Sketch]]:
        if redraw == "round":
            return cohort_sketches(state.key, state.round + 1, sizes, state.adapters, sampler)
        keys = {client_id: task_key(state, client_id) for client_id in sizes}
        return step_unions(keys, sizes, state.adapters, local.steps)

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        rank = common_rank(state.adapters)
        sizes = {client_id: sketch_size(rank, ratios[client_id]) for client_id in cohort}
        sketches, drawn, tasks = draw(state, sizes), {}, []
        for client_id in cohort:
            own, ratio = sketches[client_id], ratios[client_id]
            drawn[client_id] = upper_layers(
                own, state, client_id, reach, ratio, depth_min_probability
            )
        for task in client_tasks(state, drawn, local):
            size = sizes[task.client_id]
            rule = replace(local, redrawn_ranks=size) if redraw == "step" and size < rank else local
            if forward == "full":
                frozen = gather_rest(state.adapters, task.sketches)
                tasks.append(replace(task, local=rule, frozen=frozen))
            elif sampler == "importance" and size < rank:
                tasks.append(replace(task, local=rule, rank_scales=inverse_probabilities(task)))
            else:
                tasks.append(replace(task, local=rule, scale=rank / size))
        return tasks

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        return averaged(state, tasks, updates, server_optimizer, server_lr, averaging)

    return Strategy(init, assign, aggregate)


def _warn_of_longer_steps(
    ratios: Mapping[str, float], per_round: int, sampler: Sampler, draws: int
) -> None:
    of_all = [ratios[client_id] for client_id in sorted(ratios)]
    factor = expected_step(of_all, per_round, "sketched", "count", sampler, draws)
    warnings.warn(
        f"--forward sketched with --averaging count moves a rank {factor:.3g} times as far as "
        "the full gradient would (expected, linear loss, SGD clients); lower --server-lr, or "
        "use --forward full",
        stacklevel=3,
    )
