"""The operation on torch's own matrix products: delta first, the base product added in place.

Writing the delta first and accumulating the base product into it costs one visible write of the
output, and rounds once less than adding the delta to a finished base product. The order is the
other one where oneDNN computes the base product, which it cannot accumulate, and in bfloat16 on a
processor without AMX, where accumulating a large product is slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from fslora_kernels import _onednn

if TYPE_CHECKING:
    from fslora_kernels.ops.sketched_linear.op import Arguments

# Elements of a base weight up to which the Python of a backward pass costs a processor more than
# the additional pass over dx that torch's own differentiation makes.
SMALL_LAYER = 128 * 128
# Ranks below which a processor computes x factorᵀ faster as its transpose: at 8 by 1.7 times in
# float32, 1.3 in bfloat16; from 16 on it is no faster in float32 and up to 1.3 times slower in
# bfloat16.
RANK_MAJOR_BELOW = 16
# Where a processor adds the small product faster than the large one, by 2 to 4% of the layer; it
# costs the rounding that delta first saves.
BASE_FIRST = (torch.bfloat16,)
# What a processor multiplies in tiles of its own (AMX: Intel's from Sapphire Rapids on). Neither
# habit pays there: a layer of 8 ranks takes 4 to 9% less without them.
TILED = (torch.bfloat16,) if torch.cpu._is_amx_tile_supported() else ()

# Made once: beside a large product, which empties the caches, a tensor more costs a processor 1%.
UNREAD = {
    dtype: torch.empty((), dtype=dtype, device="cpu")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def refuses(_arguments: Arguments) -> str | None:
    """Torch runs everywhere."""
    return None


def select(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return the selected factors as A_SD and B_SE in the input's dtype."""
    a, b, index = arguments.lora_a, arguments.lora_b, arguments.index
    if index is not None:
        a, b = a.index_select(0, index), b.index_select(0, index)
    dtype = arguments.x.dtype
    return _cast(a, dtype), _cast(b, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype; asking first costs a tenth of a ``to`` that changes nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _mask(arguments: Arguments) -> Tensor:
    """Draw the dropout mask, the same from the same seed: 0 or 1 in x's dtype, ``[T, D]``.

    Four features share one random number of 64 bits: torch draws those seven times faster than one
    Bernoulli number for each.
    """
    x_TD = arguments.x
    generator = torch.Generator(x_TD.device).manual_seed(arguments.seed or 0)
    bits = torch.empty(-(-x_TD.numel() // 4), dtype=torch.int64, device=x_TD.device)
    numbers = bits.random_(-(2**63), None, generator=generator).view(torch.int16)
    kept = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    numbers_TD = numbers[: x_TD.numel()].view(x_TD.shape)
    return torch.ge(numbers_TD, arguments.dropped - 2**15, out=kept)


def _untiled(x: Tensor) -> bool:
    """Whether this is on a processor that has no tiles for it."""
    return x.is_cpu and x.dtype not in TILED


def shrink(x_TF: Tensor, factor_SF: Tensor, gain: float | Tensor) -> Tensor:
    """Return gain · x factorᵀ ``[T, S]``; on a processor rank-major where the ranks are few."""
    if isinstance(gain, Tensor):
        return shrink(x_TF, factor_SF, 1.0).mul_(gain)
    # With beta 0 the first argument is not read; a number costs nothing inside the product.
    unread = UNREAD.get(x_TF.dtype) if x_TF.is_cpu else None
    if unread is None:
        unread = x_TF.new_empty(())
    if factor_SF.shape[0] < RANK_MAJOR_BELOW and _untiled(x_TF):
        return torch.addmm(unread, factor_SF, x_TF.t(), beta=0.0, alpha=gain).t()
    return torch.addmm(unread, x_TF, factor_SF.t(), beta=0.0, alpha=gain)


def multiply(left_TF: Tensor, right_FG: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``left right + bias`` where nobody differentiates it, by the better library."""
    if _onednn.takes(left_TF, right_FG, bias):
        return _onednn.product(left_TF, right_FG, bias)
    return left_TF.mm(right_FG) if bias is None else torch.addmm(bias, left_TF, right_FG)


def _best_sum(
    delta: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor] | None, bias: Tensor | None = None
) -> Tensor:
    """Return ``_sum`` where nobody differentiates it, by the better library."""
    if base is not None and _onednn.takes(*base, bias, *delta):
        return _onednn.product(*base, bias).addmm_(*delta)
    return _sum(delta, base, bias)


def _sum(
    delta: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor] | None, bias: Tensor | None = None
) -> Tensor:
    """Return the two products' sum: one is written, with the bias, the other added in place."""
    first, second = delta, base
    if base is not None and base[0].dtype in BASE_FIRST and _untiled(base[0]):
        first, second = base, delta
    y_TE = first[0].mm(first[1]) if bias is None else torch.addmm(bias, *first)
    if second is None:
        return y_TE
    if torch._C._are_functorch_transforms_active():  # torch.vmap has no rule for addmm_
        return y_TE.addmm(*second)
    return y_TE.addmm_(*second)


def _base(arguments: Arguments) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Return what the base layer multiplies, ``[T, D]`` and ``[D, E]``, and its bias."""
    x_TD, weight, bias = arguments.x, arguments.weight, arguments.bias
    dtype = x_TD.dtype
    base = None if weight is None else (x_TD, _cast(weight, dtype).t())
    return base, None if bias is None else _cast(bias, dtype)


def differentiates_itself(arguments: Arguments) -> bool:
    """Whether torch's own differentiation is the faster: small layers on a processor."""
    x_TD, weights = arguments.x, arguments.lora_a.shape[1] * arguments.lora_b.shape[1]
    return weights <= SMALL_LAYER and not arguments.dropout and x_TD.is_cpu


def differentiable(arguments: Arguments) -> Tensor:
    """Return y ``[T, E]`` by products that torch, or a compiler, differentiates."""
    a_SD, b_SE = select(arguments)
    x_TD, gain = arguments.x, arguments.gain
    if arguments.dropout and arguments.seed is None:
        x_TD = functional.dropout(x_TD, arguments.dropout)  # a compiler keeps its bits at most
    elif arguments.dropout:
        x_TD, gain = x_TD * _mask(arguments), arguments.kept_gain
    h_TS = functional.linear(x_TD, a_SD).mul_(gain)
    return _sum((h_TS, b_SE), *_base(arguments))


def forward(arguments: Arguments) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return y ``[T, E]`` and h ``[T, S]``, the latter times the gain, as the backward wants it."""
    x_TD = arguments.x
    a_SD, b_SE = select(arguments)
    dropped_TD = x_TD * _mask(arguments) if arguments.dropout else x_TD
    h_TS = shrink(dropped_TD, a_SD, arguments.kept_gain)
    return _best_sum((h_TS, b_SE), *_base(arguments)), (h_TS,)


def backward(
    arguments: Arguments,
    kept: tuple[Tensor, ...],
    dy_TE: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B (those that ``needs`` asks for).

    A and B's gradients have the shapes of the arguments: rows outside the index set are zero.
    """
    (h_TS,) = kept
    needs_x, needs_a, needs_b = needs
    x_TD, index = arguments.x, arguments.index
    a_SD, b_SE = select(arguments)
    dx = da = db = None
    if needs_b:
        # hᵀ dy rather than dyᵀ h: several times faster on a CPU, and one rank is one row.
        db = widen(torch.mm(h_TS.t(), dy_TE), index, arguments.lora_b)
    if not (needs_x or needs_a):
        return dx, da, db
    dh_TS = shrink(dy_TE, b_SE, arguments.kept_gain)
    mask_TD = _mask(arguments) if arguments.dropout else None
    if needs_a:
        da = torch.mm(dh_TS.t(), x_TD if mask_TD is None else x_TD * mask_TD)
        da = widen(da, index, arguments.lora_a)
    if needs_x:
        weight = arguments.weight
        base = None if weight is None else (dy_TE, _cast(weight, x_TD.dtype))
        if mask_TD is None:
            dx = _best_sum((dh_TS, a_SD), base)
        elif base is not None and _onednn.takes(*base, dh_TS, a_SD):
            dx = _onednn.product(*base).addcmul_(torch.mm(dh_TS, a_SD), mask_TD)
        else:
            dx = torch.mm(dh_TS, a_SD).mul_(mask_TD)
            dx = dx if base is None else dx.addmm_(*base)
    return dx, da, db


def widen(rows: Tensor, index: Tensor | None, like: Tensor) -> Tensor:
    """Put the rows of the selected ranks into a zero matrix, or keep them if all are there."""
    rows = _cast(rows, like.dtype)
    if index is None:
        return rows
    return rows.new_zeros(like.shape).index_copy_(0, index, rows)
