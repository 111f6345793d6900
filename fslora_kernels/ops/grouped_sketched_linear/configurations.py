"""Every compilation that a launch of the Triton kernels can ask for.

The tiles of ``apply`` and ``wgrad`` are those of ``sketched_linear``, whose products these are,
but for one entry, which would spill.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from fslora_kernels.aot import Variant
from fslora_kernels.ops.grouped_sketched_linear.backend_triton_kernels import (
    grouped_apply_kernel,
    grouped_reduce_kernel,
    grouped_wgrad_kernel,
)
from fslora_kernels.ops.sketched_linear import configurations as one_group
from fslora_kernels.ops.sketched_linear.configurations import Tiles
from fslora_kernels.ops.sketched_linear.op import PADDED_RANKS

# (kernel, target, arithmetic) → padded ranks → tiles.
TILES = dict(one_group.TILES)
TILES["apply", "sm_100", "half"] = TILES["apply", "sm_100", "half"] | {64: Tiles(64, 128, warps=8)}
# One program of the reduction sums one row of the pool.
REDUCE = Tiles(tokens=1, features=1024)


def apply_constants(
    tiles: Tiles,
    padded: int,
    arithmetic: str,
    *,
    has_index: bool,
    has_bias: bool,
    rows: bool,
    expand: bool,
) -> dict[str, Any]:
    """Return the compile-time arguments of ``grouped_apply_kernel``."""
    return {
        "T": tiles.tokens,
        "F": tiles.features,
        "P": padded,
        "HAS_INDEX": has_index,
        "HAS_BIAS": has_bias,
        "ROWS": rows,
        "EXPAND": expand,
        "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
    }


def wgrad_constants(tiles: Tiles, padded: int, arithmetic: str) -> dict[str, Any]:
    """Return the compile-time arguments of ``grouped_wgrad_kernel``."""
    return {
        "T": tiles.tokens,
        "F": tiles.features,
        "P": padded,
        "FEATURES_FIRST": tiles.features_first,
        "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
    }


_APPLY_COUNTS = "features_in features_out x_row u_row u_column v_row v_column"
_WGRAD_COUNTS = "features x_row"
_REDUCE_COUNTS = "features"
_ALIGNED_POINTERS = ("x", "u", "v", "h", "y", "p", "partial", "out")
_ALIGNED = frozenset(_ALIGNED_POINTERS) | {"features", "features_in", "features_out", "x_row"}


def variants(target: str) -> Iterator[Variant]:
    """Yield every compilation that a launch on a target can ask for.

    A compilation differs little between dtypes of one arithmetic: they are labelled by what
    multiplies, a matrix unit or (float32 on NVIDIA without TF32) ordinary instructions. On AMD,
    storages of 2 GiB or more ask for other compilations, as in ``sketched_linear``.
    """
    amd = not target.startswith("sm_")
    kinds = (("fp16", "half"), ("bf16", "half"), ("fp32", "ieee"), ("fp32", "tf32"))
    sizes = (frozenset[str](), frozenset("xy")) if amd else (frozenset[str](),)
    for large, padded, (x, arithmetic) in itertools.product(sizes, PADDED_RANKS, kinds):
        if amd and arithmetic == "tf32":
            continue
        label = "matrix unit" if amd or arithmetic != "ieee" else "ieee"
        tiles = TILES["apply", target, arithmetic][padded]
        for factor, (expand, has_bias), has_index in itertools.product(
            dict.fromkeys((x, "fp32")), ((True, False), (True, True), (False, False)), (False, True)
        ):
            pointers = {"x": x, "u": factor, "gain": "fp32", "h": x, "tile_map": "i32"}
            if expand:
                pointers |= {"v": factor, "y": x}
            if has_index:
                pointers["index"] = "i64"
            if has_bias:
                pointers["bias"] = x
            constants = apply_constants(
                tiles,
                padded,
                arithmetic,
                has_index=has_index,
                has_bias=has_bias,
                rows=True,
                expand=expand,
            )
            yield _variant(
                grouped_apply_kernel, label, pointers, _APPLY_COUNTS, constants, tiles, large
            )
        tiles = TILES["wgrad", target, arithmetic][padded]
        pointers = {"p": x, "x": x, "partial": "fp32", "split_map": "i32"}
        constants = wgrad_constants(tiles, padded, arithmetic)
        yield _variant(
            grouped_wgrad_kernel, label, pointers, _WGRAD_COUNTS, constants, tiles, large
        )
    pointers = {"partial": "fp32", "order": "i64", "starts": "i64", "parts": "i32", "out": "fp32"}
    constants = {"F": REDUCE.features}
    yield _variant(grouped_reduce_kernel, "fp32", pointers, _REDUCE_COUNTS, constants, REDUCE)


def _variant(
    function: Any,  # noqa: ANN401
    dtype: str,
    pointers: dict[str, str],
    counts: str,
    constants: dict[str, Any],
    tiles: Tiles,
    large: frozenset[str] = frozenset(),
) -> Variant:
    signature = {name: f"*{dtype}" for name, dtype in pointers.items()}
    signature |= dict.fromkeys(counts.split(), "i32")
    return Variant(
        function,
        dtype,
        signature,
        constants,
        aligned=_ALIGNED & signature.keys(),
        within_2gb=frozenset(pointers) - large,
        warps=tiles.warps,
        stages=tiles.stages,
    )
