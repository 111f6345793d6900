"""Sketches of a client: one index set per module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fslora.options import Sampler
from fslora.protocol import Adapters, Sketch, Sketches
from fslora_kernels.sampling import (
    draw_orders,
    draw_systematic,
    draw_uniform_each,
    inclusion_probabilities,
)
from fslora_kernels.seeds import fold_in


def draw_sketches(key: int, modules: Sequence[str], rank: int, size: int) -> Mapping[str, Sketch]:
    """Draw one index set per module by ``fslora_kernels.sampling.draw_uniform``.

    Args:
        key: ``fold_in(seed, round, client)``.
        modules: module names.
        rank: R.
        size: S.

    Returns:
        Module name to its sketch; at S = R the index is None and nothing is drawn.

    Raises:
        ValueError: ``size`` is not in 1 … ``rank``.

    Source: arXiv 2501.19389, random-k sketches Ω, E[Ω] = I.
    """
    return _draw_each({"": key}, modules, rank, {"": size})[""]


def _draw_each(
    keys: Mapping[str, int], modules: Sequence[str], rank: int, sizes: Mapping[str, int]
) -> dict[str, Mapping[str, Sketch]]:
    """As ``draw_sketches`` for each client, those of one size in one pass."""
    sketches: dict[str, Mapping[str, Sketch]] = {client: {} for client in sizes}
    names = tuple(modules)
    for size in set(sizes.values()):
        own = {client: keys[client] for client in sizes if sizes[client] == size}
        if size == rank:
            sketches |= dict.fromkeys(own, Sketches(names, None, rank))
            continue
        # To iterate over a tensor takes ten times as long.
        drawn = draw_uniform_each(list(own.values()), names, rank, size).unbind()
        sketches |= {c: Sketches(names, each, rank) for c, each in zip(own, drawn, strict=True)}
    return sketches


def cohort_sketches(
    key: int,
    round_number: int,
    sizes: Mapping[str, int],
    adapters: Adapters,
    sampler: Sampler,
) -> dict[str, Mapping[str, Sketch]]:
    """Draw the sketches of a round's clients.

    With every sampler but "importance" each client's set is uniform over all sets of its size, in
    each module and independently between modules and rounds, so that E[Ω] = I; they differ in how
    the sets of one round's clients go together.

    Args:
        key: of the run.
        round_number: counted from 1.
        sizes: client id to S.
        adapters: the global factors.
        sampler: "uniform": independent. "nested": the first S of one order that all share.
            "class-shared": one set for all clients of one S. "balanced": one order laid around a
            circle, from which the clients, sorted by id, take their S ranks end to end, so that
            the counts of any two ranks in the round differ by at most one. "importance":
            independent, each rank j with the probability that ``inclusion_probabilities`` gives
            to ‖bⱼ‖‖aⱼ‖, which the sketch carries: Ωⱼⱼ = 1/πⱼ has E[Ω] = I.

    Returns:
        Client id to module name to sketch.
    """
    modules, rank = list(adapters), next(iter(adapters.values())).rank
    together = fold_in(key, "sketches", round_number)
    if sampler == "balanced":
        return _end_to_end(draw_orders(together, modules, rank), sizes, modules)

    def key_of(client: str) -> int:
        if sampler == "nested":
            return together
        if sampler == "class-shared":
            return fold_in(together, sizes[client])
        return fold_in(key, round_number, client)

    keys = {client: key_of(client) for client in sizes}
    if sampler != "importance":
        return _draw_each(keys, modules, rank, sizes)
    return {
        client: _by_importance(own, adapters, sizes[client])
        if sizes[client] < rank
        else draw_sketches(own, modules, rank, rank)
        for client, own in keys.items()
    }


def draw_steps(key: int, modules: Sequence[str], rank: int, size: int, steps: int) -> torch.Tensor:
    """Draw a new index set for every local step, as server and client both do.

    Args:
        key: of the client's task; step t draws by ``draw_uniform`` from ``fold_in(key, "sketch",
            t)``, t counted from 0.
        modules: module names.
        rank: R.
        size: S.
        steps: H.

    Returns:
        int64 ``[steps, modules, S]``, each row ascending.
    """
    keys = [fold_in(key, "sketch", step) for step in range(steps)]
    return draw_uniform_each(keys, modules, rank, size)


def step_unions(
    keys: Mapping[str, int], sizes: Mapping[str, int], adapters: Adapters, steps: int
) -> dict[str, Mapping[str, Sketch]]:
    """Return the ranks that clients which draw anew in every step train in any of them.

    About R (1 - (1 - S/R)ᴴ) ranks; each trains in a step with probability S/R.

    Args:
        keys: client id to the key of its task.
        sizes: client id to S.
        adapters: the global factors.
        steps: H.

    Returns:
        Client id to module name to sketch.
    """
    modules, rank = list(adapters), next(iter(adapters.values())).rank
    sketches: dict[str, Mapping[str, Sketch]] = {}
    for client, size in sizes.items():
        if size == rank:
            sketches[client] = Sketches(tuple(modules), None, rank)
            continue
        drawn, unions = draw_steps(keys[client], modules, rank, size, steps), {}
        for place, module in enumerate(modules):
            union = torch.unique(drawn[:, place])
            probability = torch.full(union.shape, size / rank, dtype=torch.float64)
            unions[module] = Sketch(union, rank, probability)
        sketches[client] = unions
    return sketches


def _by_importance(key: int, adapters: Adapters, size: int) -> dict[str, Sketch]:
    norms = torch.stack(
        [a.double().norm(dim=1) * b.double().norm(dim=1) for a, b in adapters.values()]
    )
    inclusion = inclusion_probabilities(norms, size)
    rows = draw_systematic(key, list(adapters), inclusion)
    return {
        module: Sketch(row, inclusion.shape[1], probability[row])
        for module, row, probability in zip(adapters, rows, inclusion, strict=True)
    }


def _end_to_end(
    orders: torch.Tensor, sizes: Mapping[str, int], modules: Sequence[str]
) -> dict[str, Mapping[str, Sketch]]:
    rank, start = orders.shape[1], 0
    sketches: dict[str, Mapping[str, Sketch]] = {}
    for client in sorted(sizes):
        places = torch.arange(start, start + sizes[client]) % rank
        start += sizes[client]
        if sizes[client] == rank:
            sketches[client] = Sketches(tuple(modules), None, rank)
        else:
            rows = orders[:, places].sort(dim=1).values
            sketches[client] = Sketches(tuple(modules), rows, rank)
    return sketches
