"""Two kernels that wait for a GPU: compiled ahead of time, never selected, nothing claimed.

``dh_db`` reads dy once for both dh and dB, where the shipped kernels read it twice. ``base_delta``
adds the delta in the epilogue of a base product of our own, so that y is written once and never
read. Whether either pays is a question of atomics and of microseconds against the vendor's library,
which only a measurement can answer: docs/kernels.md has the arithmetic.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import triton
import triton.language as tl

from fslora_kernels import aot
from fslora_kernels.aot import TARGETS, Variant

DTYPES = ("bf16", "fp16")


@triton.jit(do_not_specialize=["tokens", "ranks"])
def dh_db_kernel(
    dy,  # [tokens, features]
    h,  # [tokens, P]
    b,  # [ranks, features]
    dh,  # fp32 [tokens, P], zero before, added to
    db,  # fp32 [ranks, features], written
    tokens,
    ranks,
    features,
    T: tl.constexpr,
    F: tl.constexpr,
    P: tl.constexpr,
):
    """dB = hᵀ dy and dh = dy Bᵀ in one pass over dy. One program: F features, all tokens."""
    f = tl.program_id(0) * F + tl.arange(0, F)
    f_ok = f < features
    s = tl.arange(0, P)
    b_PF = tl.load(
        b + s[:, None].to(tl.int64) * features + f[None, :],
        mask=(s < ranks)[:, None] & f_ok[None, :],
        other=0.0,
    )
    db_FP = tl.zeros((F, P), tl.float32)
    for start in range(0, tokens, T):
        t = start + tl.arange(0, T)
        t_ok = t < tokens
        at = t[:, None].to(tl.int64)
        dy_TF = tl.load(
            dy + at * features + f[None, :], mask=t_ok[:, None] & f_ok[None, :], other=0.0
        )
        h_TP = tl.load(h + at * P + s[None, :], mask=t_ok[:, None], other=0.0)
        db_FP = tl.dot(tl.trans(dy_TF), h_TP, db_FP)
        dh_TP = tl.dot(dy_TF, tl.trans(b_PF))
        tl.atomic_add(dh + at * P + s[None, :], dh_TP, mask=t_ok[:, None], sem="relaxed")
    tl.store(
        db + s[:, None].to(tl.int64) * features + f[None, :],
        tl.trans(db_FP),
        mask=(s < ranks)[:, None] & f_ok[None, :],
    )


@triton.jit(do_not_specialize=["tokens", "ranks"])
def base_delta_kernel(
    x,  # [tokens, features_in]
    weight,  # [features_out, features_in]
    h,  # [tokens, P]
    b,  # [ranks, features_out]
    y,  # [tokens, features_out], written
    tokens,
    ranks,
    features_in,
    features_out,
    T: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
):
    """y = x Wᵀ + h B, accumulated in registers. One program: a tile of y."""
    t = tl.program_id(0) * T + tl.arange(0, T)
    e = tl.program_id(1) * E + tl.arange(0, E)
    t_ok, e_ok = t < tokens, e < features_out
    row, column = t[:, None].to(tl.int64), e[:, None].to(tl.int64)
    s = tl.arange(0, P)
    h_TP = tl.load(h + row * P + s[None, :], mask=t_ok[:, None], other=0.0)
    b_PE = tl.load(
        b + s[:, None].to(tl.int64) * features_out + e[None, :],
        mask=(s < ranks)[:, None] & e_ok[None, :],
        other=0.0,
    )
    sum_TE = tl.dot(h_TP, b_PE)
    for start in range(0, features_in, D):
        d = start + tl.arange(0, D)
        d_ok = d < features_in
        x_TD = tl.load(
            x + row * features_in + d[None, :], mask=t_ok[:, None] & d_ok[None, :], other=0.0
        )
        w_ED = tl.load(
            weight + column * features_in + d[None, :],
            mask=e_ok[:, None] & d_ok[None, :],
            other=0.0,
        )
        sum_TE = tl.dot(x_TD, tl.trans(w_ED), sum_TE)
    tl.store(
        y + row * features_out + e[None, :],
        sum_TE.to(y.dtype.element_ty),
        mask=t_ok[:, None] & e_ok[None, :],
    )


def variants(target: str) -> list[Variant]:
    """Return what would be launched on a target, in the sizes that were tried first."""
    # A tile of 128 × 256 needs the tensor memory or the 228 KiB of the newer NVIDIA parts.
    large = target in ("sm_90", "sm_100")
    found = []
    for dtype in DTYPES:
        pointer = f"*{dtype}"
        for padded in (16, 32):
            found.append(
                _variant(
                    dh_db_kernel,
                    dtype,
                    {"dy": pointer, "h": pointer, "b": pointer, "dh": "*fp32", "db": "*fp32"},
                    ("tokens", "ranks", "features"),
                    {"T": 64, "F": 128, "P": padded},
                    warps=4,
                    stages=3 if large else 2,
                )
            )
            found.append(
                _variant(
                    base_delta_kernel,
                    dtype,
                    dict.fromkeys(("x", "weight", "h", "b", "y"), pointer),
                    ("tokens", "ranks", "features_in", "features_out"),
                    {"T": 128, "E": 256 if large else 128, "D": 64 if large else 32, "P": padded},
                    warps=8,
                    stages=(3 if padded == 16 else 2) if large else 2,
                )
            )
    return found


def _variant(
    function: object,
    dtype: str,
    pointers: dict[str, str],
    counts: tuple[str, ...],
    constants: dict[str, int],
    *,
    warps: int,
    stages: int,
) -> Variant:
    signature = pointers | dict.fromkeys(counts, "i32")
    aligned = {*pointers, "features", "features_in", "features_out"} & signature.keys()
    return Variant(
        function,
        dtype,
        signature,
        constants,
        aligned=frozenset(aligned),
        within_2gb=frozenset(pointers),
        warps=warps,
        stages=stages,
    )


def main(arguments: Sequence[str]) -> int:
    """Compile both kernels for every target; return 1 if one spills or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks prototypes", description=__doc__)
    parser.parse_args(arguments)
    reports = aot.compile_all([(v, target) for target in TARGETS for v in variants(target.name)])
    print(aot.table(reports))
    for report in reports:
        for problem in report.problems():
            print(f"{report.kernel} {report.dtype} {report.target}: {problem}")
    return int(any(report.problems() for report in reports))
