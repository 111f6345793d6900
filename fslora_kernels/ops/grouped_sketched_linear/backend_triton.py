"""The operation on Triton kernels: one launch for all groups of as many (padded) ranks.

The kernels are those of ``sketched_linear`` with one indirection: a program finds its group and
its rows in a map (``plan``). Groups are sorted into buckets by their padded ranks, so that the
arithmetic follows each group's ranks, not the largest. The base product is torch's, over the whole
batch, accumulated in place onto the deltas. Weight gradients are summed per group over splits of a
fixed length, and per row of the pool over the groups, in their order and without atomics.

What it saves is launches, and copies of the selected factors. No speed is claimed: nothing was
timed, and the tiles were chosen by ahead-of-time compilation for ``sketched_linear``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fslora_kernels import _launch
from fslora_kernels._dispatch import interpreting
from fslora_kernels.ops.grouped_sketched_linear.backend_triton_kernels import (
    grouped_apply_kernel,
    grouped_reduce_kernel,
    grouped_wgrad_kernel,
)
from fslora_kernels.ops.grouped_sketched_linear.configurations import (
    REDUCE,
    TILES,
    apply_constants,
    wgrad_constants,
)
from fslora_kernels.ops.grouped_sketched_linear.op import Arguments
from fslora_kernels.ops.grouped_sketched_linear.plan import Bucket, Plan, plan
from fslora_kernels.ops.sketched_linear.op import PADDED_RANKS


def _planned(arguments: Arguments) -> tuple[Plan, str, str]:
    """Return the plan, the target and the arithmetic."""
    x_TD = arguments.x
    target, _ = _launch.target_of(x_TD.device)
    arithmetic = _launch.arithmetic_of(x_TD.dtype, target)
    tiles = TILES["apply", target, arithmetic]
    tile_tokens = tuple(tiles[padded].tokens for padded in PADDED_RANKS)
    offsets = arguments.token_offsets, arguments.rank_offsets
    return plan(*offsets, tile_tokens, x_TD.device), target, arithmetic


def _rows_of(h: Tensor, bucket: Bucket) -> Tensor:
    size = bucket.tokens * bucket.padded
    return h[bucket.h_start : bucket.h_start + size].view(bucket.tokens, bucket.padded)


def _apply(
    arguments: Arguments,
    x_TF: Tensor,
    u_RF: Tensor,
    v_RG: Tensor | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return h = gain · x u[I]ᵀ of all buckets, flat, and y = h v[I] + bias (None without v)."""
    planned, target, arithmetic = _planned(arguments)
    (tokens, features_in), features_out = x_TF.shape, 0 if v_RG is None else v_RG.shape[1]
    h = torch.empty(planned.h_size, dtype=x_TF.dtype, device=x_TF.device)
    y_TG = None
    if v_RG is not None:
        y_TG = torch.empty(tokens, features_out, dtype=x_TF.dtype, device=x_TF.device)
    if not tokens:
        return h, y_TG
    x_TF, x_row = _launch.rows(x_TF)
    u_row, u_column, rows = _launch.strides(u_RF)
    v_row, v_column, v_rows = (0, 0, rows) if v_RG is None else _launch.strides(v_RG)
    if rows != v_rows:  # in the interpreter only: both as general strides
        rows = False
        (u_row, u_column), (v_row, v_column) = u_RF.stride(), v_RG.stride()
    index = arguments.index
    index = None if index is None else index.contiguous()
    gain = arguments.gain.to(torch.float32).contiguous()
    bias = None if bias is None else bias.to(x_TF.dtype).contiguous()
    for bucket in planned.buckets:
        tiles = TILES["apply", target, arithmetic][bucket.padded]
        constants = apply_constants(
            tiles,
            bucket.padded,
            arithmetic,
            has_index=index is not None,
            has_bias=bias is not None,
            rows=rows,
            expand=v_RG is not None,
        )
        _launch.launch(
            grouped_apply_kernel,
            (len(bucket.tiles),),
            tiles,
            x_TF,
            x=x_TF,
            u=u_RF,
            v=v_RG,
            index=index,
            gain=gain,
            bias=bias,
            h=_rows_of(h, bucket),
            y=y_TG,
            tile_map=bucket.tiles,
            features_in=features_in,
            features_out=features_out,
            x_row=x_row,
            u_row=u_row,
            u_column=u_column,
            v_row=v_row,
            v_column=v_column,
            **constants,
        )
    return h, y_TG


def _places(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Invert the index: its places sorted by pool row, then group; where each row's begin."""
    index = arguments.index
    every = torch.arange(arguments.lora_a.shape[0] + 1, device=arguments.x.device)
    if index is None:
        return every, every
    rows, order = torch.sort(index, stable=True)
    return order, torch.searchsorted(rows, every)


def _wgrad(
    arguments: Arguments,
    h: Tensor,
    x_TF: Tensor,
    factor_RF: Tensor,
    places: tuple[Tensor, Tensor],
) -> Tensor:
    """Return hᵀ x of every group, added up in the rows of a matrix of the pool's shape."""
    planned, target, arithmetic = _planned(arguments)
    pool, features = factor_RF.shape
    device = x_TF.device
    partial = torch.empty(planned.partial_rows, features, dtype=torch.float32, device=device)
    if planned.buckets:
        x_TF, x_row = _launch.rows(x_TF)
    for bucket in planned.buckets:
        tiles = TILES["wgrad", target, arithmetic][bucket.padded]
        _launch.launch(
            grouped_wgrad_kernel,
            (-(-features // tiles.features), len(bucket.splits)),
            tiles,
            x_TF,
            p=_rows_of(h, bucket),
            x=x_TF,
            partial=partial,
            split_map=bucket.splits,
            features=features,
            x_row=x_row,
            **wgrad_constants(tiles, bucket.padded, arithmetic),
        )
    out_RF = torch.empty(pool, features, dtype=torch.float32, device=device)
    order, starts = places
    _launch.launch(
        grouped_reduce_kernel,
        (pool, -(-features // REDUCE.features)),
        REDUCE,
        x_TF,
        partial=partial,
        order=order,
        starts=starts,
        parts=planned.parts,
        out=out_RF,
        features=features,
        F=REDUCE.features,
    )
    return out_RF.to(factor_RF.dtype)


def refuses(arguments: Arguments) -> str | None:
    """Say why the kernels cannot, or should not, run this call."""
    x_TD, lora_a, lora_b = arguments.x, arguments.lora_a, arguments.lora_b
    reason = _launch.refuses(x_TD, lora_a, lora_b, max(arguments.ranks), "a group")
    if reason is not None or interpreting():
        return reason
    return _launch.unknown_target(x_TD.device, TILES) or _refuses_factors(arguments)


def _refuses_factors(arguments: Arguments) -> str | None:
    unit = _launch.ALIGNMENT
    for name, factor in (("lora_a", arguments.lora_a), ("lora_b", arguments.lora_b)):
        features = factor.shape[1]
        if features == 0 or features % unit:
            return (
                f"in_features and out_features must be multiples of {unit}, else the kernels "
                f"spill registers, but {name} has {features}"
            )
        if not _launch.strides(factor)[2]:
            return f"{name}'s rows are not contiguous and aligned; pass {name}.contiguous()"
        if factor.data_ptr() % unit:
            return f"{name} does not start at a multiple of {unit} bytes; pass {name}.clone()"
    return None


def forward(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Return y ``[T, E]``, and h times the gain, flat: each bucket's ``[T, P]`` in turn."""
    x_TD = arguments.x
    h, y_TE = _apply(arguments, x_TD, arguments.lora_a, arguments.lora_b, arguments.bias)
    if arguments.weight is not None:
        y_TE.addmm_(x_TD, arguments.weight.to(x_TD.dtype).t())
    return y_TE, h


def backward(
    arguments: Arguments, h: Tensor, dy_TE: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B (those that ``needs`` asks for).

    A and B's gradients have the pool's shapes; rows outside the index are zero.
    """
    needs_x, needs_a, needs_b = needs
    lora_a, lora_b = arguments.lora_a, arguments.lora_b
    places = _places(arguments) if needs_a or needs_b else None
    dx = da = db = None
    if dy_TE.shape[0]:
        dy_TE, _ = _launch.rows(dy_TE)
    if needs_b:
        db = _wgrad(arguments, h, dy_TE, lora_b, places)
    if not (needs_x or needs_a):
        return dx, da, db
    dh, dx = _apply(arguments, dy_TE, lora_b, lora_a if needs_x else None)
    if needs_a:
        da = _wgrad(arguments, dh, arguments.x, lora_a, places)
    if needs_x and arguments.weight is not None:
        dx.addmm_(dy_TE, arguments.weight.to(dy_TE.dtype))
    return dx, da, db
