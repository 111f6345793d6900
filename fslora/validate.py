"""What an update must satisfy before it touches the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fslora.protocol import ClientTask, ClientUpdate


def rejection(task: ClientTask, update: ClientUpdate) -> str | None:
    """Say why an update must not be used, or None if it is fine.

    Args:
        task: what the server asked, its own copy.
        update: what the client answered.
    """
    if (update.round, update.client_id, update.nonce) != (task.round, task.client_id, task.nonce):
        return "it answers another task"
    if not math.isfinite(update.metrics.get("loss", math.nan)):
        return "its training loss is not finite"
    if update.num_examples < 1:
        return "it has no examples"
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
