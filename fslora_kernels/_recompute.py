"""Inputs that need not be kept for the backward pass, because it can multiply them out again.

A normalised input is w ∘ (x · 1/rms), SwiGLU's output silu(gate) ∘ up: products of tensors that
autograd keeps anyway, for the gradients of their factors. The layer behind them has to keep nothing
but what they are made of. The same multiplications give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_SMALL = 8  # times as large as a parameter is x where that is copied


class Recipe(NamedTuple):
    """How a tensor is made of others.

    Attributes:
        steps: on a stack: the number of a tensor is put onto it, None multiplies the two on top, a
            dtype casts the one on top.
        tensors: what it is made of; the graph keeps them too.
    """

    steps: tuple[int | torch.dtype | None, ...]
    tensors: tuple[Tensor, ...]


def recipe(x: Tensor) -> Recipe | None:
    """Return how to make a tensor again, or None where its graph does not keep what it takes.

    So it is under hooks on what is saved, such as a checkpoint's, too: there nothing is kept. What
    autograd does not see cannot be seen here either: a tensor that was written over, or a part of a
    larger one. Of x itself its version tells; of what lies between x and the factors nothing does.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: FBT003
    if hooks is not None or x.grad_fn is None or x._version:
        return None
    steps: list[int | torch.dtype | None] = []
    tensors: list[Tensor] = []
    try:
        found = _follow(x.grad_fn, steps, tensors)
    except RuntimeError:  # it was written over since, or given free
        return None
    if not found or any(tensor.device != x.device for tensor in tensors):
        return None
    return Recipe(tuple(steps), tuple(_own(tensor, x) for tensor in tensors))


def _own(factor: Tensor, x: Tensor) -> Tensor:
    """Copy a small parameter, which may be given free until its module's own backward pass."""
    small = factor.is_leaf and factor.numel() * _SMALL <= x.numel()
    return factor.detach().clone() if small else factor.detach()


def _follow(node: Any, steps: list[int | torch.dtype | None], tensors: list[Tensor]) -> bool:  # noqa: ANN401
    """Append what the result of a node is made of; say whether that is known."""
    name = None if node is None else node.name()
    if name == "ToCopyBackward0":
        if not _follow(node.next_functions[0][0], steps, tensors):
            return False
        steps.append(node._input_metadata[0].dtype)
        return True
    if name != "MulBackward0":
        return False
    if any(raw.unpack_hook for raw in (node._raw_saved_self, node._raw_saved_other)):
        return False
    saved = node._saved_self, node._saved_other
    for factor, (before, _) in zip(saved, node.next_functions, strict=True):
        if factor is None:
            if not _follow(before, steps, tensors):
                return False
        elif factor.ndim == 0 or not factor.untyped_storage().nbytes():
            return False  # it may be a number, which has no dtype of its own; or given free
        else:
            steps.append(len(tensors))
            tensors.append(factor)
    steps.append(None)
    return True


def made(steps: tuple[int | torch.dtype | None, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    """Follow a recipe."""
    stack: list[Tensor] = []
    for step in steps:
        if step is None:
            second = stack.pop()
            stack.append(stack.pop() * second)
        elif isinstance(step, torch.dtype):
            stack.append(stack.pop().to(step))
        else:
            stack.append(tensors[step])
    return stack.pop()
