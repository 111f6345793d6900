"""Triton kernels in which every program works for one group, told which by a map.

They differ from those of ``_tiles``, whose letters and conventions they follow, in where a program
finds its rows: not in its number, but in one row of an int32 map that the host laid out
(``plan``), so that no tile crosses a group and groups without tokens have no program.
"""

import triton
import triton.language as tl

from fslora_kernels._tiles import activation_tile, factor_tile, rank_rows


@triton.jit(
    do_not_specialize=["u_row", "u_column", "v_row", "v_column"],
    do_not_specialize_on_alignment=["index", "gain", "bias", "tile_map"],
)
def grouped_apply_kernel(
    x,  # [tokens, features_in], row stride x_row
    u,  # [pool, features_in], any strides
    v,  # [pool, features_out], any strides; None without EXPAND
    index,  # int64 [ranks of all groups], or None
    gain,  # fp32 [groups]
    bias,  # [features_out], or None
    h,  # [tokens of all tiles, P], written
    y,  # [tokens, features_out], written; None without EXPAND
    tile_map,  # int32 [tiles, 6]: group, first and end row of x, row of h, first rank, ranks
    features_in,
    features_out,
    x_row,
    u_row,
    u_column,
    v_row,
    v_column,
    T: tl.constexpr,
    F: tl.constexpr,
    P: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    EXPAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h = gain · x u[index]ᵀ, rounded and kept; y = h v[index] + bias. One program, one tile."""
    tile = tile_map + tl.program_id(0) * 6
    t = tl.load(tile + 1).to(tl.int64) + tl.arange(0, T)
    t_ok = t < tl.load(tile + 2)
    shift = tl.load(tile + 3) - tl.load(tile + 1)
    s = tl.arange(0, P)
    exists = s < tl.load(tile + 5)
    rows = rank_rows(index, tl.load(tile + 4) + s, exists, HAS_INDEX)
    sum_TP = tl.zeros((T, P), tl.float32)
    for start in range(0, features_in, F):
        f = start + tl.arange(0, F)
        f_ok = f < features_in
        x_TF = activation_tile(x, t, t_ok, x_row, f, f_ok)
        u_PF = factor_tile(u, rows, exists, u_row, f, f_ok, u_column, ROWS)
        sum_TP = tl.dot(x_TF, tl.trans(u_PF.to(x_TF.dtype)), sum_TP, input_precision=PRECISION)
    sum_TP *= tl.load(gain + tl.load(tile))
    h_TP = sum_TP.to(h.dtype.element_ty)
    t_h = t + shift
    tl.store(h + t_h[:, None] * P + s[None, :], h_TP, mask=t_ok[:, None])
    if EXPAND:
        for start in range(0, features_out, F):
            g = start + tl.arange(0, F)
            g_ok = g < features_out
            v_PG = factor_tile(v, rows, exists, v_row, g, g_ok, v_column, ROWS)
            y_TG = tl.dot(h_TP, v_PG.to(h_TP.dtype), input_precision=PRECISION)
            if HAS_BIAS:
                y_TG += tl.load(bias + g, mask=g_ok, other=0.0).to(tl.float32)[None, :]
            tl.store(
                y + t[:, None] * features_out + g[None, :],
                y_TG.to(y.dtype.element_ty),
                mask=t_ok[:, None] & g_ok[None, :],
            )


@triton.jit(do_not_specialize_on_alignment=["split_map"])
def grouped_wgrad_kernel(
    p,  # [tokens of all splits, P]
    x,  # [tokens, features], row stride x_row
    partial,  # fp32 [partial rows, features], written
    split_map,  # int32 [splits, 5]: first and end row of x, row of p, first partial row, ranks
    features,
    x_row,
    T: tl.constexpr,
    F: tl.constexpr,
    P: tl.constexpr,
    FEATURES_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split's share of its group's pᵀ x. One program: F features, one split."""
    f = tl.program_id(0) * F + tl.arange(0, F)
    f_ok = f < features
    s = tl.arange(0, P)
    split = split_map + tl.program_id(1) * 5
    first = tl.load(split).to(tl.int64)
    last = tl.load(split + 1).to(tl.int64)
    shift = tl.load(split + 2) - first
    # The large side goes first where the matrix unit wants 64 rows or more (wgmma, tcgen05).
    total = tl.zeros((F, P) if FEATURES_FIRST else (P, F), tl.float32)
    for start in range(first, last, T):
        t = (start + tl.arange(0, T)).to(tl.int64)
        t_ok = t < last
        x_TF = activation_tile(x, t, t_ok, x_row, f, f_ok)
        p_TP = tl.load(p + (t + shift)[:, None] * P + s[None, :], mask=t_ok[:, None], other=0.0)
        if FEATURES_FIRST:
            total = tl.dot(tl.trans(x_TF), p_TP, total, input_precision=PRECISION)
        else:
            total = tl.dot(tl.trans(p_TP), x_TF, total, input_precision=PRECISION)
    if FEATURES_FIRST:
        total = tl.trans(total)
    row = tl.load(split + 3).to(tl.int64) + s
    tl.store(
        partial + row[:, None] * features + f[None, :],
        total,
        mask=(s < tl.load(split + 4))[:, None] & f_ok[None, :],
    )


@triton.jit(do_not_specialize_on_alignment=["order", "starts", "parts"])
def grouped_reduce_kernel(
    partial,  # fp32 [partial rows, features]
    order,  # int64 [ranks of all groups], their places in the index sorted by pool row
    starts,  # int64 [pool + 1], where in the order each pool row begins
    parts,  # int32 [ranks of all groups, 3]: first partial row, rows to the next split, splits
    out,  # fp32 [pool, features], written
    features,
    F: tl.constexpr,
):
    """Sum what all groups have for one pool row, group by group and split by split."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * F + tl.arange(0, F)
    f_ok = f < features
    total = tl.zeros((F,), tl.float32)
    for hit in range(tl.load(starts + row), tl.load(starts + row + 1)):
        place = tl.load(order + hit)
        source = tl.load(parts + place * 3).to(tl.int64)
        step = tl.load(parts + place * 3 + 1)
        for _ in range(tl.load(parts + place * 3 + 2)):
            total += tl.load(partial + source * features + f, mask=f_ok, other=0.0)
            source += step
    tl.store(out + row * features + f, total, mask=f_ok)
