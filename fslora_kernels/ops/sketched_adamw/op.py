"""The rule, what a backend gets, the choice of one, and what the operation costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from fslora_kernels import _dispatch


@dataclass(frozen=True, slots=True)
class Rule:
    """AdamW's settings, checked.

    Attributes:
        lr: the learning rate.
        betas: decay of the first and second moment per step.
        eps: added to the root of the second moment.
        weight_decay: decoupled: a selected row loses lr · weight_decay of itself.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    def __post_init__(self) -> None:
        """Refuse what is no number of its kind."""
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, Tensor) or not 0.0 <= value < math.inf:
                raise ValueError(f"{name} must be a number that is not negative, got {value}")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")

    @property
    def kept(self) -> float:
        """The share of itself that a selected row keeps when it decays."""
        return 1.0 - self.lr * self.weight_decay

    @property
    def log_betas(self) -> tuple[float, float]:
        """Their logarithms: 1 − betaᵗ is −expm1(t · log beta), accurate for any t."""
        first, second = (math.log(beta) if beta else -math.inf for beta in self.betas)
        return first, second


@dataclass(frozen=True, slots=True)
class Arguments:
    """One call, checked: what a backend gets.

    Attributes:
        parameter: ``[R, F]``, any strides, written.
        gradient: ``[R, F]``, or the selected rows alone, ``[S, F]``; any strides.
        exp_avg: ``[R, F]``, float32 (float64 with a float64 parameter), written.
        exp_avg_sq: likewise.
        steps: int64 or float32 ``[R]``, this step counted already.
        index: int64 ``[S]``, ascending, or None for all rows.
        rule: the settings.
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: Tensor
    index: Tensor | None
    rule: Rule

    @property
    def compact(self) -> bool:
        """Whether the gradient has the selected rows alone (if those are all, it is the same)."""
        return len(self.gradient) != len(self.parameter)


class Backend(Protocol):
    """What a backend module offers."""

    def refuses(self, arguments: Arguments, /) -> str | None:
        """Why it cannot run this call, or None."""

    def update(self, arguments: Arguments) -> None:
        """Write the selected rows of the parameter and of both moments."""


# Best first: "auto" takes the first that does not refuse.
BACKENDS = {
    "triton": "fslora_kernels.ops.sketched_adamw.backend_triton",
    "torch": "fslora_kernels.ops.sketched_adamw.backend_torch",
}


def backend(name: str) -> Backend:
    """Return a backend by its name."""
    return cast("Backend", _dispatch.load(BACKENDS[name]))


def choose(arguments: Arguments, requested: str | None) -> _dispatch.Choice:
    """Choose the backend for a call: see ``_dispatch.choose``."""
    return _dispatch.choose(BACKENDS, arguments, arguments.parameter.device.type, requested)


def count_step(steps: Tensor, index: Tensor | None) -> None:
    """Add one to the step counts of the selected rows, in place."""
    if index is None:
        steps.add_(1)
    else:
        steps.index_add_(0, index, torch.ones_like(index, dtype=steps.dtype))


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call must do and move at least.

    Attributes:
        flops: every operation on an element counted as one, a root and a division too.
        bytes: device memory traffic, each tensor of the selected rows touched once per direction.
    """

    flops: int
    bytes: int


# Decay 1, first moment 3, second moment 4, denominator 3, quotient, times the step size, minus.
FLOPS_PER_ELEMENT = 14


def cost(
    sketch_size: int, features: int, *, itemsize_bytes: int = 4, moment_bytes: int = 4
) -> Cost:
    """State the floating-point operations and bytes of one call; rows not selected cost nothing.

    Args:
        sketch_size: S.
        features: F.
        itemsize_bytes: of one element of the parameter and the gradient.
        moment_bytes: of one element of a moment.

    Returns:
        The cost of one call.
    """
    elements = sketch_size * features
    # Gradient read; parameter and two moments read and written; per row a count and an index.
    per_element = 3 * itemsize_bytes + 4 * moment_bytes
    per_row = 2 * 4 + 8
    return Cost(elements * FLOPS_PER_ELEMENT, elements * per_element + sketch_size * per_row)
