"""A frozen linear layer plus a low-rank adapter of which only a subset of the ranks is used."""

from fslora_kernels.ops.sketched_linear.interface import sketched_linear
from fslora_kernels.ops.sketched_linear.op import Cost, cost

__all__ = ["Cost", "cost", "sketched_linear"]
