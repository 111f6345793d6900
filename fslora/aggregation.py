"""Folding updates into a sum as they come, and the server's optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fslora.protocol import (
    Adapters,
    ClientTask,
    ClientUpdate,
    Extras,
    LoRAWeights,
    ServerState,
    Sketch,
)

ServerOptimizer = Literal["fedavg", "fedadam"]
Tensors = dict[str, Tensor]


def gather(adapters: Adapters, sketches: Mapping[str, Sketch]) -> Adapters:
    """Copy out the ranks that each module's sketch selects: ``[S, D]`` and ``[S, E]``."""
    compact: Adapters = {}
    for name, pair in adapters.items():
        index = sketches[name].index
        if index is None:
            compact[name] = LoRAWeights(pair.lora_a.clone(), pair.lora_b.clone())
        else:
            compact[name] = LoRAWeights(pair.lora_a[index], pair.lora_b[index])
    return compact


def in_task_order(
    tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
) -> Iterator[tuple[ClientTask, ClientUpdate]]:
    """Pair updates with their tasks in task order; early ones wait.

    Floating-point sums depend on the order of their terms, so this is what makes a run's bits
    independent of who answers first. A client that never answers is skipped at the end; of two
    answers the first counts; an answer to no task is dropped.
    """
    position = {task.client_id: number for number, task in enumerate(tasks)}
    waiting: dict[int, ClientUpdate] = {}
    following = 0
    for update in updates:
        number = position.get(update.client_id)
        if number is None or number < following:
            continue
        waiting.setdefault(number, update)
        while following in waiting:
            yield tasks[following], waiting.pop(following)
            following += 1
    for number in sorted(waiting):
        yield tasks[number], waiting[number]


def mean_update(
    adapters: Adapters,
    extras: Extras,
    tasks: Sequence[ClientTask],
    updates: Iterable[ClientUpdate],
) -> tuple[Adapters, Extras]:
    """Scatter each compact change into its ranks, sum, and divide by the number of participants.

    Args:
        adapters: the global factors, for their shapes.
        extras: the heads, for their shapes.
        tasks: the round's tasks; their sketches say where each row belongs.
        updates: accepted updates in task order, folded one at a time.

    Returns:
        The mean change of the factors (zero in ranks that nobody trained) and of the heads.

    Source: arXiv 2501.19389, the server update X ← X + (1/N) Σᵢ Δᵢ.
    """
    sketches = {task.client_id: task.sketches for task in tasks}
    total = {n: LoRAWeights(*(torch.zeros_like(t) for t in p)) for n, p in adapters.items()}
    heads = {name: torch.zeros_like(tensor) for name, tensor in extras.items()}
    participants = 0
    for update in updates:
        participants += 1
        for name, delta in update.delta.items():
            index = sketches[update.client_id][name].index
            for rows, change in zip(total[name], delta, strict=True):
                if index is None:
                    rows.add_(change)
                else:
                    rows.index_add_(0, index, change)
        for name, change in update.extras.items():
            heads[name].add_(change)
    for tensor in [*(t for pair in total.values() for t in pair), *heads.values()]:
        tensor.div_(max(participants, 1))
    return total, heads


def server_step(
    optimizer: ServerOptimizer,
    lr: float,
    adapters: Adapters,
    extras: Extras,
    change: tuple[Adapters, Extras],
    memory: Tensors,
) -> tuple[Adapters, Extras, Tensors]:
    """Apply the mean change: FedAvg adds lr times it, FedAdam uses it as Adam's negative gradient.

    Args:
        optimizer: "fedavg" or "fedadam".
        lr: the server's learning rate; 1 with "fedavg" is plain averaging.
        adapters: global factors.
        extras: heads.
        change: mean change of both.
        memory: Adam's moments and step counts from the round before; empty at first.

    Returns:
        New factors, heads and memory; the arguments are not changed.

    Source: arXiv 2003.00295 (FedOpt), with torch's Adam: bias-corrected, eps 1e-8.
    """
    parameters = {name: t.clone() for name, t in _flat(adapters, extras).items()}
    for name, tensor in _flat(*change).items():
        parameters[name].grad = -tensor
    if optimizer == "fedavg":
        torch.optim.SGD(parameters.values(), lr=lr).step()
        new_memory: Tensors = {}
    else:
        adam = torch.optim.Adam(parameters.values(), lr=lr)
        for entry, tensor in memory.items():
            name, slot = entry.rsplit("/", 1)
            adam.state[parameters[name]][slot] = tensor.clone()
        adam.step()
        new_memory = {
            f"{name}/{slot}": value
            for name, parameter in parameters.items()
            for slot, value in adam.state[parameter].items()
        }
    new_adapters = {
        name: LoRAWeights(parameters[f"{name}.lora_a"].detach(), parameters[f"{name}.lora_b"])
        for name in adapters
    }
    for parameter in parameters.values():
        parameter.grad = None
    return new_adapters, {name: parameters[name] for name in extras}, new_memory


def averaged(
    state: ServerState,
    tasks: Sequence[ClientTask],
    updates: Iterable[ClientUpdate],
    optimizer: ServerOptimizer,
    lr: float,
) -> ServerState:
    """Return the state after one server step on the mean of the updates."""
    adapters, extras = mean_update(state.adapters, state.extras, tasks, updates)
    adapters, extras, memory = server_step(
        optimizer, lr, state.adapters, state.extras, (adapters, extras), state.optimizer
    )
    return replace(state, round=state.round + 1, adapters=adapters, extras=extras, optimizer=memory)


def _flat(adapters: Adapters, extras: Extras) -> Tensors:
    named = {
        f"{name}.{factor}": tensor
        for name, pair in adapters.items()
        for factor, tensor in pair._asdict().items()
    }
    return {**named, **extras}
