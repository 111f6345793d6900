"""The operation in torch: deterministic on every device.

On a CPU ``index_add_`` adds row after row. On a GPU it would add with atomics, in whatever order:
there the rows are sorted by rank, stably, and ``segment_reduce`` adds each rank's in their order,
one thread per element of the result. That costs a sorted copy of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fslora_kernels.ops.scatter_mean.op import Arguments, rows_by_rank


def refuses(_arguments: Arguments) -> str | None:
    """Torch runs everywhere."""
    return None


def forward(arguments: Arguments) -> Tensor:
    """Return the means ``[R, F]`` in the dtype of the rows."""
    on_cpu = arguments.rows.device.type == "cpu"
    total_RF = sum_in_place(arguments) if on_cpu else sum_sorted(arguments)
    divisor_R1 = arguments.denominator[:, None]
    return total_RF.div_(divisor_R1).masked_fill_(divisor_R1 == 0, 0.0).to(arguments.rows.dtype)


def sum_in_place(arguments: Arguments) -> Tensor:
    """Add row after row into its rank: ``[R, F]`` in the denominator's dtype. CPU only."""
    rows, denominator = arguments.rows, arguments.denominator
    total_RF = denominator.new_zeros(len(denominator), rows.shape[1])
    return total_RF.index_add_(0, arguments.index, rows.to(denominator.dtype))


def sum_sorted(arguments: Arguments) -> Tensor:
    """Sort the rows by rank and add each rank's in their order; the same bits on any device."""
    order, offsets = rows_by_rank(arguments)
    rows = arguments.rows.index_select(0, order).to(arguments.denominator.dtype)
    return torch.segment_reduce(rows, "sum", offsets=offsets, initial=0, unsafe=True)
