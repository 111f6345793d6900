"""How strategies begin and build a round's tasks: which ranks a client gets, and its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fslora.protocol import (
    Adapters,
    ClientTask,
    Extras,
    LocalRule,
    LoRAWeights,
    ServerState,
    Sketch,
)
from fslora_kernels.sampling import sketch_size
from fslora_kernels.seeds import fold_in


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


def client_task(
    state: ServerState,
    client_id: str,
    sketches: Mapping[str, Sketch],
    local: LocalRule,
    adapters: Adapters | None = None,
) -> ClientTask:
    """Build a task: the sketched ranks of the global adapter, the heads whole, scale 1.

    Args:
        state: before the round.
        client_id: who.
        sketches: module name to its ranks.
        local: how to train.
        adapters: these ranks, where they are gathered already.
    """
    key = client_key(state, client_id)
    return ClientTask(
        round=state.round + 1,
        client_id=client_id,
        adapters=gather(state.adapters, sketches) if adapters is None else adapters,
        extras={name: tensor.clone() for name, tensor in state.extras.items()},
        sketches=dict(sketches),
        local=local,
        key=fold_in(key, "local"),
        nonce=fold_in(key, "nonce"),
    )


def gather(adapters: Adapters, sketches: Mapping[str, Sketch]) -> Adapters:
    """Copy out the ranks that each module's sketch selects: ``[S, D]`` and ``[S, E]``."""
    compact: Adapters = {}
    for name, sketch in sketches.items():
        pair, index = adapters[name], sketch.index
        if index is None:
            compact[name] = LoRAWeights(pair.lora_a.clone(), pair.lora_b.clone())
        else:
            compact[name] = LoRAWeights(pair.lora_a[index], pair.lora_b[index])
    return compact


def gather_each(
    adapters: Adapters, drawn: Mapping[str, Mapping[str, Sketch]]
) -> dict[str, Adapters]:
    """Gather for each client, in one call for each factor: what a client gets is views of that."""
    found: dict[str, Adapters] = {client_id: {} for client_id in drawn}
    for name, pair in adapters.items() if drawn else ():
        sketches = [own[name] for own in drawn.values()]
        index = torch.cat([sketch.rows for sketch in sketches])
        sizes = [sketch.size for sketch in sketches]
        split = [torch.split(factor.index_select(0, index), sizes) for factor in pair]
        for client_id, *factors in zip(drawn, *split, strict=True):
            found[client_id][name] = LoRAWeights(*factors)
    return found


def gather_rest(adapters: Adapters, sketches: Mapping[str, Sketch]) -> Adapters:
    """Copy out the ranks that a sketch leaves; modules whose sketch is whole are left out."""
    rest: Adapters = {}
    for name, sketch in sketches.items():
        if sketch.index is not None and sketch.size < sketch.rank:
            others = torch.ones(sketch.rank, dtype=torch.bool)
            others[sketch.index] = False
            rest[name] = LoRAWeights(*(factor[others] for factor in adapters[name]))
    return rest


def first_ranks(modules: Sequence[str], rank: int, size: int) -> dict[str, Sketch]:
    """Return the sketches that select ranks 0 … ``size`` - 1 of ``rank`` in every module."""
    index = None if size == rank else torch.arange(size)
    return {module: Sketch(index, rank) for module in modules}


def common_rank(adapters: Adapters) -> int:
    """Return R, which all modules share."""
    return next(iter(adapters.values())).rank


def without_tail(adapters: Adapters, size: int) -> Adapters:
    """Set the ranks from ``size`` on to zero, which nobody will ever train."""
    cut: Adapters = {}
    for name, pair in adapters.items():
        cut[name] = LoRAWeights(pair.lora_a.clone(), pair.lora_b.clone())
        for factor in cut[name]:
            factor[size:] = 0
    return cut
