"""Many low-rank adapters of different rank on one frozen linear layer, in one batch."""

from fslora_kernels.ops.grouped_sketched_linear.interface import grouped_sketched_linear
from fslora_kernels.ops.grouped_sketched_linear.op import cost

__all__ = ["cost", "grouped_sketched_linear"]
