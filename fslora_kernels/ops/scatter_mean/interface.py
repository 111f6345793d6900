"""The public function: checks, the denominator, dispatch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fslora_kernels.ops.scatter_mean.op import Arguments, backend, choose
from fslora_kernels.weights import check_devices


def scatter_mean(
    rows: Tensor,
    index: Tensor,
    size: int,
    *,
    denominator: float | Tensor,
    implementation: str | None = None,
) -> Tensor:
    """Sum the rows of each rank and divide by the denominator.

    The rows of one rank are added one after the other in the order in which they come, in float32
    (float64 rows in float64), and the mean is rounded once: every implementation gives the bits of
    that sequential sum, in every run and on every device. There is no gradient.

    Args:
        rows: ``[N, F]``, any strides: the compact rows of all participants, one participant below
            the other in task order. N may be 0.
        index: int64 ``[N]``: the rank that each row belongs to, in any order and with repeats.
        size: R, the number of ranks of the result.
        denominator: the number of participants, or ``[R]``, one weight per rank; where that is 0
            the result is 0.
        implementation: "torch", "triton", or None for "auto".

    Returns:
        ``[R, F]`` in the dtype of the rows; zero in ranks that no row belongs to.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, an index is out of range (on a
            GPU this check waits for the device), a denominator that is a number is not positive,
            or a tensor requires gradients.
        NotImplementedError: the requested implementation cannot run this call.

    Example:
        >>> rows = torch.tensor([[1.0, 1.0], [3.0, 5.0], [2.0, 2.0]])
        >>> scatter_mean(rows, torch.tensor([0, 2, 0]), 3, denominator=2)
        tensor([[1.5000, 1.5000],
                [0.0000, 0.0000],
                [1.5000, 2.5000]])

    Source: arXiv 2501.19389, the server update X ← X + (1/N) Σᵢ Δᵢ on compact changes.
    """
    _check(rows, index, size, denominator)
    accumulated = torch.promote_types(rows.dtype, torch.float32)
    if isinstance(denominator, Tensor):
        divisor = denominator.to(accumulated)
    else:
        divisor = torch.full((size,), denominator, dtype=accumulated, device=rows.device)
    arguments = Arguments(rows, index, divisor)
    choice = choose(arguments, implementation)
    if rows.numel() == 0:
        return rows.new_zeros(size, rows.shape[1])
    return backend(choice.implementation).forward(arguments)


def _check(rows: Tensor, index: Tensor, size: int, denominator: float | Tensor) -> None:
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(
            f"rows must be [N, F] of a floating-point dtype, got {rows.dtype} {tuple(rows.shape)}"
        )
    if index.dtype != torch.int64 or index.shape != rows.shape[:1]:
        raise ValueError(
            f"index must be int64 [{rows.shape[0]}], one rank per row, got {index.dtype} "
            f"{tuple(index.shape)}"
        )
    if size < 1:
        raise ValueError(f"size must be at least 1, the number of ranks, got {size}")
    if isinstance(denominator, Tensor):
        if denominator.shape != (size,):
            raise ValueError(
                f"denominator must be a number or a tensor [{size}], one weight per rank, got "
                f"{tuple(denominator.shape)}"
            )
    elif not (math.isfinite(denominator) and denominator > 0):
        raise ValueError(
            f"denominator must be positive, the number of participants, got {denominator}; with no "
            "participant there is nothing to average"
        )
    _check_tensors(rows, index, denominator)
    if index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"index reaches from {low} to {high}, but the result has the ranks 0 to {size - 1}"
            )


def _check_tensors(rows: Tensor, index: Tensor, denominator: float | Tensor) -> None:
    weights = denominator if isinstance(denominator, Tensor) else None
    check_devices(rows.device, "rows", index=index, denominator=weights)
    for name, tensor in (("rows", rows), ("denominator", weights)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"scatter_mean has no gradient; pass {name}.detach()")
