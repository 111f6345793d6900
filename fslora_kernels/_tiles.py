"""Triton kernels on tiles of activations and of gathered rank rows, shared by the operations.

Letters: T tokens, F features streamed in, G features streamed out, P the ranks padded to a power of
two of at least 16 (what a matrix unit needs). Every offset that is multiplied by a row stride is
64-bit. Arguments whose values would otherwise each ask for a kernel of their own (counts, factor
strides) are not specialised on, so that the compiled set is exactly what ``variants`` enumerates.
"""

import triton
import triton.language as tl

# Strides of contiguous factor rows come in this unit, so that their alignment stays visible.
ROW_UNIT = tl.constexpr(16)


@triton.jit
def rank_rows(index, s, exists, HAS_INDEX: tl.constexpr):
    """Return which row of a factor each selected rank s is."""
    return tl.load(index + s, mask=exists, other=0) if HAS_INDEX else s.to(tl.int64)


@triton.jit
def activation_tile(x, t, t_ok, row_stride, f, f_ok):
    """Load x[t, f], zero outside: ``[T, F]``."""
    return tl.load(
        x + t[:, None] * row_stride + f[None, :], mask=t_ok[:, None] & f_ok[None, :], other=0.0
    )


@triton.jit
def kept_bits(random, threshold, place: tl.constexpr):
    """Turn 32 random bits into two bits of a mask, at ``place`` and the one above it."""
    random = random.to(tl.uint32, bitcast=True)
    low = ((random & 0xFFFF) >= threshold).to(tl.int32)
    high = ((random >> 16) >= threshold).to(tl.int32)
    return (low << place) | (high << (place + 1))


@triton.jit(do_not_specialize=["seed", "threshold", "count"])
def mask_kernel(
    mask,  # uint8 [count], written: eight features to a byte, the lowest bit first
    seed,
    threshold,  # of 65536: how many of 16 random bits' values drop a feature
    count,
    BYTES: tl.constexpr,
):
    """Draw a dropout mask by Philox, keyed by seed and byte. One program: BYTES bytes."""
    b = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    first, second, third, fourth = tl.randint4x(seed, b)
    byte = kept_bits(first, threshold, 0) | kept_bits(second, threshold, 2)
    byte = byte | kept_bits(third, threshold, 4) | kept_bits(fourth, threshold, 6)
    tl.store(mask + b, byte.to(tl.uint8), mask=b < count)


@triton.jit
def dropped(x_TF, mask, t, t_ok, mask_row, f, f_ok):
    """Zero the elements of x[t, f] whose bit in the mask is off: ``[T, F]``."""
    byte = tl.load(
        mask + t[:, None] * mask_row + (f // 8)[None, :],
        mask=t_ok[:, None] & f_ok[None, :],
        other=0,
    )
    return tl.where((byte >> (f % 8)[None, :].to(tl.uint8)) & 1 != 0, x_TF, 0.0)


@triton.jit
def factor_tile(factor, rows, exists, row_stride, f, f_ok, column_stride, ROWS: tl.constexpr):
    """Gather factor[rows, f], zero outside: ``[P, F]``."""
    if ROWS:
        offsets = rows[:, None] * (row_stride * ROW_UNIT) + f[None, :]
    else:
        offsets = rows[:, None] * row_stride + f[None, :].to(tl.int64) * column_stride
    return tl.load(factor + offsets, mask=exists[:, None] & f_ok[None, :], other=0.0)


@triton.jit(
    do_not_specialize=[
        "tokens",
        "ranks",
        "u_row",
        "u_column",
        "v_row",
        "v_column",
        "gain_stride",
        "mask_row",
    ],
    do_not_specialize_on_alignment=["index", "gain", "bias"],
)
def apply_kernel(
    x,  # [tokens, features_in], row stride x_row
    u,  # [rows, features_in], any strides
    v,  # [rows, features_out], any strides; None without EXPAND
    index,  # int64 [ranks], or None
    gain,  # a number, or fp32 [] or [ranks] by its stride 0 or 1
    bias,  # [features_out], or None
    mask,  # dropout bits of x or of y, row stride mask_row; None without
    h,  # [tokens, P], written
    y,  # [tokens, features_out], written; None without EXPAND
    tokens,
    ranks,
    features_in,
    features_out,
    x_row,
    u_row,
    u_column,
    v_row,
    v_column,
    gain_stride,
    mask_row,
    T: tl.constexpr,
    F: tl.constexpr,
    P: tl.constexpr,
    DROP_X: tl.constexpr,
    DROP_Y: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GAIN_TENSOR: tl.constexpr,
    U_ROWS: tl.constexpr,
    V_ROWS: tl.constexpr,
    EXPAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h = gain · x u[index]ᵀ, rounded and kept; y = h v[index] + bias. One program, T rows."""
    t = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    t_ok = t < tokens
    s = tl.arange(0, P)
    exists = s < ranks
    rows = rank_rows(index, s, exists, HAS_INDEX)
    sum_TP = tl.zeros((T, P), tl.float32)
    for start in range(0, features_in, F):
        f = start + tl.arange(0, F)
        f_ok = f < features_in
        x_TF = activation_tile(x, t, t_ok, x_row, f, f_ok)
        if DROP_X:
            x_TF = dropped(x_TF, mask, t, t_ok, mask_row, f, f_ok)
        u_PF = factor_tile(u, rows, exists, u_row, f, f_ok, u_column, U_ROWS)
        sum_TP = tl.dot(x_TF, tl.trans(u_PF.to(x_TF.dtype)), sum_TP, input_precision=PRECISION)
    if HAS_GAIN_TENSOR:
        sum_TP *= tl.load(gain + s * gain_stride, mask=exists, other=0.0)[None, :]
    else:
        sum_TP *= gain
    h_TP = sum_TP.to(h.dtype.element_ty)
    tl.store(h + t[:, None] * P + s[None, :], h_TP, mask=t_ok[:, None])
    if EXPAND:
        for start in range(0, features_out, F):
            g = start + tl.arange(0, F)
            g_ok = g < features_out
            v_PG = factor_tile(v, rows, exists, v_row, g, g_ok, v_column, V_ROWS)
            y_TG = tl.dot(h_TP, v_PG.to(h_TP.dtype), input_precision=PRECISION)
            if HAS_BIAS:
                y_TG += tl.load(bias + g, mask=g_ok, other=0.0).to(tl.float32)[None, :]
            if DROP_Y:
                y_TG = dropped(y_TG, mask, t, t_ok, mask_row, g, g_ok)
            tl.store(
                y + t[:, None] * features_out + g[None, :],
                y_TG.to(y.dtype.element_ty),
                mask=t_ok[:, None] & g_ok[None, :],
            )


@triton.jit(do_not_specialize=["tokens", "ranks", "tokens_per_split", "mask_row"])
def wgrad_kernel(
    p,  # [tokens, P]
    x,  # [tokens, features], row stride x_row
    mask,  # dropout bits of x, row stride mask_row; None without
    partial,  # fp32 [splits, ranks, features], written
    tokens,
    ranks,
    features,
    x_row,
    tokens_per_split,
    mask_row,
    T: tl.constexpr,
    F: tl.constexpr,
    P: tl.constexpr,
    DROP_X: tl.constexpr,
    FEATURES_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split's share of pᵀ x. One program: F features, tokens_per_split rows."""
    f = tl.program_id(0) * F + tl.arange(0, F)
    f_ok = f < features
    s = tl.arange(0, P)
    split = tl.program_id(1).to(tl.int64)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)
    # The large side goes first where the matrix unit wants 64 rows or more (wgmma, tcgen05).
    total = tl.zeros((F, P) if FEATURES_FIRST else (P, F), tl.float32)
    for start in range(first, last, T):
        t = (start + tl.arange(0, T)).to(tl.int64)
        t_ok = t < last
        x_TF = activation_tile(x, t, t_ok, x_row, f, f_ok)
        if DROP_X:
            x_TF = dropped(x_TF, mask, t, t_ok, mask_row, f, f_ok)
        p_TP = tl.load(p + t[:, None] * P + s[None, :], mask=t_ok[:, None], other=0.0)
        if FEATURES_FIRST:
            total = tl.dot(tl.trans(x_TF), p_TP, total, input_precision=PRECISION)
        else:
            total = tl.dot(tl.trans(p_TP), x_TF, total, input_precision=PRECISION)
    if FEATURES_FIRST:
        total = tl.trans(total)
    tl.store(
        partial + (split * ranks + s[:, None]) * features + f[None, :],
        total,
        mask=(s < ranks)[:, None] & f_ok[None, :],
    )


@triton.jit(
    do_not_specialize=["ranks", "splits", "out_row", "out_column"],
    do_not_specialize_on_alignment=["index"],
)
def reduce_kernel(
    partial,  # fp32 [splits, ranks, features]
    index,  # int64 [ranks], or None
    out,  # [rows, features], any strides, written at the rows of the index
    ranks,
    features,
    splits,
    out_row,
    out_column,
    S: tl.constexpr,
    F: tl.constexpr,
    HAS_INDEX: tl.constexpr,
):
    """Sum the splits in their order, cast, write to the rows of the index: S ranks, F features."""
    f = tl.program_id(0) * F + tl.arange(0, F)
    s = tl.program_id(1) * S + tl.arange(0, S)
    exists = s < ranks
    mask = exists[:, None] & (f < features)[None, :]
    source = partial + s[:, None].to(tl.int64) * features + f[None, :]
    total = tl.zeros((S, F), tl.float32)
    for _ in range(splits):
        total += tl.load(source, mask=mask, other=0.0)
        source += ranks.to(tl.int64) * features
    rows = rank_rows(index, s, exists, HAS_INDEX)
    target = out + rows[:, None] * out_row + f[None, :].to(tl.int64) * out_column
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)
