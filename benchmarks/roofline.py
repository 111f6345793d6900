"""What the machine can do at best, measured in the same run, and the least that a step can take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.timing import Clock
from fslora_kernels import _onednn
from fslora_kernels.ops.sketched_linear import cost

_REPEATS = 20
# Side of the square product, bytes of the copy.
_SIZES = {"cpu": (1024, 128 << 20), "cuda": (8192, 2 << 30)}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best of several large products and copies.

    Attributes:
        flops_per_s: of a square matrix product, a multiply and an add counted as two, by the
            faster library where a layer of ours has a choice.
        bytes_per_s: of a copy, read and written.
    """

    flops_per_s: float
    bytes_per_s: float

    def __str__(self) -> str:
        """Print in units of 10⁹."""
        return f"{self.flops_per_s / 1e9:.0f} Gflop/s, {self.bytes_per_s / 1e9:.1f} GB/s"


def ceilings(device: str, dtype: torch.dtype, measure: Clock, *, shrink: int = 1) -> Ceilings:
    """Measure both ceilings on random data.

    Args:
        device: torch's device type.
        dtype: of the product.
        measure: the clock that the steps are timed with.
        shrink: divides the sizes, for trying the program rather than the machine.

    Returns:
        The rates of the fastest runs.
    """
    side, copied = (size // shrink for size in _SIZES[device])
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(side, side, generator=generator, device=device).to(dtype) for _ in range(2)
    )
    product = torch.empty_like(left)
    source = torch.randn(copied // 4, generator=generator, device=device)
    target = torch.zeros_like(source)
    product_s = min(measure(lambda: torch.mm(left, right, out=product)) for _ in range(_REPEATS))
    if _onednn.takes(left, right):
        ours_s = min(measure(lambda: _onednn.product(left, right)) for _ in range(_REPEATS))
        product_s = min(product_s, ours_s)
    copy_s = min(measure(lambda: target.copy_(source)) for _ in range(_REPEATS))
    return Ceilings(2 * side**3 / product_s, 2 * source.nbytes / copy_s)


def least_time(
    tokens: int,
    in_features: int,
    out_features: int,
    sketch_size: int,
    *,
    itemsize_bytes: int,
    flop_rate: float,
    byte_rate: float,
    pad_ranks_to: int = 1,
) -> float:
    """Return the least time of a step: the base's operations, the adapter's traffic beside them.

    The base's own two products are taken to be bound by arithmetic. It is that of delta first;
    where tokens are many, merging does less.

    Args:
        tokens: T.
        in_features: D.
        out_features: E.
        sketch_size: S; 0 is the bare base layer.
        itemsize_bytes: of one element.
        flop_rate: operations per unit of time.
        byte_rate: bytes per unit of time.
        pad_ranks_to: the multiple that the implementation pads S to.

    Returns:
        Time of forward and backward, in the rates' unit.
    """
    total = 0.0
    for backward in (False, True):
        needs = cost(
            tokens,
            in_features,
            out_features,
            sketch_size,
            backward=backward,
            itemsize_bytes=itemsize_bytes,
            pad_ranks_to=pad_ranks_to,
        )
        total += needs.base_flops / flop_rate
        if sketch_size:
            total += max(needs.lora_flops / flop_rate, needs.lora_bytes / byte_rate)
    return total
