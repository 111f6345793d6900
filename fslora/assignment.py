"""How strategies begin and build a round's tasks: which ranks a client gets, and its keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat

import torch

from fslora.depth import Depth, layers_of
from fslora.protocol import (
    Adapters,
    ClientTask,
    Extras,
    LocalRule,
    LoRAWeights,
    ServerState,
    Sketch,
    Sketches,
    ranks_of,
)
from fslora.stacks import Stacks, part_of, places_of, stacked
from fslora_kernels.sampling import sketch_size
from fslora_kernels.seeds import fold_in, uniform

_LOCAL = "local"


def first_state(adapters: Adapters, extras: Extras, seed: int) -> ServerState:
    """Begin with the adapter and the heads as they are: most strategies' ``init``."""
    return ServerState(round=0, adapters=adapters, extras=extras, key=seed)


def check_ratios(ratios: Mapping[str, float]) -> None:
    """Refuse a sketch ratio that no client can have.

    Raises:
        ValueError: a ratio is not in (0, 1].
    """
    for ratio in ratios.values():
        sketch_size(1, ratio)


def client_key(state: ServerState, client_id: str) -> int:
    """Return the key of a client in the coming round."""
    return fold_in(state.key, state.round + 1, client_id)


def task_key(state: ServerState, client_id: str) -> int:
    """Return the key of a client's own draws in the coming round."""
    return fold_in(client_key(state, client_id), _LOCAL)


def client_tasks(
    state: ServerState, drawn: Mapping[str, Mapping[str, Sketch]], local: LocalRule
) -> list[ClientTask]:
    """Build a cohort's tasks: the sketched ranks of the global adapter, the heads whole, scale 1.

    Args:
        state: before the round.
        drawn: client id to module name to its ranks.
        local: how to train.
    """
    gathered, tasks = gather_each(state.adapters, drawn), []
    for client_id, sketches in drawn.items():
        key = client_key(state, client_id)
        task = ClientTask(
            round=state.round + 1,
            client_id=client_id,
            adapters=gathered[client_id],
            extras={name: tensor.clone() for name, tensor in state.extras.items()},
            sketches=sketches,
            local=local,
            key=fold_in(key, _LOCAL),
            nonce=fold_in(key, "nonce"),
        )
        tasks.append(task)
    return tasks


def gather_each(adapters: Adapters, drawn: Mapping[str, Mapping[str, Sketch]]) -> dict[str, Stacks]:
    """Gather for each client, for all whose sketches have the same sizes at once."""
    whole = stacked(adapters)
    alike: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for client_id, own in drawn.items():
        sizes = _sizes(own, adapters)
        alike.setdefault(sizes, []).append(client_id)
    found: dict[str, Stacks] = {}
    for sizes, clients in alike.items():
        if not sizes:
            found |= dict.fromkeys(clients, stacked({}))
            continue
        layout = part_of(whole.layout, sizes)
        names = [name for name, _ in sizes]
        ranks = torch.cat([ranks_of(drawn[client], names) for client in clients])
        places = places_of(ranks.view(len(clients), -1), layout, whole.layout)
        gathered = [
            whole.tensors[whole.layout.kinds.index(kind)]
            .index_select(0, own.flatten())
            .view(*own.shape, -1)
            for kind, own in zip(layout.kinds, places, strict=True)
        ]
        each = zip(*(t.unbind() for t in gathered), strict=True)
        of_each = zip(*(t.unbind() for t in places), strict=True)
        for client, tensors, rows in zip(clients, each, of_each, strict=True):
            found[client] = Stacks(layout, list(tensors), list(rows))
    return found


def _sizes(own: Mapping[str, Sketch], order: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Return S of each module that there is a sketch of, in the adapters' order."""
    if isinstance(own, Sketches) and own.names == tuple(order):
        return tuple(zip(own.names, repeat(own.size), strict=False))
    return tuple((name, own[name].size) for name in order if name in own)


def gather_rest(adapters: Adapters, sketches: Mapping[str, Sketch]) -> Adapters:
    """Copy out the ranks that are in no sketch; modules whose sketch has no index are left out."""
    rest: dict[str, LoRAWeights] = {}
    for name, pair in adapters.items():
        others = torch.ones(pair.rank, dtype=torch.bool)
        if name in sketches:
            index = sketches[name].index
            if index is None:
                continue
            others[index] = False
        rest[name] = LoRAWeights(*(factor[others] for factor in pair))
    return rest


def upper_layers(
    sketches: Mapping[str, Sketch],
    state: ServerState,
    client_id: str,
    depth: Depth,
    ratio: float,
    least: float,
) -> Mapping[str, Sketch]:
    """Keep the sketches of the layers that a client trains: those whose π is above one number.

    As π grows from layer to layer, what is kept reaches from one of them to the top.

    Args:
        sketches: of all modules.
        state: before the round.
        client_id: whose.
        depth: what π follows from, with the client's ratio S/R and the least π.
        ratio: likewise.
        least: likewise.

    Returns:
        Some of the sketches, with π in the probabilities of their ranks.
    """
    if not depth.drawn:
        return sketches
    layers = layers_of(sketches)
    shares = depth.probabilities(len(layers), ratio, least)
    share_of = {name: share for layer, share in zip(layers, shares, strict=True) for name in layer}
    drawn = uniform(client_key(state, client_id), "depth")
    return {
        name: sketch.thinned(share_of[name])
        for name, sketch in sketches.items()
        if drawn < share_of[name]
    }


def inverse_probabilities(task: ClientTask) -> dict[str, torch.Tensor]:
    """Return 1/π of each rank of a task's sketches ``[S]``, in the factors' type, as it is sent."""
    return {
        name: (1 / sketch.probability).to(task.adapters[name].lora_a.dtype)
        for name, sketch in task.sketches.items()
        if sketch.probability is not None
    }


def first_ranks(modules: Sequence[str], rank: int, size: int) -> Sketches:
    """Return the sketches that select ranks 0 … ``size`` - 1 of ``rank`` in every module."""
    index = None if size == rank else torch.arange(size).expand(len(modules), -1)
    return Sketches(tuple(modules), index, rank)


def first_ranks_each(
    adapters: Adapters, ratios: Mapping[str, float], cohort: Iterable[str]
) -> dict[str, Sketches]:
    """Return for each client the sketches that select the first S ranks, S/R being its ratio."""
    rank, modules = common_rank(adapters), list(adapters)
    return {
        client_id: first_ranks(modules, rank, sketch_size(rank, ratios[client_id]))
        for client_id in cohort
    }


def common_rank(adapters: Adapters) -> int:
    """Return R, which all modules share."""
    return next(iter(adapters.values())).rank


def without_tail(adapters: Adapters, size: int) -> Adapters:
    """Set the ranks from ``size`` on to zero, which nobody will ever train."""
    cut: dict[str, LoRAWeights] = {}
    for name, pair in adapters.items():
        cut[name] = LoRAWeights(pair.lora_a.clone(), pair.lora_b.clone())
        for factor in cut[name]:
            factor[size:] = 0
    return cut
