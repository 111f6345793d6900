"""Every compilation that a launch of the Triton kernel can ask for: one per dtype."""

from __future__ import annotations

from collections.abc import Iterator

from fslora_kernels.aot import Variant
from fslora_kernels.ops.scatter_mean.backend_triton import (
    FEATURES,
    STAGES,
    WARPS,
    scatter_mean_kernel,
)

# One label for all dtypes: they differ by a cast, so few compilations stand for them.
LABEL = "any dtype"


def variants(target: str) -> Iterator[Variant]:
    """Yield every compilation that a launch on a target can ask for.

    On AMD rows that lie in a storage of 2 GiB or more ask for another one; both are yielded, those
    for an index or a result of that size are not.
    """
    pointers = {"order": "*i64", "offsets": "*i64", "denominator": "*fp32"}
    counts = dict.fromkeys(("features", "row_stride", "column_stride"), "i32")
    sizes = (frozenset[str](),) if target.startswith("sm_") else (frozenset[str](), {"rows"})
    for large in sizes:
        for dtype in ("fp16", "bf16", "fp32"):
            signature = {"rows": f"*{dtype}", **pointers, "out": f"*{dtype}", **counts}
            yield Variant(
                scatter_mean_kernel,
                LABEL,
                signature,
                {"F": FEATURES},
                aligned=frozenset(),
                within_2gb=frozenset(signature.keys() - counts.keys() - large),
                warps=WARPS,
                stages=STAGES,
            )
