"""The operation with the delta merged into the base weight, in each pass anew.

``x (W + gain · BᵀA)ᵀ`` takes two products of ranks with features off a step, in which every token
takes part, for two in which none does: it pays from some number of tokens on. W itself is not
changed. It needs a dtype in which the sum loses no more than the product does: in bfloat16, with
weights of 0.02 and a delta of 1e-5, nine tenths of the delta would be lost.

Source: RunLoRA, arXiv 2312.03415, which chooses between such orders by their operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fslora_kernels.ops.sketched_linear import backend_torch

if TYPE_CHECKING:
    from fslora_kernels.ops.sketched_linear.op import Arguments

PRECISE = (torch.float32, torch.float64)


def pays(arguments: Arguments, weight: Tensor) -> bool:
    """Whether tokens are so many that merging is the faster, whatever the ranks.

    That is where it leaves out twice the operations that it adds: passes over W cost as much again.
    """
    tokens, in_features = arguments.x.shape
    out_features = weight.shape[0]
    left_out, merged = tokens * (in_features + out_features), in_features * out_features
    if arguments.keeps and arguments.x.requires_grad:
        merged *= 2  # in both passes
    elif arguments.keeps:
        left_out = tokens * out_features  # x Aᵀ is there for dB
    return left_out >= 2 * merged


def refuses(arguments: Arguments) -> str | None:
    """Say why delta first is better here, or the only way, or None."""
    x_TD, weight = arguments.x, arguments.weight
    if weight is None or arguments.dropout:
        return "the delta has no base weight, or another input"
    if not x_TD.is_cpu or x_TD.dtype not in PRECISE or weight.dtype != x_TD.dtype:
        return "for processors, in float32 or wider, only"
    if weight.layout is not torch.strided:
        return "the base weight is sparse"
    if not pays(arguments, weight):
        return "so few tokens that delta first is faster"
    if arguments.keeps and backend_torch.differentiates_itself(arguments):
        return "so small a layer that torch's own differentiation is as fast"
    return None


def _merged(arguments: Arguments) -> Tensor:
    """Return W + gain · BᵀA ``[E, D]``: a copy, row-major if W is contiguous."""
    weight, gain = arguments.weight, arguments.gain
    if weight is None:
        raise ValueError("a delta alone cannot be merged")
    a_SD, b_SE = backend_torch.select(arguments)
    if isinstance(gain, Tensor):
        a_SD, gain = (a_SD * gain.reshape(-1, 1)).to(a_SD.dtype), 1.0
    if weight.is_contiguous():
        return torch.addmm(weight, b_SE.t(), a_SD, alpha=gain)
    return torch.addmm(weight.t(), a_SD.t(), b_SE, alpha=gain).t()


def forward(arguments: Arguments) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return y ``[T, E]`` and h ``[T, S]``, the latter times the gain, as the backward wants it."""
    x_TD, bias = arguments.x, arguments.bias
    w_DE = _merged(arguments).t()
    y_TE = backend_torch.multiply(x_TD, w_DE, None if bias is None else bias.to(x_TD.dtype))
    if not (arguments.keeps and arguments.lora_b.requires_grad):
        return y_TE, (backend_torch.UNREAD[x_TD.dtype],)
    a_SD, _ = backend_torch.select(arguments)
    return y_TE, (backend_torch.shrink(x_TD, a_SD, arguments.gain),)


def backward(
    arguments: Arguments,
    kept: tuple[Tensor, ...],
    dy_TE: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B (those that ``needs`` asks for)."""
    needs_x, needs_a, needs_b = needs
    _, da, db = backend_torch.backward(arguments, kept, dy_TE, (False, needs_a, needs_b))
    return backend_torch.multiply(dy_TE, _merged(arguments)) if needs_x else None, da, db
