"""The operation on torch's own matrix products: each group's delta, then one base product.

The deltas are written into their rows of one output, and the base product of the whole batch is
accumulated into it. Where groups share rank rows, their gradients are added one group after the
other, so that the sum does not depend on how a device schedules its work.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from fslora_kernels.ops.grouped_sketched_linear.op import Arguments


def refuses(_arguments: Arguments) -> str | None:
    """Torch runs everywhere."""
    return None


def _select(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return the selected rows of all groups as A ``[ΣS, D]`` and B ``[ΣS, E]``, in x's dtype."""
    a, b, index = arguments.lora_a, arguments.lora_b, arguments.index
    if index is not None:
        a, b = a.index_select(0, index), b.index_select(0, index)
    return a.to(arguments.x.dtype), b.to(arguments.x.dtype)


def _groups(arguments: Arguments, h: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield rows of x, rows of the selected factors, h ``[T, S]`` and gain ``[]`` of each group.

    Groups without tokens are left out.
    """
    start = 0
    for (first, last), (first_rank, last_rank), gain in zip(
        pairwise(arguments.token_offsets),
        pairwise(arguments.rank_offsets),
        arguments.gain.unbind(),
        strict=True,
    ):
        shape = last - first, last_rank - first_rank
        end = start + shape[0] * shape[1]
        if first < last:
            yield slice(first, last), slice(first_rank, last_rank), h[start:end].view(shape), gain
        start = end


def forward(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return y ``[T, E]`` and, flat and one group after the other, h ``[T, S]`` times the gain."""
    x_TD, bias = arguments.x, arguments.bias
    a_SD, b_SE = _select(arguments)
    tokens = (last - first for first, last in pairwise(arguments.token_offsets))
    size = sum(rows * ranks for rows, ranks in zip(tokens, arguments.ranks, strict=True))
    h = torch.empty(size, dtype=x_TD.dtype, device=x_TD.device)
    y_TE = torch.empty(x_TD.shape[0], b_SE.shape[1], dtype=x_TD.dtype, device=x_TD.device)
    bias = None if bias is None else bias.to(x_TD.dtype)
    for rows, ranks, h_TS, gain in _groups(arguments, h):
        torch.mm(x_TD[rows], a_SD[ranks].t(), out=h_TS).mul_(gain)
        if bias is None:
            torch.mm(h_TS, b_SE[ranks], out=y_TE[rows])
        else:
            torch.addmm(bias, h_TS, b_SE[ranks], out=y_TE[rows])
    if arguments.weight is not None:
        y_TE.addmm_(x_TD, arguments.weight.to(x_TD.dtype).t())
    return y_TE, h


def backward(
    arguments: Arguments, h: Tensor, dy_TE: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B (those that ``needs`` asks for).

    A and B's gradients have the pool's shapes: rows outside the index are zero.
    """
    needs_x, needs_a, needs_b = needs
    x_TD, lora_a, lora_b = arguments.x, arguments.lora_a, arguments.lora_b
    a_SD, b_SE = _select(arguments)
    dx = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) if needs_x else None
    da = _zero_sum(lora_a) if needs_a else None
    db = _zero_sum(lora_b) if needs_b else None
    for rows, ranks, h_TS, gain in _groups(arguments, h):
        if db is not None:
            _add(db, arguments.index, ranks, torch.mm(h_TS.t(), dy_TE[rows]))
        if da is None and dx is None:
            continue
        dh_TS = torch.mm(dy_TE[rows], b_SE[ranks].t()).mul_(gain)
        if da is not None:
            _add(da, arguments.index, ranks, torch.mm(dh_TS.t(), x_TD[rows]))
        if dx is not None:
            torch.mm(dh_TS, a_SD[ranks], out=dx[rows])
    if dx is not None and arguments.weight is not None:
        dx.addmm_(dy_TE, arguments.weight.to(x_TD.dtype))
    da = None if da is None else da.to(lora_a.dtype)
    db = None if db is None else db.to(lora_b.dtype)
    return dx, da, db


def _zero_sum(pool: Tensor) -> Tensor:
    """Return zeros of the pool's shape, in a dtype in which groups can be added up."""
    dtype = torch.promote_types(pool.dtype, torch.float32)
    return torch.zeros(pool.shape, dtype=dtype, device=pool.device)


def _add(total: Tensor, index: Tensor | None, ranks: slice, rows: Tensor) -> None:
    """Add one group's gradient rows; it selects no row twice, so the sum has one order."""
    rows = rows.to(total.dtype)
    if index is None:
        total[ranks] = rows
    else:
        total.index_add_(0, index[ranks], rows)
