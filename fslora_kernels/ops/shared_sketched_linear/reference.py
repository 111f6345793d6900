"""What the operation means, in plain torch, forward only."""

from collections.abc import Sequence

from torch import Tensor

from fslora_kernels.ops.shared_sketched_linear.interface import Projection
from fslora_kernels.ops.sketched_linear.reference import reference as one


def reference(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """Return each projection's ``sketched_linear`` of x, one after the other."""
    return tuple(
        one(x, p.weight, p.lora_a, p.lora_b, p.index, bias=p.bias, scale=p.scale)
        for p in projections
    )
