"""The operation on torch's own matrix products: delta first, the base product added in place.

Writing the delta first and accumulating the base product into it costs one visible write of the
output, and rounds once less than adding the delta to a finished base product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fslora_kernels.ops.sketched_linear.op import Arguments


def refuses(_arguments: Arguments) -> str | None:
    """Torch runs everywhere."""
    return None


def _select(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return the selected factors as A_SD and B_ES in the input's dtype."""
    a, b, index = arguments.lora_a, arguments.lora_b, arguments.index
    if index is not None:
        a, b = a.index_select(0, index), b.index_select(1, index)
    return a.to(arguments.x.dtype), b.to(arguments.x.dtype)


def _kept(arguments: Arguments) -> Tensor:
    """Regenerate the dropout mask, already divided by the probability of keeping: ``[T, D]``."""
    x_TD = arguments.x
    generator = torch.Generator(x_TD.device).manual_seed(arguments.seed)
    keep = 1.0 - arguments.dropout
    return torch.empty_like(x_TD).bernoulli_(keep, generator=generator).div_(keep)


def forward(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return y ``[T, E]`` and h ``[T, S]``, the latter times the gain, as the backward wants it."""
    x_TD, bias = arguments.x, arguments.bias
    a_SD, b_ES = _select(arguments)
    dropped_TD = x_TD * _kept(arguments) if arguments.dropout else x_TD
    h_TS = torch.mm(dropped_TD, a_SD.t()).mul_(arguments.gain)
    if bias is None:
        y_TE = torch.mm(h_TS, b_ES.t())
    else:
        y_TE = torch.addmm(bias.to(x_TD.dtype), h_TS, b_ES.t())
    if arguments.weight is not None:
        y_TE.addmm_(x_TD, arguments.weight.to(x_TD.dtype).t())
    return y_TE, h_TS


def backward(
    arguments: Arguments, h_TS: Tensor, dy_TE: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B (those that ``needs`` asks for).

    A and B's gradients have the shapes of the arguments: rows outside the index set are zero.
    """
    needs_x, needs_a, needs_b = needs
    x_TD, index = arguments.x, arguments.index
    a_SD, b_ES = _select(arguments)
    dx = da = db = None
    if needs_b:
        # hᵀ dy rather than dyᵀ h: several times faster on a CPU, and one rank is one row.
        db = _widen(torch.mm(h_TS.t(), dy_TE), index, arguments.lora_b.t()).t()
    if not (needs_x or needs_a):
        return dx, da, db
    dh_TS = torch.mm(dy_TE, b_ES).mul_(arguments.gain)
    kept_TD = _kept(arguments) if arguments.dropout else None
    if needs_a:
        dropped_TD = x_TD if kept_TD is None else x_TD * kept_TD
        da = _widen(torch.mm(dh_TS.t(), dropped_TD), index, arguments.lora_a)
    if needs_x:
        dx = torch.mm(dh_TS, a_SD)
        if kept_TD is not None:
            dx.mul_(kept_TD)
        if arguments.weight is not None:
            dx.addmm_(dy_TE, arguments.weight.to(x_TD.dtype))
    return dx, da, db


def _widen(rows: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """Scatter compact gradient rows into a zero matrix of the parameter's shape."""
    rows = rows.to(like.dtype)
    if index is None:
        return rows
    return rows.new_zeros(like.shape).index_copy_(0, index, rows)
