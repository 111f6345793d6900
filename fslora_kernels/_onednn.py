"""Large float32 products on AMD's processors: oneDNN is faster there than torch's usual library.

For float32 on an x86 processor torch calls MKL. On AMD's with AVX-512 oneDNN, which torch brings
along and calls for bfloat16, takes 0.8 to 0.95 of the time, from some size on. It rounds 1.4 to 2.3
times as much. Elsewhere nothing was measured, and nothing changes; nor does it where oneDNN is
turned off (``torch.backends.mkldnn.enabled = False``).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# Multiplications from which on a product pays for what oneDNN does before it begins.
LEAST = 1 << 25


def operator() -> Any:  # noqa: ANN401
    """Return torch's operator, which it has for its compiler only, or None without oneDNN."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@cache
def faster() -> bool:
    """Whether this is a processor on which oneDNN was measured to be the faster library."""
    if operator() is None or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    processor = torch.cpu.get_capabilities()
    return str(processor.get("cpu_name")).startswith("AMD") and bool(processor.get("avx512_f"))


def takes(left: Tensor, right: Tensor) -> bool:
    """Whether ``product`` is the faster way to this matrix product: large ones of plain tensors."""
    return (
        left.is_cpu
        and right.is_cpu
        and left.dtype == right.dtype == torch.float32
        and left.numel() * right.shape[1] >= LEAST
        and faster()
        and bool(torch.backends.mkldnn.enabled)
        and _is_plain(left)
        and _is_plain(right)
    )


def _is_plain(matrix: Tensor) -> bool:
    """Whether this is a tensor of torch's own, row-major or column-major."""
    return type(matrix) in (Tensor, Parameter) and (
        matrix.is_contiguous() or matrix.t().is_contiguous()
    )


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``left right + bias``, row-major; torch cannot differentiate it."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return found
