"""Autograd, the choice of a backend, and what the operation costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fslora_kernels import _dispatch
from fslora_kernels._autograd import first_order, without_values
from fslora_kernels.ops.sketched_linear.op import Cost, padded_ranks
from fslora_kernels.ops.sketched_linear.op import cost as cost_of_one


@dataclass(frozen=True, slots=True)
class Arguments:
    """One call, checked: what a backend gets.

    Attributes:
        x: ``[T, D]``, in the dtype that the products are computed in.
        weight: ``[E, D]``, or None for the delta alone.
        lora_a: ``[P, D]``, the pool's rows of A; may be of another dtype than x.
        lora_b: ``[P, E]``, the pool's columns of B as rows; may be of another dtype than x.
        index: int64 ``[ΣS]``, rows of the pool, or None: the pool's rows in their order.
        bias: ``[E]`` or None.
        gain: ``[G]``, one scale per group.
        token_offsets: group g has the tokens from its offset up to the next.
        rank_offsets: likewise its part of the index.
    """

    x: Tensor
    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    index: Tensor | None
    bias: Tensor | None
    gain: Tensor
    token_offsets: tuple[int, ...]
    rank_offsets: tuple[int, ...]

    @property
    def ranks(self) -> list[int]:
        """How many ranks each group has."""
        return [last - first for first, last in pairwise(self.rank_offsets)]


class Backend(Protocol):
    """What a backend module offers."""

    def refuses(self, arguments: Arguments, /) -> str | None:
        """Why it cannot run this call, or None."""

    def forward(self, arguments: Arguments) -> tuple[Tensor, Tensor]:
        """Return y ``[T, E]`` and the scaled h of all groups, in a layout of the backend's own."""

    def backward(
        self, arguments: Arguments, h: Tensor, dy_TE: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, A and B."""


# Best first: "auto" takes the first that does not refuse.
BACKENDS = {
    "triton": "fslora_kernels.ops.grouped_sketched_linear.backend_triton",
    "torch": "fslora_kernels.ops.grouped_sketched_linear.backend_torch",
}


def backend(name: str) -> Backend:
    """Return a backend by its name."""
    return cast("Backend", _dispatch.load(BACKENDS[name]))


def choose(arguments: Arguments, requested: str | None) -> _dispatch.Choice:
    """Choose the backend for a call: see ``_dispatch.choose``."""
    return _dispatch.choose(BACKENDS, arguments, arguments.x.device.type, requested)


class GroupedSketchedLinear(torch.autograd.Function):
    """First-order gradients for x, A, B, and for the base weight and bias where they train."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        index: Tensor | None,
        bias: Tensor | None,
        gain: Tensor,
        token_offsets: tuple[int, ...],
        rank_offsets: tuple[int, ...],
        implementation: str,
    ) -> Tensor:
        arguments = Arguments(
            x, weight, lora_a, lora_b, index, bias, gain, token_offsets, rank_offsets
        )
        y_TE, h = backend(implementation).forward(arguments)
        _, needs_weight, needs_a, *_ = ctx.needs_input_grad
        x_saved = x if needs_a or needs_weight else None
        ctx.save_for_backward(x_saved, weight, lora_a, lora_b, index, gain, h)
        ctx.offsets, ctx.implementation = (token_offsets, rank_offsets), implementation
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y_TE

    @staticmethod
    @first_order
    def backward(ctx: Any, dy_TE: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401, D102
        x, weight, lora_a, lora_b, index, gain, h = ctx.saved_tensors
        if x is None:
            x = without_values(dy_TE, lora_a.shape[1])
        arguments = Arguments(x, weight, lora_a, lora_b, index, None, gain, *ctx.offsets)
        needs_x, needs_weight, needs_a, needs_b, _, needs_bias, *_ = ctx.needs_input_grad
        dx, da, db = backend(ctx.implementation).backward(
            arguments, h, dy_TE, (needs_x, needs_a, needs_b)
        )
        dweight = torch.mm(dy_TE.t(), x).to(weight.dtype) if needs_weight else None
        dbias = dy_TE.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return dx, dweight, da, db, None, dbias, None, None, None, None


def cost(
    token_offsets: Sequence[int],
    rank_offsets: Sequence[int],
    in_features: int,
    out_features: int,
    *,
    backward: bool = False,
    itemsize_bytes: int = 4,
    padded: bool = False,
    pad_tokens_to: int = 1,
) -> Cost:
    """State the floating-point operations and bytes of one call.

    Args:
        token_offsets: as in ``grouped_sketched_linear``.
        rank_offsets: likewise.
        in_features: D.
        out_features: E.
        backward: the cost of the backward pass (dx, dA and dB) rather than the forward.
        itemsize_bytes: of one element.
        padded: count the ranks of every group as the kernels pad them; False is the useful cost.
        pad_tokens_to: rows of a token tile, which no two groups share; 1 for the useful cost.

    Returns:
        The cost of one call: the base layer's over the batch as it is, and the sum of the
        adapters'. Rank rows that two groups share are counted for both.
    """
    lora_flops = lora_bytes = 0
    for (first, last), (first_rank, last_rank) in zip(
        pairwise(token_offsets), pairwise(rank_offsets), strict=True
    ):
        if first == last:
            continue
        ranks = last_rank - first_rank
        one = cost_of_one(
            -(-(last - first) // pad_tokens_to) * pad_tokens_to,
            in_features,
            out_features,
            padded_ranks(ranks) if padded else ranks,
            backward=backward,
            itemsize_bytes=itemsize_bytes,
        )
        lora_flops += one.lora_flops
        lora_bytes += one.lora_bytes
    return Cost(
        base_flops=2 * token_offsets[-1] * in_features * out_features,
        lora_flops=lora_flops,
        lora_bytes=lora_bytes,
        adapter_bytes=rank_offsets[-1] * (in_features + out_features) * itemsize_bytes,
    )
