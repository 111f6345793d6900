"""How the Triton kernels are cut, and every compilation that a launch of them can ask for.

The tiles were chosen ahead of time, by compiling: the first in a short list of candidates, largest
first, of which no variant spills a register. None was timed. Those of sm_80 keep to the 101,376
bytes of shared memory of its smaller siblings (8.6, 8.9), which use them too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fslora_kernels._tiles import apply_kernel, mask_kernel, reduce_kernel, wgrad_kernel
from fslora_kernels.aot import Variant
from fslora_kernels.ops.sketched_linear.op import PADDED_RANKS

MAX_PADDED_WITH_DROPOUT = 64


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one program of a kernel is cut.

    Attributes:
        tokens: rows of a tile (of ``reduce``: ranks).
        features: columns of a tile.
        warps: of one program.
        stages: of the load pipeline.
        features_first: ``wgrad`` puts the features, not the ranks, on the rows of its product.
    """

    tokens: int
    features: int
    warps: int = 4
    stages: int = 3
    features_first: bool = False


def _by_ranks(*tiles: Tiles) -> dict[int, Tiles]:
    return dict(zip(PADDED_RANKS, tiles, strict=True))


# Without tensor cores the operands of a product sit in registers: small tiles, many threads.
_IEEE = (
    Tiles(64, 64, stages=2),
    Tiles(64, 64, warps=8, stages=2),
    Tiles(32, 64, warps=8, stages=2),
)
# (kernel, target, arithmetic) → padded ranks → tiles. A measured table may replace entries.
TILES: dict[tuple[str, str, str], dict[int, Tiles]] = {
    ("apply", "interpreter", "ieee"): _by_ranks(*[Tiles(32, 32)] * 4),
    ("wgrad", "interpreter", "ieee"): _by_ranks(
        *[Tiles(32, 32), Tiles(32, 32, features_first=True)] * 2
    ),
    ("apply", "sm_80", "half"): _by_ranks(
        Tiles(64, 128), Tiles(64, 128), Tiles(64, 64), Tiles(64, 64, warps=8)
    ),
    ("apply", "sm_80", "tf32"): _by_ranks(*[Tiles(64, 64)] * 3, Tiles(64, 32, warps=8)),
    ("apply", "sm_80", "ieee"): _by_ranks(*_IEEE, Tiles(32, 32, warps=8, stages=2)),
    ("wgrad", "sm_80", "half"): _by_ranks(
        *[Tiles(64, 128)] * 2, Tiles(64, 128, warps=8), Tiles(64, 64, features_first=True)
    ),
    ("wgrad", "sm_80", "tf32"): _by_ranks(*[Tiles(32, 64, features_first=True)] * 4),
    ("wgrad", "sm_80", "ieee"): _by_ranks(*[Tiles(32, 64)] * 2, *[Tiles(32, 64, warps=8)] * 2),
    ("apply", "sm_90", "half"): _by_ranks(
        *[Tiles(64, 128, stages=4)] * 2, Tiles(64, 128), Tiles(64, 64, warps=8)
    ),
    ("apply", "sm_90", "tf32"): _by_ranks(*[Tiles(64, 64)] * 3, Tiles(64, 32)),
    ("apply", "sm_90", "ieee"): _by_ranks(*_IEEE, Tiles(32, 32, warps=8, stages=2)),
    ("wgrad", "sm_90", "half"): _by_ranks(*[Tiles(64, 128, features_first=True)] * 4),
    ("wgrad", "sm_90", "tf32"): _by_ranks(*[Tiles(32, 64, features_first=True)] * 4),
    ("wgrad", "sm_90", "ieee"): _by_ranks(
        *[Tiles(32, 64)] * 2, Tiles(32, 64, warps=8), Tiles(32, 64, features_first=True)
    ),
    ("apply", "sm_100", "half"): _by_ranks(
        Tiles(64, 64, warps=8), *[Tiles(64, 128)] * 2, Tiles(64, 32, warps=8)
    ),
    ("apply", "sm_100", "tf32"): _by_ranks(
        *[Tiles(64, 64)] * 2, Tiles(64, 32, warps=8), Tiles(64, 16)
    ),
    ("apply", "sm_100", "ieee"): _by_ranks(*_IEEE, Tiles(16, 32, stages=2)),
    ("wgrad", "sm_100", "half"): _by_ranks(*[Tiles(64, 128, features_first=True)] * 4),
    ("wgrad", "sm_100", "tf32"): _by_ranks(*[Tiles(32, 64, features_first=True)] * 4),
    ("wgrad", "sm_100", "ieee"): _by_ranks(
        *[Tiles(32, 64)] * 2, Tiles(32, 64, warps=8), Tiles(32, 64, features_first=True)
    ),
    ("apply", "gfx942", "half"): _by_ranks(
        Tiles(64, 64, stages=2), Tiles(64, 32, stages=2), *[Tiles(64, 16, stages=2)] * 2
    ),
    ("apply", "gfx942", "ieee"): _by_ranks(*[Tiles(64, 64, stages=2)] * 4),
    ("wgrad", "gfx942", "half"): _by_ranks(*[Tiles(64, 64, stages=2)] * 4),
    ("wgrad", "gfx942", "ieee"): _by_ranks(*[Tiles(32, 64, stages=2)] * 4),
}
# Tiles with a mask, which no table replaces: (kernel, target, arithmetic, what features are dropped
# from) → padded ranks → tiles. On sm_90 masked x would be the operand in registers of asynchronous
# products (wgmma, from 64 rows on), and ptxas gives those registers to the loop's next turn while
# they are read: wrong results by compilers before CUDA 13.3 (triton-lang/triton#11781). Fewer rows
# take mma.sync, which is done when it returns. At 64 ranks masked y spills in the default tiles,
# and masked x in four stages.
DROPPING: dict[tuple[str, str, str, str], dict[int, Tiles]] = {
    ("apply", "sm_90", "half", "x"): {
        **dict.fromkeys((16, 32), Tiles(32, 64, stages=4)),
        64: Tiles(32, 64, stages=3),
    },
    ("apply", "sm_90", "half", "y"): {64: Tiles(64, 64)},
    ("wgrad", "sm_90", "half", "x"): {
        **dict.fromkeys((16, 32), Tiles(64, 128, warps=8)),
        64: Tiles(64, 32, stages=4, features_first=True),
    },
}
REDUCE = Tiles(16, 128)
MASK = Tiles(1, 1024)


def apply_constants(
    tiles: Tiles,
    padded: int,
    arithmetic: str,
    *,
    drop_x: bool,
    drop_y: bool,
    has_index: bool,
    has_bias: bool,
    has_gain_tensor: bool,
    u_rows: bool,
    v_rows: bool,
    expand: bool,
) -> dict[str, Any]:
    """Return the compile-time arguments of ``apply_kernel``."""
    return {
        "T": tiles.tokens,
        "F": tiles.features,
        "P": padded,
        "DROP_X": drop_x,
        "DROP_Y": drop_y,
        "HAS_INDEX": has_index,
        "HAS_BIAS": has_bias,
        "HAS_GAIN_TENSOR": has_gain_tensor,
        "U_ROWS": u_rows,
        "V_ROWS": v_rows,
        "EXPAND": expand,
        "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
    }


def wgrad_constants(
    tiles: Tiles, padded: int, arithmetic: str, *, drop_x: bool = False
) -> dict[str, Any]:
    """Return the compile-time arguments of ``wgrad_kernel``."""
    return {
        "T": tiles.tokens,
        "F": tiles.features,
        "P": padded,
        "DROP_X": drop_x,
        "FEATURES_FIRST": tiles.features_first,
        "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
    }


def mask_constants() -> dict[str, Any]:
    """Return the compile-time arguments of ``mask_kernel``."""
    return {"BYTES": MASK.features}


def reduce_constants(*, has_index: bool) -> dict[str, Any]:
    """Return the compile-time arguments of ``reduce_kernel``."""
    return {"S": REDUCE.tokens, "F": REDUCE.features, "HAS_INDEX": has_index}


_APPLY_COUNTS = (
    "tokens ranks features_in features_out x_row u_row u_column v_row v_column gain_stride mask_row"
)
_WGRAD_COUNTS = "tokens ranks features x_row tokens_per_split mask_row"
_REDUCE_COUNTS = "ranks features splits out_row out_column"
_ALIGNED_POINTERS = ("x", "u", "v", "h", "y", "p", "partial", "out", "mask")
_ALIGNED = frozenset(_ALIGNED_POINTERS) | {"features", "features_in", "features_out", "x_row"}
# Contiguous rows in u, in v; whether there is a v; whether there is a bias; what features are
# dropped from: the forward pass drops those of x, the backward pass those of dx, which is its y.
_LAYOUTS = (
    (True, True, True, False, ""),
    (True, True, True, True, ""),
    (True, False, True, False, ""),
    (True, False, True, True, ""),
    (False, True, True, False, ""),
    (True, False, False, False, ""),
    (False, False, False, False, ""),
    (True, True, True, False, "x"),
    (True, True, True, True, "x"),
    (True, False, True, False, "x"),
    (True, False, True, True, "x"),
    (True, True, True, False, "y"),
    (False, True, True, False, "y"),
)


def variants(target: str) -> Iterator[Variant]:
    """Yield every compilation that a launch on a target can ask for.

    On AMD a launch whose activations lie in storages of 2 GiB or more asks for another compilation
    than one whose activations are smaller; both are yielded, mixtures are not.
    """
    amd = not target.startswith("sm_")
    sizes: tuple[frozenset[str], ...] = (frozenset(),)
    if amd:
        sizes += (frozenset("xy"),)
    for large, padded in itertools.product(sizes, PADDED_RANKS):
        for x, arithmetic in (
            ("fp16", "half"),
            ("bf16", "half"),
            ("fp32", "ieee"),
            ("fp32", "tf32"),
        ):
            if amd and arithmetic == "tf32":
                continue
            cuts = {
                drop: list(_selectable("apply", target, arithmetic, padded, drop))
                for drop in ("", "x", "y")
            }
            for factor in dict.fromkeys((x, "fp32")):
                yield from _apply_variants(cuts, x, factor, arithmetic, padded, large)
            for drop in ("", "x") if _drops(arithmetic, padded) else ("",):
                for tiles in _selectable("wgrad", target, arithmetic, padded, drop):
                    yield _wgrad_variant(tiles, x, arithmetic, padded, large, drop=bool(drop))
    pointers = {"mask": "*u8", "seed": "i64"}
    yield _variant(mask_kernel, "u8", pointers, "threshold count", mask_constants(), MASK)
    for out, has_index in itertools.product(("fp16", "bf16", "fp32"), (False, True)):
        pointers = {"partial": "*fp32", "out": f"*{out}"}
        if has_index:
            pointers["index"] = "*i64"
        constants = reduce_constants(has_index=has_index)
        # One label: they differ by a cast, so few compilations stand for them.
        yield _variant(reduce_kernel, "any dtype", pointers, _REDUCE_COUNTS, constants, REDUCE)


def _drops(arithmetic: str, padded: int) -> bool:
    """Whether the kernels take a dropout mask: elsewhere they would spill registers."""
    return arithmetic == "half" and padded <= MAX_PADDED_WITH_DROPOUT


def _selectable(
    kernel: str, target: str, arithmetic: str, padded: int, drop: str = ""
) -> Iterator[Tiles]:
    """Yield the default tiles and those that the shipped tables have for a target's devices."""
    from fslora_kernels.tuning import shipped

    fixed = DROPPING.get((kernel, target, arithmetic, drop), {}).get(padded)
    if fixed is not None:
        yield fixed
        return
    default = TILES[kernel, target, arithmetic][padded]
    key = (kernel, arithmetic, padded)
    yield from dict.fromkeys([default, *(table.get(key, default) for table in shipped(target))])


def _apply_variants(
    cuts: Mapping[str, Sequence[Tiles]],
    x: str,
    factor: str,
    arithmetic: str,
    padded: int,
    large: frozenset[str],
) -> Iterator[Variant]:
    label = f"{x} {arithmetic}" if x == factor else f"{x}/{factor} {arithmetic}"
    for (u_rows, v_rows, expand, has_bias, drop), has_index, gain in itertools.product(
        _LAYOUTS, (False, True), ("fp32", "*fp32")
    ):
        if drop and not _drops(arithmetic, padded):
            continue
        pointers = {"x": f"*{x}", "u": f"*{factor}", "gain": gain, "h": f"*{x}"}
        if expand:
            pointers |= {"v": f"*{factor}", "y": f"*{x}"}
        if has_index:
            pointers["index"] = "*i64"
        if has_bias:
            pointers["bias"] = f"*{x}"
        if drop:
            pointers["mask"] = "*u8"
        for tiles in cuts[drop]:
            constants = apply_constants(
                tiles,
                padded,
                arithmetic,
                drop_x=drop == "x",
                drop_y=drop == "y",
                has_index=has_index,
                has_bias=has_bias,
                has_gain_tensor=gain == "*fp32",
                u_rows=u_rows,
                v_rows=v_rows,
                expand=expand,
            )
            yield _variant(apply_kernel, label, pointers, _APPLY_COUNTS, constants, tiles, large)


def _wgrad_variant(
    tiles: Tiles, x: str, arithmetic: str, padded: int, large: frozenset[str], *, drop: bool
) -> Variant:
    pointers = {"p": f"*{x}", "x": f"*{x}", "partial": "*fp32"}
    if drop:
        pointers["mask"] = "*u8"
    constants = wgrad_constants(tiles, padded, arithmetic, drop_x=drop)
    label = f"{x} {arithmetic}"
    return _variant(wgrad_kernel, label, pointers, _WGRAD_COUNTS, constants, tiles, large)


def _variant(
    function: Any,  # noqa: ANN401
    dtype: str,
    pointers: dict[str, str],
    counts: str,
    constants: dict[str, Any],
    tiles: Tiles,
    large: frozenset[str] = frozenset(),
) -> Variant:
    signature = pointers | dict.fromkeys(counts.split(), "i32")
    addresses = frozenset(name for name, kind in signature.items() if kind.startswith("*"))
    return Variant(
        function,
        dtype,
        signature,
        constants,
        aligned=_ALIGNED & signature.keys(),
        within_2gb=addresses - large,
        warps=tiles.warps,
        stages=tiles.stages,
    )
