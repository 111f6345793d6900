"""Counting floating-point operations, in-place products and oneDNN's included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fslora_kernels import _onednn


@dataclass(slots=True)
class FlopCount:
    """Filled when the counting ends.

    Attributes:
        total: floating-point operations, a multiply and an add counted as two.
    """

    total: int = 0


def _addmm_flops(
    _self: Any,  # noqa: ANN401
    left: tuple[int, int],
    right: tuple[int, int],
    *_args: Any,  # noqa: ANN401
    **_kwargs: Any,  # noqa: ANN401
) -> int:
    return 2 * left[0] * left[1] * right[1]


def _linear_flops(
    left: tuple[int, int],
    right: tuple[int, int],
    *_args: Any,  # noqa: ANN401
    **_kwargs: Any,  # noqa: ANN401
) -> int:
    return 2 * left[0] * left[1] * right[0]


# What torch's own counter takes for nothing: operations from shapes.
UNCOUNTED: dict[Any, Callable[..., int]] = {torch.ops.aten.addmm_: _addmm_flops}
if _onednn.operator() is not None:
    UNCOUNTED[_onednn.operator()] = _linear_flops


@contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the operations of the torch calls inside.

    Torch's own counter takes two products for nothing, which are counted here: an in-place
    ``addmm_``, which is how the base product is accumulated, and oneDNN's of float32. Triton
    launches are not torch calls: ``cost`` states theirs.

    Yields:
        A count whose ``total`` is set on leaving.
    """
    count = FlopCount()
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    with counter:
        yield count
    count.total = counter.get_total_flops()
