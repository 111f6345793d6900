"""The server's aggregation: rows that several participants trained, summed by rank and divided."""

from fslora_kernels.ops.scatter_mean.interface import scatter_mean
from fslora_kernels.ops.scatter_mean.op import Cost, cost

__all__ = ["Cost", "cost", "scatter_mean"]
