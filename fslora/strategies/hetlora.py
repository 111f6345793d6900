"""HetLoRA: each client trains the first Sᵢ ranks; the server pads with zeros and weighs by size.

    A ← Σᵢ wᵢ [Aᵢ; 0],    B ← Σᵢ wᵢ [Bᵢ 0],    wᵢ = ‖BᵢAᵢ‖ / Σⱼ ‖BⱼAⱼ‖  (Frobenius, each module)

Self-pruning: a client's loss has the penalty λ Σ over modules ‖Bᵢ[:, j:]‖ ‖Aᵢ[j:]‖ with j = ⌊γSᵢ⌋,
and where that sum is less after its training than before, its rank is j from then on, its update
of this round included. The scale is α/R on every client and on the server, whatever Sᵢ is.

Bytes of one client and round, each way: Σ over modules of Sᵢ (D + E) · itemsize, plus heads whole.

Source: arXiv 2401.06432. There the client decides to prune and sends j ranks at once; here the
server decides by the same numbers, so that the round itself costs Sᵢ ranks. One rank is pruned for
all modules of a client together, by the sum over them.
Heads, which the paper has not, are averaged with equal weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from fslora.aggregation import ServerOptimizer, mean_heads, stepped, trained_factors
from fslora.assignment import check_ratios, client_tasks, common_rank, first_ranks, first_state
from fslora.lowrank import norm, padded, tail_norm
from fslora.protocol import (
    ClientTask,
    ClientUpdate,
    LocalRule,
    LoRAWeights,
    ServerState,
    Strategy,
)
from fslora_kernels.sampling import sketch_size


def hetlora(
    ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
    penalty: float = 5e-3,
    decay: float = 0.99,
) -> Strategy:
    """Build the strategy.

    Args:
        ratios: client id to Sᵢ/R in (0, 1], before any pruning.
        local: how clients train.
        server_optimizer: as ``aggregation.server_step``.
        server_lr: the server's learning rate.
        penalty: λ; 0 never prunes.
        decay: γ in (0, 1), the share of its ranks that a pruned client keeps, at least one.

    Raises:
        ValueError: a ratio is not in (0, 1], or γ not in (0, 1).
    """
    check_ratios(ratios)
    if not 0 < decay < 1:
        raise ValueError(f"decay must be in (0, 1), got {decay}; 0.99 is usual")

    def rule(size: int) -> LocalRule:
        keep = max(1, int(decay * size))
        return replace(local, penalty=penalty if keep < size else 0.0, penalty_from=keep)

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        rank, modules = common_rank(state.adapters), list(state.adapters)
        sizes = {}
        for client_id in cohort:
            pruned = state.client_state.get(client_id, {}).get("rank")
            ratio = ratios[client_id]
            sizes[client_id] = sketch_size(rank, ratio) if pruned is None else int(pruned)
        drawn = {client_id: first_ranks(modules, rank, size) for client_id, size in sizes.items()}
        tasks = client_tasks(state, drawn, local)
        return [replace(task, local=rule(sizes[task.client_id])) for task in tasks]

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        of, accepted = {task.client_id: task for task in tasks}, list(updates)
        if not accepted:
            return replace(state, round=state.round + 1)
        remembered, factors = dict(state.client_state), []
        for update in accepted:
            task = of[update.client_id]
            trained, first = trained_factors(task, update), task.local.penalty_from
            if task.local.penalty and tail_norm(trained, first) < tail_norm(task.adapters, first):
                trained = {n: LoRAWeights(*(t[:first] for t in p)) for n, p in trained.items()}
                remembered[task.client_id] = {"rank": torch.tensor(first)}
            factors.append(trained)
        change = {
            name: _weighted_change(pair, [own[name] for own in factors])
            for name, pair in state.adapters.items()
        }
        new_heads = mean_heads(state.extras, accepted)
        heads = {name: new_heads[name] - old for name, old in state.extras.items()}
        new = stepped(state, (change, heads), server_optimizer, server_lr)
        return replace(new, client_state=remembered)

    return Strategy(first_state, assign, aggregate)


def weights(pairs: Sequence[LoRAWeights]) -> list[float]:
    """Return ‖BᵢAᵢ‖ / Σⱼ ‖BⱼAⱼ‖; equal weights where all products are zero."""
    norms = [norm(pair) for pair in pairs]
    total = sum(norms)
    return [size / total if total else 1 / len(norms) for size in norms]


def _weighted_change(pair: LoRAWeights, clients: Sequence[LoRAWeights]) -> LoRAWeights:
    """Return the weighted mean of the padded factors minus the global ones."""
    mean = [torch.zeros_like(factor) for factor in pair]
    for weight, own in zip(weights(clients), clients, strict=True):
        for total, factor in zip(mean, padded(own, pair.rank), strict=True):
            total.add_(factor, alpha=weight)
    return LoRAWeights(*(new - old for new, old in zip(mean, pair, strict=True)))
