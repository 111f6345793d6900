"""What a backend gets, the choice of one, and what the operation costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from fslora_kernels import _dispatch


@dataclass(frozen=True, slots=True)
class Arguments:
    """One call, checked: what a backend gets.

    Attributes:
        rows: ``[N, F]``, any strides, at least one element.
        index: int64 ``[N]``, in ``[0, R)``, any order, with repeats.
        denominator: ``[R]``, in the dtype that the rows are summed in.
    """

    rows: Tensor
    index: Tensor
    denominator: Tensor


class Backend(Protocol):
    """What a backend module offers."""

    def refuses(self, arguments: Arguments, /) -> str | None:
        """Why it cannot run this call, or None."""

    def forward(self, arguments: Arguments) -> Tensor:
        """Return the means ``[R, F]`` in the dtype of the rows."""


# Best first: "auto" takes the first that does not refuse.
BACKENDS = {
    "triton": "fslora_kernels.ops.scatter_mean.backend_triton",
    "torch": "fslora_kernels.ops.scatter_mean.backend_torch",
}


def backend(name: str) -> Backend:
    """Return a backend by its name."""
    return cast("Backend", _dispatch.load(BACKENDS[name]))


def choose(arguments: Arguments, requested: str | None) -> _dispatch.Choice:
    """Choose the backend for a call: see ``_dispatch.choose``."""
    return _dispatch.choose(BACKENDS, arguments, arguments.rows.device.type, requested)


def rows_by_rank(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Invert the map from rows to ranks, without atomics.

    Returns:
        The rows' numbers ``[N]`` ordered by rank and, within one, as they came; and where each
        rank's begin ``[R + 1]``. Both int64.
    """
    ranks, order = torch.sort(arguments.index, stable=True)
    bounds = torch.arange(len(arguments.denominator) + 1, device=ranks.device)
    return order, torch.searchsorted(ranks, bounds)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call must do and move at least.

    Attributes:
        flops: an addition per element of the rows, a division per element of the result.
        bytes: device memory traffic, each tensor touched once; the inverse map is not counted.
    """

    flops: int
    bytes: int


def cost(rows: int, features: int, size: int, *, itemsize_bytes: int = 4) -> Cost:
    """State the floating-point operations and bytes of one call.

    Args:
        rows: N, over all participants.
        features: F.
        size: R.
        itemsize_bytes: of one element of the rows.

    Returns:
        The cost of one call.
    """
    elements = (rows + size) * features
    index_and_denominator = 8 * rows + 4 * size
    return Cost(flops=elements, bytes=elements * itemsize_bytes + index_and_denominator)
