"""What an update must satisfy before it touches the model, and who is not asked any more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, repeat

import torch
from torch import Tensor

from fslora.protocol import ClientTask, ClientUpdate, ServerState
from fslora.robust import update_norm
from fslora.stacks import Stacks, few_tensors
from fslora.trust import Limits

NO_LIMITS = Limits()
_MOST_LOSS = torch.finfo(torch.float32).max  # of a cohort the sum is finite
_ROUNDING = 1e-6  # more than two ways to sum a norm's squares in float64 can differ by
# In float32 they differ by less than a unit for each term; a result in half precision by less
# than a hundredth more.
_UNIT, _COARSE = 2.0**-24, 1e-2


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
    if not abs(update.metrics.get("loss", math.nan)) <= _MOST_LOSS:
        return "its training loss is not finite"
    if update.num_examples < 1:
        return "it has no examples"
    known = limits.examples.get(task.client_id, limits.max_examples)
    if update.num_examples > known:
        return f"it claims {update.num_examples} examples and can have {known}"
    return _form_rejection(task, update) or _size_rejection(update, limits.max_norm)


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


@cache
def _largest(dtype: torch.dtype) -> float:
    """Return the largest number whose square is one."""
    return math.sqrt(torch.finfo(dtype).max)


def _form_rejection(task: ClientTask, update: ClientUpdate) -> str | None:
    given, sent, trained = task.adapters, update.delta, task.local.trained
    factors: Iterable[tuple[str, Tensor, Tensor]]
    if (
        isinstance(given, Stacks)
        and isinstance(sent, Stacks)
        and given.layout == sent.layout
        and len(given.tensors) == len(sent.tensors)
        and all(trained)  # or a factor that does not travel would lie in a stack
    ):
        factors = zip(repeat("a stack of its factors"), given.tensors, sent.tensors, strict=False)
    elif sent.keys() == given.keys():
        factors = (
            (name, factor if travels else factor[:0], change)
            for name, pair in given.items()
            for factor, change, travels in zip(pair, sent[name], trained, strict=True)
        )
    else:
        return "its modules are not those that it was given"
    if update.extras.keys() != task.extras.keys():
        return "its modules are not those that it was given"
    heads = ((name, tensor, update.extras[name]) for name, tensor in task.extras.items())
    for name, tensor, change in chain(factors, heads):
        if (reason := _misfit(change, tensor)) is not None:
            return f"{name} {reason}"
    return None


def _misfit(delta: Tensor, given: Tensor) -> str | None:
    if type(delta) is not Tensor or delta.layout != given.layout or delta.device != given.device:
        return "is not a plain tensor where the server's is"
    if delta.shape != given.shape or delta.dtype != given.dtype:
        return f"is {delta.dtype} {tuple(delta.shape)} but was {given.dtype} {tuple(given.shape)}"
    return None


def _size_rejection(update: ClientUpdate, most: float) -> str | None:
    """Look at all tensors in one call; only where that does not do, at each."""
    changes = [*few_tensors(update.delta), *update.extras.values()]
    if not changes:
        return None
    # Finite terms may have a sum that is not; below this no cohort's has, nor its square.
    most = most or min(_largest(change.dtype) for change in changes)
    # In the changes' own type first: it is faster, and nearly all are far below the bound.
    coarse = _COARSE + max(change.numel() for change in changes) * _UNIT
    for dtype, rounding in ((None, coarse), (torch.float64, _ROUNDING)):
        if rounding < 1:
            norms = torch._foreach_norm(changes, 2, dtype=dtype)
            if math.hypot(*map(float, norms)) < (1 - rounding) * most:
                return None
    for name, own in (*update.delta.items(), *((n, (t,)) for n, t in update.extras.items())):
        if not all(bool(torch.isfinite(change).all()) for change in own):
            return f"{name} is not finite"
    norm = update_norm(update)
    return None if norm <= most else f"its norm is {norm:.3g}, above {most:.3g}"
