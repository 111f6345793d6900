"""Counting floating-point operations, in-place products included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


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


@contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the operations of the torch calls inside, also of ``addmm_``.

    Torch's own counter sees an in-place ``addmm_`` as nothing, which is how the base product is
    accumulated here. Triton launches are not torch calls: ``cost`` states theirs.

    Yields:
        A count whose ``total`` is set on leaving.
    """
    count = FlopCount()
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops})
    with counter:
        yield count
    count.total = counter.get_total_flops()
