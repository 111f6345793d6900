"""Every compilation that a launch of the Triton kernel can ask for: one per dtype."""

from __future__ import annotations

from collections.abc import Iterator

from fslora_kernels.aot import Variant
from fslora_kernels.ops.sketched_adamw.backend_triton import (
    FEATURES,
    RANKS,
    STAGES,
    WARPS,
    sketched_adamw_kernel,
)

# One label for all dtypes: they differ by a cast, so few compilations stand for them.
LABEL = "any dtype"
_COUNTS = (
    "ranks features compact parameter_row parameter_column gradient_row gradient_column "
    "m_row m_column v_row v_column"
)
_SETTINGS = "lr kept eps beta1 rest1 log_beta1 beta2 rest2 log_beta2"


def variants(_target: str) -> Iterator[Variant]:
    """Yield every compilation that a launch can ask for, the same on each target.

    On AMD a factor that lies in a storage of 2 GiB or more asks for others, not yielded here.
    """
    for dtype in ("fp16", "bf16", "fp32"):
        pointers = {"parameter": f"*{dtype}", "gradient": f"*{dtype}", "m": "*fp32", "v": "*fp32"}
        pointers |= {"steps": "*fp32", "index": "*i64"}
        counts = dict.fromkeys(_COUNTS.split(), "i32")
        yield Variant(
            sketched_adamw_kernel,
            LABEL,
            pointers | counts | dict.fromkeys(_SETTINGS.split(), "fp32"),
            {"S": RANKS, "F": FEATURES},
            aligned=frozenset(),
            within_2gb=frozenset(pointers),
            warps=WARPS,
            stages=STAGES,
        )
