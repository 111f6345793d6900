"""Autograd, the choice of a backend, and what the operation costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fslora_kernels import _dispatch
from fslora_kernels._autograd import first_order, fresh_unrows, rows, unrows, without_values
from fslora_kernels._recompute import Recipe, made, recipe
from fslora_kernels.ops.sketched_linear import backend_torch


@dataclass(slots=True)  # frozen, it would take five times as long to make, twice a step
class Arguments:
    """One call, checked: what a backend gets.

    Attributes:
        x: ``[T, D]``, in the dtype that the products are computed in.
        weight: ``[E, D]``, or None for the delta alone.
        lora_a: ``[R, D]``; may be of another dtype than x.
        lora_b: ``[R, E]``, rank-major, any strides; may be of another dtype than x.
        index: int64 ``[S]``, ascending, or None for all ranks.
        bias: ``[E]`` or None.
        gain: the scale, times the rank weights where there are any: a number, ``[]`` or ``[S]``.
        dropout: probability of dropping an input feature of the adapter.
        seed: of the dropout mask; None only inside ``torch.compile``: torch's own generator.
        keeps: whether a backward pass may follow.
    """

    x: Tensor
    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    index: Tensor | None
    bias: Tensor | None
    gain: float | Tensor
    dropout: float
    seed: int | None
    keeps: bool = True

    @property
    def dropped(self) -> int:
        """Which of the ``MASK_STEPS`` values of a random number drop a feature: those below it."""
        return min(round(self.dropout * MASK_STEPS), MASK_STEPS - 1)

    @property
    def kept_gain(self) -> float | Tensor:
        """The gain, times what makes up for dropped features: both scale h and dh."""
        if not self.dropout:
            return self.gain
        return self.gain * (MASK_STEPS / (MASK_STEPS - self.dropped))


class Backend(Protocol):
    """What a backend module offers."""

    def refuses(self, arguments: Arguments, /) -> str | None:
        """Why it cannot run this call, or None."""

    def forward(self, arguments: Arguments) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return y ``[T, E]``, and what the backward pass wants to keep beside the arguments.

        y is contiguous. First among what is kept is h, which only the gradient of B needs; it may
        have no values where B needs none or the arguments keep nothing.
        """

    def backward(
        self,
        arguments: Arguments,
        kept: tuple[Tensor, ...],
        dy_TE: Tensor,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, A and B, in the shapes of the arguments.

        Where A's is not needed, x has no values; where B's is not, h has none.
        """


# Ranks that the kernels compute with: the next of these, or themselves above the last.
PADDED_RANKS = (16, 32, 64, 128)

MASK_STEPS = 2**16  # values of the random number that decides on one feature

# Best first: "auto" takes the first that does not refuse. Nobody asks for "merged" by its name:
# "torch" never merges.
BACKENDS = {
    "triton": "fslora_kernels.ops.sketched_linear.backend_triton",
    "merged": "fslora_kernels.ops.sketched_linear.backend_merged",
    "torch": "fslora_kernels.ops.sketched_linear.backend_torch",
}


def backend(name: str) -> Backend:
    """Return a backend by its name."""
    loaded: Backend = _dispatch.load(BACKENDS[name])
    return loaded


def choose(arguments: Arguments, requested: str | None) -> _dispatch.Choice:
    """Choose the backend for a call: see ``_dispatch.choose``."""
    return _dispatch.choose(BACKENDS, arguments, arguments.x.device.type, requested)


def compute(
    x: Tensor, arguments: Arguments, requested: str | None, *, recompute: bool = False
) -> Tensor:
    """Run one call on the backend that is chosen for it: ``[..., E]``, differentiable.

    The arguments' x are the rows of x. With ``recompute`` they are made again in the backward pass,
    if they can be.
    """
    implementation = _dispatch.first(BACKENDS, arguments, arguments.x.device.type, requested)
    again = recipe(x) if recompute and arguments.keeps else None
    if (
        again is None
        and implementation == "torch"
        and backend_torch.differentiates_itself(arguments)
    ):
        return unrows(backend_torch.differentiable(arguments), x)
    if not arguments.keeps and forward_ad._current_level < 0:
        # Nothing to differentiate: autograd's function would only take time.
        y_TE, _ = backend(implementation).forward(arguments)
        return fresh_unrows(y_TE, x)
    y: Tensor = SketchedLinear.record(
        x,
        arguments.weight,
        arguments.lora_a,
        arguments.lora_b,
        arguments.bias,
        arguments,
        implementation,
        again,
    )
    return y


def _signed(seed: int) -> int:
    """Return the 64 bits of a seed as a number with a sign."""
    return (seed + 2**63) % 2**64 - 2**63


def padded_ranks(ranks: int) -> int:
    """Return how many ranks the kernels compute with for so many selected ones."""
    return next((padded for padded in PADDED_RANKS if ranks <= padded), ranks)


class SketchedLinear(torch.autograd.Function):
    """First-order gradients for x, A, B, and for the base weight and bias where they train.

    Autograd is given x with all its dimensions: views of its own before and after this would cost
    a small layer a tenth of its time.
    """

    @classmethod
    def record(cls, *arguments: object) -> Tensor:
        """Return ``apply(*arguments)``, where none of torch.func's transforms is active.

        Torch's own checks for them cost a layer of few operations a twentieth of its time.
        """
        y: Tensor = super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]
        return y

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        arguments: Arguments,
        implementation: str,
        again: Recipe | None,
    ) -> Tensor:
        gain, dropout, seed = arguments.gain, arguments.dropout, arguments.seed
        y_TE, kept = backend(implementation).forward(arguments)
        _, needs_weight, needs_a, needs_b, *_ = ctx.needs_input_grad
        gain_tensor = gain if isinstance(gain, Tensor) else None
        # A checkpoint computes what is saved again, perhaps from another seed: it goes with h.
        # To a generator 2⁶⁴ − s is −s, which an int64 can hold.
        seed_tensor = torch.tensor(_signed(seed or 0), device="cpu") if dropout else None
        needs_values = needs_a or needs_weight
        made_of = again.tensors if needs_values and again is not None else ()
        h, *others = kept
        ctx.save_for_backward(
            arguments.x if needs_values and not made_of else None,
            weight,
            lora_a,
            lora_b,
            arguments.index,
            gain_tensor,
            seed_tensor,
            h if needs_b else None,
            *others,
            *made_of,
        )
        ctx.kept, ctx.steps = len(kept), None if again is None else again.steps
        ctx.gain = None if gain_tensor is not None else gain
        ctx.dropout, ctx.implementation = dropout, implementation
        ctx.bias_dtype = None if bias is None else bias.dtype
        return fresh_unrows(y_TE, x)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401, D102
        x_TD, weight, lora_a, lora_b, index, gain_tensor, seed_tensor, *rest = ctx.saved_tensors
        kept, made_of = tuple(rest[: ctx.kept]), tuple(rest[ctx.kept :])
        gain = ctx.gain if gain_tensor is None else gain_tensor
        seed = 0 if seed_tensor is None else int(seed_tensor)
        dy_TE = rows(dy)
        if made_of:
            x_TD = rows(made(ctx.steps, made_of))
        elif x_TD is None:
            x_TD = without_values(dy_TE, lora_a.shape[1])
        arguments = Arguments(x_TD, weight, lora_a, lora_b, index, None, gain, ctx.dropout, seed)
        needs_x, needs_weight, needs_a, needs_b, needs_bias, *_ = ctx.needs_input_grad
        dx, da, db = backend(ctx.implementation).backward(
            arguments, kept, dy_TE, (needs_x, needs_a, needs_b)
        )
        dweight = torch.mm(dy_TE.t(), x_TD).to(weight.dtype) if needs_weight else None
        dbias = dy_TE.sum(0).to(ctx.bias_dtype) if needs_bias else None
        return (None if dx is None else unrows(dx, dy)), dweight, da, db, dbias, None, None, None


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call must do and move at least.

    Attributes:
        base_flops: the bare base layer's, forward or backward (dx only, the weight is frozen).
        lora_flops: the adapter's, counting a multiply and an add as two.
        lora_bytes: device memory traffic beyond the bare base layer's, each tensor touched once
            per pass over it.
        adapter_bytes: of the selected factors.
    """

    base_flops: int
    lora_flops: int
    lora_bytes: int
    adapter_bytes: int


def cost(
    tokens: int,
    in_features: int,
    out_features: int,
    sketch_size: int,
    *,
    backward: bool = False,
    itemsize_bytes: int = 4,
    pad_ranks_to: int = 1,
) -> Cost:
    """State the floating-point operations and bytes of one call.

    Args:
        tokens: T.
        in_features: D.
        out_features: E.
        sketch_size: S.
        backward: the cost of the backward pass (dx, dA and dB) rather than the forward.
        itemsize_bytes: of one element.
        pad_ranks_to: the multiple that the implementation pads S to; 1 gives the useful cost.

    Returns:
        The cost of one call.
    """
    ranks = -(-sketch_size // pad_ranks_to) * pad_ranks_to
    features = in_features + out_features
    passes = 2 if backward else 1
    # Forward reads x and h, writes the delta. Backward reads dy for dh and dB, x for dA, writes dx.
    streams = tokens * (features + 2 * ranks + (features if backward else 0))
    return Cost(
        base_flops=2 * tokens * in_features * out_features,
        lora_flops=passes * 2 * tokens * ranks * features,
        lora_bytes=(streams + passes * ranks * features) * itemsize_bytes,
        adapter_bytes=sketch_size * features * itemsize_bytes,
    )
