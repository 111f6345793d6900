"""The operation inside a graph of ``torch.compile``, or a transform of ``torch.func``.

Torch's products are traced as they are: the compiler differentiates them and fuses what lies around
them. Triton kernels, where they are asked for, stay one opaque operator forward and one backward,
so that their launches see real tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fslora_kernels.ops.sketched_linear import backend_torch, op


def traceable(arguments: op.Arguments, requested: str | None) -> Tensor:
    """Return y ``[T, E]``, differentiable, without anything that breaks a graph.

    A seed of None, here, is torch's own generator, which a compiler knows how to replay.
    """
    if requested != "triton":
        return backend_torch.differentiable(arguments)
    constant = not isinstance(arguments.gain, Tensor)
    seed = arguments.seed
    seed_tensor = (
        torch.randint(2**62, (), device="cpu") if seed is None else torch.tensor(seed, device="cpu")
    )
    y_TE: Tensor = _forward(
        arguments.x,
        arguments.weight,
        arguments.lora_a,
        arguments.lora_b,
        arguments.index,
        arguments.bias,
        None if constant else arguments.gain,
        arguments.gain if constant else 1.0,
        arguments.dropout,
        seed_tensor,
    )[0]
    return y_TE


@torch.library.custom_op("fslora_kernels::sketched_linear", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    index: Tensor | None,
    bias: Tensor | None,
    gain: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, h and the dropout mask (without elements where nothing is dropped)."""
    arguments = op.Arguments(
        x,
        weight,
        lora_a,
        lora_b,
        index,
        bias,
        scale if gain is None else gain * scale,
        dropout,
        int(seed),
    )
    op.choose(arguments, "triton")
    y_TE, (h, *mask) = op.backend("triton").forward(arguments)
    return y_TE, h, mask[0] if mask else x.new_empty(0, dtype=torch.uint8)


@_forward.register_fake
def _(
    x: Tensor,
    _weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    index: Tensor | None,
    _bias: Tensor | None,
    _gain: Tensor | None,
    _scale: float,
    dropout: float,
    _seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, features = x.shape
    ranks = lora_a.shape[0] if index is None else index.shape[0]
    mask = (tokens, (features + 7) // 8) if dropout else (0,)
    return (
        x.new_empty(tokens, lora_b.shape[1]),
        x.new_empty(tokens, op.padded_ranks(ranks)),
        x.new_empty(mask, dtype=torch.uint8),
    )


@torch.library.custom_op("fslora_kernels::sketched_linear_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    index: Tensor | None,
    gain: Tensor | None,
    h: Tensor,
    mask: Tensor,
    scale: float,
    dropout: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, A and B; those that are not needed have no elements."""
    gain_or_scale = scale if gain is None else gain * scale
    arguments = op.Arguments(x, weight, lora_a, lora_b, index, None, gain_or_scale, dropout, 0)
    kept = (h, mask) if dropout else (h,)
    needs_x, needs_a, needs_b = needs
    found = op.backend("triton").backward(arguments, kept, dy, (needs_x, needs_a, needs_b))
    dx, da, db = (x.new_empty(0) if gradient is None else gradient for gradient in found)
    return dx, da, db


@_backward.register_fake
def _(
    _dy: Tensor,
    x: Tensor,
    _weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    _index: Tensor | None,
    _gain: Tensor | None,
    _h: Tensor,
    _mask: Tensor,
    _scale: float,
    _dropout: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    needs_x, needs_a, needs_b = needs
    dx = x.new_empty(x.shape if needs_x else 0)  # contiguous, whatever the strides of x
    da, db = (
        torch.empty_like(factor) if needed else x.new_empty(0)
        for factor, needed in ((lora_a, needs_a), (lora_b, needs_b))
    )
    return dx, da, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    x, weight, lora_a, lora_b, index, bias, gain, scale, dropout, _ = inputs
    _, h, mask = output
    ctx.save_for_backward(x, weight, lora_a, lora_b, index, gain, h, mask)
    ctx.scale, ctx.dropout = scale, dropout
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    x, weight, lora_a, lora_b, index, gain, h, mask = ctx.saved_tensors
    needs_x, needs_weight, needs_a, needs_b, _, needs_bias, *_ = ctx.needs_input_grad
    needs = [needs_x, needs_a, needs_b]
    found = _backward(
        dy, x, weight, lora_a, lora_b, index, gain, h, mask, ctx.scale, ctx.dropout, needs
    )
    dx, da, db = (
        gradient if needed else None for gradient, needed in zip(found, needs, strict=True)
    )
    dweight = torch.mm(dy.t(), x).to(weight.dtype) if needs_weight else None
    dbias = dy.sum(0).to(ctx.bias_dtype) if needs_bias else None
    return dx, dweight, da, db, None, dbias, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)
