"""What our autograd functions have in common: they are differentiable once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for a tensor's device; the meta device knows none."""
    return (
        torch._C._is_any_autocast_enabled()
        and not tensor.is_meta
        and torch.is_autocast_enabled(tensor.device.type)
    )


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backward pass refuse to be differentiated, instead of giving no second gradient.

    Torch's ``once_differentiable`` says nothing where the incoming gradient needs none. Outside of
    ``create_graph=True`` a backward pass runs without recording, so nothing else is needed. An
    autocast that is on around the backward pass is turned off in it: dtypes are the forward's.

    Raises:
        NotImplementedError: in the backward pass, under ``create_graph=True``.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:  # noqa: ANN401
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "fused layers have first-order gradients only (this backward pass was asked for "
                "create_graph=True); call fslora_kernels.unfuse(model) for second-order ones"
            )
        if autocasts(gradients[0]):
            with torch.autocast(gradients[0].device.type, enabled=False):
                return backward(ctx, *gradients)
        return backward(ctx, *gradients)

    return checked


def rows(x: Tensor) -> Tensor:
    """Return ``[..., F]`` as ``[T, F]``."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def unrows(y_TF: Tensor, x: Tensor) -> Tensor:
    """Return ``[T, F]`` with the leading dimensions of x."""
    return y_TF if x.ndim == 2 else y_TF.view(*x.shape[:-1], y_TF.shape[1])


def fresh_unrows(y_TF: Tensor, x: Tensor) -> Tensor:
    """Return ``[T, F]``, just computed and contiguous, with the leading dimensions of x: no view.

    Nobody may write over a view that an autograd function returns, and FSDP2 warns of any.
    """
    if x.ndim == 2:
        return y_TF
    shape = (*x.shape[:-1], y_TF.shape[1])
    if type(y_TF) is Tensor:
        return y_TF.resize_(shape)
    return torch.ops.aten._unsafe_view.default(y_TF, shape)  # type: ignore[no-any-return]


def without_values(dy_TE: Tensor, features: int) -> Tensor:
    """Return what stands for an input x ``[T, D]`` whose values no gradient needs."""
    return dy_TE.new_empty(()).expand(len(dy_TE), features)
