"""Rules that a few hostile clients cannot bend far: what a server averages instead of the updates.

A rule rewrites the accepted updates of a round before the strategy averages them, so that it works
with every strategy that averages changes, whatever it divides by:

    clip      Δᵢ ← Δᵢ · min(1, C / ‖Δᵢ‖), the norm over all modules and heads together; C is a
              fixed bound or the median of the round's norms;
    median    clip, then in every rank row of every factor each contributor's change becomes the
    trimmed   coordinate-wise median, or trimmed mean, over those who trained that row.

Clipping comes first in all of them, because a row's few contributors can be hostile by more than
half where the cohort's are not: then clipping is what bounds them.

Where c clients trained a row, a mean divided by N moves it by (c/N) times its contributors' mean,
and with a rule by (c/N) times their median: partial coverage weighs as it did before. A row that
fewer than ``min_coverage`` clients trained does not move: one hostile client of two, or of one,
would be its median. Heads are trained by everybody, their contributors are all participants.

Source: arXiv 1803.01498 (coordinate-wise median, trimmed mean), arXiv 1911.07963 (norm clipping).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from fslora.protocol import (
    Adapters,
    ClientTask,
    ClientUpdate,
    LoRAWeights,
    ServerState,
    Strategy,
)
from fslora.trust import Rule


def defended(strategy: Strategy, rule: Rule) -> Strategy:
    """Return the strategy with a rule before its aggregation; "none" returns it as it is.

    The rule needs a round's updates together, so that they are held in memory at once: the price
    is a cohort's uploads.
    """
    if rule.name == "none":
        return strategy

    def aggregate(
        state: ServerState, tasks: Sequence[ClientTask], updates: Iterable[ClientUpdate]
    ) -> ServerState:
        return strategy.aggregate(state, tasks, apply(rule, tasks, list(updates)))

    return strategy._replace(aggregate=aggregate)


def apply(
    rule: Rule, tasks: Sequence[ClientTask], updates: Sequence[ClientUpdate]
) -> list[ClientUpdate]:
    """Return a round's updates as a rule leaves them; the arguments are not changed.

    Args:
        rule: which, and how; not "none".
        tasks: of the round; their sketches say which rows an update is of.
        updates: accepted updates.
    """
    if not updates:
        return []
    norms = [update_norm(update) for update in updates]
    bound = rule.clip or median(norms)
    updates = [clipped(each, size, bound) for each, size in zip(updates, norms, strict=True)]
    if rule.name == "clip":
        return updates
    sketches = {task.client_id: task.sketches for task in tasks}
    deltas: list[Adapters] = [{} for _ in updates]
    for name in dict.fromkeys(name for update in updates for name in update.delta):
        # At a depth of its own a client trains some of the modules.
        holders = [place for place, update in enumerate(updates) if name in update.delta]
        own = [sketches[updates[place].client_id][name] for place in holders]
        whole = torch.arange(own[0].rank)
        rows = [whole if sketch.index is None else sketch.index for sketch in own]
        pairs = zip(*(updates[place].delta[name] for place in holders), strict=True)
        factors = [_per_row(rule, rows, changes) for changes in pairs]
        for place, lora_a, lora_b in zip(holders, *factors, strict=True):
            deltas[place][name] = LoRAWeights(lora_a, lora_b)
    extras = {
        name: _centre(rule, torch.stack([update.extras[name] for update in updates]))
        for name in updates[0].extras
    }
    return [
        replace(update, delta=delta, extras=extras)
        for update, delta in zip(updates, deltas, strict=True)
    ]


def _per_row(rule: Rule, rows: Sequence[Tensor], changes: Sequence[Tensor]) -> list[Tensor]:
    """Replace each client's rows by the centre over all who changed them.

    Args:
        rule: which centre.
        rows: each client's ranks, int64 ``[Sᵢ]``.
        changes: each client's change of one factor, ``[Sᵢ, features]``, or no rows.
    """
    if not changes[0].shape[0]:  # a factor that is not trained
        return list(changes)
    replaced = [torch.zeros_like(change) for change in changes]
    holders: dict[int, list[tuple[int, int]]] = {}
    for client, ranks in enumerate(rows):
        for place, rank in enumerate(ranks.tolist()):
            holders.setdefault(rank, []).append((client, place))
    for held in holders.values():
        centre = _centre(rule, torch.stack([changes[client][place] for client, place in held]))
        for client, place in held:
            replaced[client][place] = centre
    return replaced


def _centre(rule: Rule, changes: Tensor) -> Tensor:
    """The centre of ``[contributors, …]`` by coordinate; zero where there are too few of them."""
    count = changes.shape[0]
    if count < rule.min_coverage:
        return torch.zeros_like(changes[0])
    cut = (count - 1) // 2
    if rule.name == "trimmed":
        cut = min(cut, math.ceil(round(rule.trim * count, 6)))
    # What is left of a median is the middle one, or the middle two.
    return changes.sort(dim=0).values[cut : count - cut].mean(dim=0)


def update_norm(update: ClientUpdate) -> float:
    """Return the Euclidean norm of a client's whole change, all modules and heads together.

    It does not depend on their order, which a resumed run may have otherwise.
    """
    try:
        return math.sqrt(math.fsum(float(t.double().square().sum()) for t in update.tensors()))
    except OverflowError:
        return math.inf


def clipped(update: ClientUpdate, norm: float, bound: float) -> ClientUpdate:
    """Scale a change down to a norm; one that is within it is returned as it is.

    Args:
        update: the change.
        norm: its ``update_norm``.
        bound: C.
    """
    if norm <= bound:
        return update
    return scaled(update, bound / norm)


def scaled(update: ClientUpdate, factor: float) -> ClientUpdate:
    """Multiply a whole change by a number."""
    return mapped(update, lambda change: change * factor)


def mapped(
    update: ClientUpdate, change: Callable[[Tensor], Tensor], *, extras: bool = True
) -> ClientUpdate:
    """Apply a function to every tensor of a change, or to its factors alone."""
    heads = {name: change(tensor) for name, tensor in update.extras.items()}
    return replace(
        update,
        delta={n: LoRAWeights(*map(change, pair)) for n, pair in update.delta.items()},
        extras=heads if extras else update.extras,
    )
