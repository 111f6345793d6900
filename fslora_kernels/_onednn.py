"""Products with a base weight in float32 on AMD's processors: oneDNN is the faster library there.

For float32 on an x86 processor torch calls MKL. On AMD's with AVX-512 oneDNN, which torch brings
along and calls for bfloat16, takes 0.8 to 0.95 of the time, from some size on. It rounds 1.4 to 2.3
times as much (4 times where all values have one sign). Elsewhere nothing was measured, and nothing
changes; nor does it where oneDNN is turned off (``torch.backends.mkldnn.enabled = False``).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# Multiplications from which on a product pays for what oneDNN does before it begins.
LEAST = 1 << 25
# oneDNN keeps half a MiB for good for every number of tokens that a layer ever sees. With batches
# of any length that would grow to half a GiB; so MKL computes those that are no whole multiple.
TOKENS = 256
# What the operator is given: tensors of torch's own, or nothing.
OWN = frozenset((Tensor, Parameter, type(None)))


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


def pays(tokens: int, in_features: int, out_features: int) -> bool:
    """Whether oneDNN is the better choice for a float32 product of this size, here."""
    return (
        tokens * in_features * out_features >= LEAST
        and tokens % TOKENS == 0
        and faster()
        and bool(torch.backends.mkldnn.enabled)
    )


def takes(left_TF: Tensor, right_FG: Tensor, *others: Tensor | None) -> bool:
    """Whether ``product`` is the better way to this matrix product.

    Args:
        left_TF: ``[T, F]``.
        right_FG: ``[F, G]``.
        others: what is added to the product; only its type counts.
    """
    return (
        left_TF.dtype == right_FG.dtype == torch.float32
        and left_TF.is_cpu
        and pays(left_TF.shape[0], left_TF.shape[1], right_FG.shape[1])
        and OWN.issuperset(map(type, (left_TF, right_FG, *others)))
        and left_TF.layout is right_FG.layout is torch.strided
        and (left_TF.is_contiguous() or left_TF.t().is_contiguous())
        and (right_FG.is_contiguous() or right_FG.t().is_contiguous())
    )


def product(left_TF: Tensor, right_FG: Tensor, bias_G: Tensor | None = None) -> Tensor:
    """Return ``left right + bias``, row-major; torch cannot differentiate it."""
    if bias_G is not None:
        bias_G = bias_G.contiguous()  # the operator does not ask for strides
    found: Tensor = torch.ops.mkldnn._linear_pointwise(
        left_TF, right_FG.t(), bias_G, "none", [], ""
    )
    return found
