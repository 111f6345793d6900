"""Every client trains an adapter of its own, of the rank it can carry; nothing is averaged.

What is evaluated is the mean score of the models of the clients that have taken part. Each begins
with the first Sᵢ ranks of the initial adapter, keeps what it has trained, and has a new optimizer
in each round, like the clients of the other strategies.

Bytes: none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fslora.aggregation import ServerOptimizer, require_plain_average, trained_factors
from fslora.assignment import check_ratios, client_tasks, first_ranks_each, first_state
from fslora.lowrank import padded
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


def local_only(
    ratios: Mapping[str, float],
    local: LocalRule,
    *,
    server_optimizer: ServerOptimizer = "fedavg",
    server_lr: float = 1.0,
) -> Strategy:
    """Build the strategy; the arguments are those of ``fslora``.

    Raises:
        ValueError: a ratio is not in (0, 1], or a server optimizer is asked for.
    """
    check_ratios(ratios)
    require_plain_average("local-only", "has no server step", server_optimizer, server_lr)

    def assign(state: ServerState, cohort: Sequence[str]) -> list[ClientTask]:
        drawn = first_ranks_each(state.adapters, ratios, cohort)
        tasks = [replace(task, private=True) for task in client_tasks(state, drawn, local)]
        for place, client_id in enumerate(cohort):
            if client_id in state.client_state:
                adapters, extras = _own(state, client_id)
                tasks[place] = replace(tasks[place], adapters=adapters, extras=extras)
        return tasks

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        of, models = {task.client_id: task for task in tasks}, dict(state.client_state)
        for update in updates:
            task = of[update.client_id]
            tensors: dict[str, Tensor] = {}
            for name, (lora_a, lora_b) in trained_factors(task, update).items():
                tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = lora_a, lora_b
            heads = {name: old + update.extras[name] for name, old in task.extras.items()}
            models[task.client_id] = {**tensors, **heads}
        return replace(state, round=state.round + 1, client_state=models)

    def evaluated(state: ServerState) -> list[ServerState]:
        models = []
        for client_id in sorted(state.client_state):
            adapters, extras = _own(state, client_id)
            whole = {n: padded(pair, state.adapters[n].rank) for n, pair in adapters.items()}
            models.append(replace(state, adapters=whole, extras=extras))
        return models or [state]

    return Strategy(first_state, assign, aggregate, evaluated)


def _own(state: ServerState, client_id: str) -> tuple[Adapters, Extras]:
    """Return the adapter, compact, and the heads that a client has trained."""
    memory = state.client_state[client_id]
    adapters = {
        n: LoRAWeights(memory[f"{n}.lora_a"], memory[f"{n}.lora_b"]) for n in state.adapters
    }
    return adapters, {name: memory[name] for name in state.extras}
