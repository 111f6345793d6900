"""Folding updates into a sum as they come, and the server's optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from fslora.lowrank import stack
from fslora.options import Averaging
from fslora.protocol import (
    Adapters,
    ClientTask,
    ClientUpdate,
    Extras,
    LoRAWeights,
    ServerState,
    ranks_of,
)
from fslora.stacks import Kind, Layout, Stacks, places_of, rows_of, stacked
from fslora.yogi import Yogi

ServerOptimizer = Literal["fedavg", "fedavgm", "fedadam", "fedadamw", "fedyogi"]
Tensors = dict[str, Tensor]


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
    divide_by: Averaging = "participants",
    cohort: int | None = None,
) -> tuple[Adapters, Extras]:
    """Scatter each compact change into its ranks, sum, and divide.

    Args:
        adapters: the global factors, for their shapes.
        extras: the heads, for their shapes.
        tasks: the round's tasks; their sketches say where each row belongs.
        updates: accepted updates in task order, folded one by one.
        divide_by: "participants"; "count": each rank by how many of them trained it; "inverse":
            by the participants, after each change was divided by the probability with which its
            rank trains in a step (S/R where all are alike). Heads, which all train, are divided
            by the participants.
        cohort: take this as the number of participants, however many there are.

    Returns:
        The mean change of the factors (zero in ranks that nobody trained) and of the heads.

    Source: arXiv 2501.19389, the server update X ← X + (1/N) Σᵢ Δᵢ; "count" is arXiv 2602.16936.
    """
    asked = {task.client_id: task for task in tasks}
    total = stacked({n: LoRAWeights(*map(torch.zeros_like, p)) for n, p in adapters.items()})
    heads = {name: torch.zeros_like(tensor) for name, tensor in extras.items()}
    counting, inverse = divide_by == "count", divide_by == "inverse"
    counts = [torch.zeros(len(rows), 1, dtype=rows.dtype) for rows in total.tensors]
    participants = 0
    for update in updates:
        participants += 1
        if update.delta:
            delta = stacked(update.delta, adapters)
            parts = _parts(asked[update.client_id], delta, total.layout, inverse=inverse)
            for kind, changes, places in parts:
                number = total.layout.kinds.index(kind)
                total.tensors[number].index_add_(0, places, changes)
                if counting:
                    most = len(counts[number])
                    counts[number] += torch.bincount(places, minlength=most)[:, None]
        for name, change in update.extras.items():
            heads[name].add_(change)
    participants = cohort or max(participants, 1)
    for rows, count in zip(total.tensors, counts, strict=True):
        rows.div_(count.clamp(min=1) if counting else participants)
    for tensor in heads.values():
        tensor.div_(participants)
    return dict(total), heads


def _parts(
    task: ClientTask, delta: Stacks, whole: Layout, *, inverse: bool
) -> Iterable[tuple[Kind, Tensor, Tensor]]:
    """Return of each kind the rows that a client changed, and where they are in the whole stack."""
    given, names = task.adapters, delta.layout.names
    if isinstance(given, Stacks) and given.places and given.layout == delta.layout:
        places = given.places
    else:
        ranks = ranks_of(task.sketches, names)[None]
        places = [found[0] for found in places_of(ranks, delta.layout, whole)]
    changes = delta.tensors
    if inverse:
        drawn = [task.sketches[name] for name in names]
        weights = rows_of(
            torch.cat([sketch.inverse_probability for sketch in drawn])[None], delta.layout
        )
        changes = [(t * w[0, :, None]).to(t.dtype) for t, w in zip(changes, weights, strict=True)]
    return zip(delta.layout.kinds, changes, places, strict=True)


def mean_heads(extras: Extras, updates: Sequence[ClientUpdate]) -> Extras:
    """Return the heads plus their mean change."""
    _, change = mean_update({}, extras, [], [replace(update, delta={}) for update in updates])
    return {name: tensor + change[name] for name, tensor in extras.items()}


def trained_factors(task: ClientTask, update: ClientUpdate) -> Adapters:
    """Return a client's factors after training, compact."""
    return {
        name: LoRAWeights(
            *(
                old + change if change.shape[0] else old
                for old, change in zip(pair, update.delta[name], strict=True)
            )
        )
        for name, pair in task.adapters.items()
    }


def mean_products(tasks: Sequence[ClientTask], updates: Sequence[ClientUpdate]) -> Adapters:
    """Return (1/N) Σᵢ sᵢ BᵢAᵢ of each module, exactly, as a pair of rank Σᵢ Sᵢ.

    Args:
        tasks: of the round; their scales sᵢ are relative to the global adapter's.
        updates: accepted updates, at least one.
    """
    of = {task.client_id: task for task in tasks}
    used = [of[update.client_id] for update in updates]
    factors = [trained_factors(*each) for each in zip(used, updates, strict=True)]
    weights = [task.scale / len(used) for task in used]
    return {name: stack([own[name] for own in factors], weights) for name in factors[0]}


def require_plain_average(
    strategy: str, why: str, optimizer: ServerOptimizer, lr: float | None = None
) -> None:
    """Refuse a server optimizer that a strategy cannot use.

    Raises:
        ValueError: not "fedavg", or not with the learning rate 1 where ``lr`` is given.
    """
    if optimizer != "fedavg" or lr not in (None, 1.0):
        remedy = "--server-opt fedavg" + ("" if lr is None else " --server-lr 1")
        raise ValueError(f"{strategy} {why}; use {remedy}")


def server_step(
    optimizer: ServerOptimizer,
    lr: float,
    adapters: Adapters,
    extras: Extras,
    change: tuple[Adapters, Extras],
    memory: Tensors,
) -> tuple[Adapters, Extras, Tensors]:
    """Use the mean change as an optimizer's negative gradient; FedAvg adds lr times it.

    Args:
        optimizer: "fedavg" (SGD), "fedavgm" (momentum 0.9), "fedadam", "fedadamw" (weight decay
            0.01) or "fedyogi".
        lr: the server's learning rate; 1 with "fedavg" is plain averaging.
        adapters: global factors.
        extras: heads.
        change: mean change of both.
        memory: the optimizer's tensors from the round before; empty at first.

    Returns:
        New factors, heads and memory; the arguments are not changed.

    Source: arXiv 2003.00295 (FedOpt), with torch's Adam: bias-corrected, eps 1e-8; arXiv
        1909.06335 (FedAvgM).
    """
    parameters = {name: t.clone() for name, t in _flat(adapters, extras).items()}
    for name, tensor in _flat(*change).items():
        parameters[name].grad = -tensor
    server = _server_optimizer(optimizer, list(parameters.values()), lr)
    for entry, tensor in memory.items():
        name, slot = entry.rsplit("/", 1)
        server.state[parameters[name]][slot] = tensor.clone()
    server.step()
    new_memory: Tensors = {
        f"{name}/{slot}": value
        for name, parameter in parameters.items()
        for slot, value in server.state[parameter].items()
    }
    new_adapters = {
        name: LoRAWeights(parameters[f"{name}.lora_a"].detach(), parameters[f"{name}.lora_b"])
        for name in adapters
    }
    for parameter in parameters.values():
        parameter.grad = None
    return new_adapters, {name: parameters[name] for name in extras}, new_memory


def _server_optimizer(
    optimizer: ServerOptimizer, parameters: list[Tensor], lr: float
) -> torch.optim.Optimizer:
    if optimizer == "fedadam":
        return torch.optim.Adam(parameters, lr=lr)
    if optimizer == "fedadamw":
        return torch.optim.AdamW(parameters, lr=lr)
    if optimizer == "fedyogi":
        return Yogi(parameters, lr=lr)
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9 if optimizer == "fedavgm" else 0.0)


def averaged(
    state: ServerState,
    tasks: Sequence[ClientTask],
    updates: Iterable[ClientUpdate],
    optimizer: ServerOptimizer,
    lr: float,
    divide_by: Averaging = "participants",
) -> ServerState:
    """Return the state after one server step on the mean of the updates."""
    change = mean_update(state.adapters, state.extras, tasks, updates, divide_by)
    return stepped(state, change, optimizer, lr)


def stepped(
    state: ServerState, change: tuple[Adapters, Extras], optimizer: ServerOptimizer, lr: float
) -> ServerState:
    """Return the next round's state after one server step on a change of factors and heads."""
    adapters, extras, memory = server_step(
        optimizer, lr, state.adapters, state.extras, change, state.optimizer
    )
    return replace(state, round=state.round + 1, adapters=adapters, extras=extras, optimizer=memory)


def _flat(adapters: Adapters, extras: Extras) -> Tensors:
    named = {
        f"{name}.{factor}": tensor
        for name, pair in adapters.items()
        for factor, tensor in pair._asdict().items()
    }
    return {**named, **extras}
