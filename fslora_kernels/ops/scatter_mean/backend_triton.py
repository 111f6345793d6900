"""The operation as one Triton kernel over the inverted map: which rows belong to a rank.

One program per rank and block of features walks that rank's rows in their order and adds them in
float32: no atomics, no sorted copy of the rows, the bits of a sequential sum. Strides are not
compiled in, so that one compilation per dtype serves any strides and odd widths; the price is that
loads are one element per thread, side by side. Nothing was timed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fslora_kernels._dispatch import interpreting
from fslora_kernels.ops.scatter_mean.op import Arguments, rows_by_rank

FEATURES = 512  # of one program
WARPS = 4
STAGES = 3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(
    do_not_specialize=["features", "row_stride", "column_stride"],
    do_not_specialize_on_alignment=["rows", "order", "offsets", "denominator", "out"],
)
def scatter_mean_kernel(
    rows,  # [N, features], any strides
    order,  # int64 [N], the rows' numbers ordered by rank
    offsets,  # int64 [ranks + 1], where each rank's begin in order
    denominator,  # fp32 [ranks]
    out,  # [ranks, features], contiguous, written
    features,
    row_stride,
    column_stride,
    F: tl.constexpr,
):
    """out[r] = Σ rows of r, in their order, / denominator[r]. One program: one rank, F features."""
    rank = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1).to(tl.int64) * F + tl.arange(0, F)
    f_ok = f < features
    total = tl.zeros((F,), tl.float32)
    for position in range(tl.load(offsets + rank), tl.load(offsets + rank + 1)):
        row = tl.load(order + position)
        values = tl.load(rows + row * row_stride + f * column_stride, mask=f_ok, other=0.0)
        total += values.to(tl.float32)
    divisor = tl.load(denominator + rank)
    mean = tl.div_rn(total, tl.where(divisor == 0, 1.0, divisor))
    mean = tl.where(divisor == 0, 0.0, mean)
    tl.store(out + rank * features + f, mean.to(out.dtype.element_ty), mask=f_ok)


def _launch(kernel, grid: tuple[int, ...], like: Tensor, **arguments) -> None:
    with torch.cuda.device_of(like):
        kernel[grid](**arguments, num_warps=WARPS, num_stages=STAGES, enable_fp_fusion=True)


def refuses(arguments: Arguments) -> str | None:
    """Say why the kernel cannot run this call."""
    dtype = arguments.rows.dtype
    if dtype not in DTYPES:
        return f"rows is {dtype} and the kernel takes float32, float16 and bfloat16"
    if interpreting() and dtype == torch.bfloat16:
        return "Triton's interpreter truncates to bfloat16 rather than rounding (use float32)"
    return None


def forward(arguments: Arguments) -> Tensor:
    """Return the means ``[R, F]`` in the dtype of the rows."""
    rows, denominator = arguments.rows, arguments.denominator
    ranks, features = len(denominator), rows.shape[1]
    order, offsets = rows_by_rank(arguments)
    out_RF = torch.empty(ranks, features, dtype=rows.dtype, device=rows.device)
    _launch(
        scatter_mean_kernel,
        (ranks, -(-features // FEATURES)),
        rows,
        rows=rows,
        order=order,
        offsets=offsets,
        denominator=denominator.contiguous(),
        out=out_RF,
        features=features,
        row_stride=rows.stride(0),
        column_stride=rows.stride(1),
        F=FEATURES,
    )
    return out_RF
