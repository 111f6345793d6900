"""Several adapted linear layers that read the same input, such as an attention's q, k and v."""

from fslora_kernels.ops.shared_sketched_linear.interface import Projection, shared_sketched_linear
from fslora_kernels.ops.shared_sketched_linear.op import cost

__all__ = ["Projection", "cost", "shared_sketched_linear"]
