"""Autograd, and what the operation costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fslora_kernels._autograd import first_order, without_values
from fslora_kernels.ops.sketched_linear.backend_torch import widen
from fslora_kernels.ops.sketched_linear.op import Cost
from fslora_kernels.ops.sketched_linear.op import cost as cost_of_one

# Weight, A, rank-major B, index and bias of one projection.
Tensors = tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True, slots=True)
class Factors:
    """The selected factors of one projection as the products want them.

    Attributes:
        a: rows of A, ``[S, D]``.
        b: rows of the rank-major B, ``[S, E]``.
        rows: where its ranks are among the hidden ranks of all projections.
    """

    a: Tensor
    b: Tensor
    rows: slice


def _grouped(flat: Sequence[Any]) -> list[Any]:
    """Put the five tensors of each projection together."""
    return list(zip(*[iter(flat)] * 5, strict=True))


def _select(projections: Sequence[Tensors], dtype: torch.dtype) -> list[Factors]:
    found, start = [], 0
    for _, a, b, index, _ in projections:
        if index is not None:
            a, b = a.index_select(0, index), b.index_select(0, index)  # noqa: PLW2901
        found.append(Factors(a.to(dtype), b.to(dtype), slice(start, start + len(a))))
        start += len(a)
    return found


def _every_a(factors: Sequence[Factors]) -> Tensor:
    return torch.cat([factor.a for factor in factors])


def _scale(hidden_ST: Tensor, factors: Sequence[Factors], scales: Sequence[float]) -> None:
    """Multiply each projection's hidden ranks by its scale, in place."""
    for factor, scale in zip(factors, scales, strict=True):
        hidden_ST[factor.rows].mul_(scale)


class SharedSketchedLinear(torch.autograd.Function):
    """First-order gradients for x, every A and B, and for weights and biases that train."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        scales: tuple[float, ...],
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        projections = _grouped(flat)
        factors = _select(projections, x.dtype)
        h_ST = torch.mm(_every_a(factors), x.t())
        _scale(h_ST, factors, scales)
        outputs = []
        for factor, (weight, _, _, _, bias) in zip(factors, projections, strict=True):
            h_TS, b = h_ST[factor.rows].t(), factor.b
            y_TE = h_TS.mm(b) if bias is None else torch.addmm(bias.to(x.dtype), h_TS, b)
            if weight is not None:
                y_TE.addmm_(x, weight.to(x.dtype).t())
            outputs.append(y_TE)
        needs = ctx.needs_input_grad[2:]
        ctx.save_for_backward(x if any(needs[0::5] + needs[1::5]) else None, h_ST, *flat)
        ctx.scales = scales
        return tuple(outputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401, D102
        x, h_ST, *flat = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        projections = _grouped(flat)
        if x is None:
            x = without_values(dys[0], projections[0][1].shape[1])
        factors = _select(projections, x.dtype)
        dh_ST = torch.empty_like(h_ST)
        for factor, dy_TE in zip(factors, dys, strict=True):
            torch.mm(factor.b, dy_TE.t(), out=dh_ST[factor.rows])
        _scale(dh_ST, factors, ctx.scales)
        da_SD = torch.mm(dh_ST, x) if any(needs[1::5]) else None
        found: list[Tensor | None] = []
        for factor, dy_TE, needed, (weight, a, b, index, bias) in zip(
            factors, dys, _grouped(needs), projections, strict=True
        ):
            needs_weight, needs_a, needs_b, _, needs_bias = needed
            db_SE = torch.mm(h_ST[factor.rows], dy_TE) if needs_b else None
            found += (
                torch.mm(dy_TE.t(), x).to(weight.dtype) if needs_weight else None,
                widen(da_SD[factor.rows], index, a) if needs_a and da_SD is not None else None,
                None if db_SE is None else widen(db_SE, index, b),
                None,
                dy_TE.sum(0).to(bias.dtype) if needs_bias else None,
            )
        dx = None
        if needs_x:
            dx = torch.mm(dh_ST.t(), _every_a(factors))
            for dy_TE, (weight, *_) in zip(dys, projections, strict=True):
                if weight is not None:
                    dx.addmm_(dy_TE, weight.to(x.dtype))
        return (dx, None, *found)


def cost(
    tokens: int,
    in_features: int,
    out_features: Sequence[int],
    sketch_sizes: Sequence[int],
    *,
    backward: bool = False,
    itemsize_bytes: int = 4,
) -> Cost:
    """State the floating-point operations and bytes of one call.

    They are those of the projections one by one, but x (and backward dx) is touched once for all.

    Args:
        tokens: T.
        in_features: D.
        out_features: E of each projection.
        sketch_sizes: S of each projection.
        backward: the cost of the backward pass rather than the forward.
        itemsize_bytes: of one element.
    """
    each = [
        cost_of_one(
            tokens, in_features, out, size, backward=backward, itemsize_bytes=itemsize_bytes
        )
        for out, size in zip(out_features, sketch_sizes, strict=True)
    ]
    passes_over_x = 2 if backward else 1
    saved = (len(each) - 1) * passes_over_x * tokens * in_features * itemsize_bytes
    return Cost(
        base_flops=sum(one.base_flops for one in each),
        lora_flops=sum(one.lora_flops for one in each),
        lora_bytes=sum(one.lora_bytes for one in each) - saved,
        adapter_bytes=sum(one.adapter_bytes for one in each),
    )
