"""What an update must satisfy before it touches the model, and who is not asked any more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fslora.protocol import ClientTask, ClientUpdate, ServerState
from fslora.robust import update_norm
from fslora.trust import Limits

NO_LIMITS = Limits()


def rejection(task: ClientTask, update: ClientUpdate, limits: Limits = NO_LIMITS) -> str | None:
    """Say why an update must not be used, or None if it is fine.

    Args:
        task: what the server asked, its own copy.
        update: what the client answered.
        limits: of its norm and its claims.
    """
    if update.refused is not None:
        return update.refused
    if (update.round, update.client_id, update.nonce) != (task.round, task.client_id, task.nonce):
        return "it answers another task"
    if not math.isfinite(update.metrics.get("loss", math.nan)):
        return "its training loss is not finite"
    if update.num_examples < 1:
        return "it has no examples"
    known = limits.examples.get(task.client_id, limits.max_examples)
    if update.num_examples > known:
        return f"it claims {update.num_examples} examples and can have {known}"
    return _tensors_rejection(task, update) or _norm_rejection(task, update, limits.max_norm)


def quarantined(state: ServerState, clients: Sequence[str], limits: Limits) -> frozenset[str]:
    """Return those of ``clients`` that are not asked any more."""
    if not limits.quarantine:
        return frozenset()
    return frozenset(c for c in clients if state.rejections.get(c, 0) >= limits.quarantine)


def counted(state: ServerState, refused: Iterable[str]) -> ServerState:
    """Return the state that remembers whose updates of a round were rejected."""
    rejections = dict(state.rejections)
    for client in refused:
        rejections[client] = rejections.get(client, 0) + 1
    return replace(state, rejections=rejections)


def _tensors_rejection(task: ClientTask, update: ClientUpdate) -> str | None:
    if update.delta.keys() != task.adapters.keys() or update.extras.keys() != task.extras.keys():
        return "its modules are not those that it was given"
    changes: list[tuple[str, Tensor]] = []
    for name, pair in task.adapters.items():
        for factor, given, trained in zip(
            update.delta[name], pair, task.local.trained, strict=True
        ):
            if (reason := _misfit(factor, given if trained else given[:0])) is not None:
                return f"{name} {reason}"
            changes.append((name, factor))
    for name, given in task.extras.items():
        if (reason := _misfit(update.extras[name], given)) is not None:
            return f"{name} {reason}"
        changes.append((name, update.extras[name]))
    return _not_finite(changes)


def _misfit(delta: Tensor, given: Tensor) -> str | None:
    if type(delta) is not Tensor or delta.layout != given.layout or delta.device != given.device:
        return "is not a plain tensor where the server's is"
    if delta.shape != given.shape or delta.dtype != given.dtype:
        return f"is {delta.dtype} {tuple(delta.shape)} but was {given.dtype} {tuple(given.shape)}"
    return None


def _not_finite(changes: Sequence[tuple[str, Tensor]]) -> str | None:
    """Look at all tensors in one call; only where that finds something, at each."""
    filled = [change for _, change in changes if change.numel()]
    largest = torch._foreach_norm(filled, math.inf) if filled else []
    if all(map(math.isfinite, largest)):
        return None
    name = next(name for name, change in changes if not bool(torch.isfinite(change).all()))
    return f"{name} is not finite"


def _norm_rejection(task: ClientTask, update: ClientUpdate, most: float) -> str | None:
    tensors = [t for pair in task.adapters.values() for t in pair] + list(task.extras.values())
    # Finite terms may have a sum that is not; below this no cohort's has, nor its square.
    most = most or min((math.sqrt(torch.finfo(t.dtype).max) for t in tensors), default=math.inf)
    norm = update_norm(update)
    return None if norm <= most else f"its norm is {norm:.3g}, above {most:.3g}"
