"""AdamW on the selected ranks of a low-rank factor: the other rows and their state stay as is."""

from fslora_kernels.ops.sketched_adamw.interface import sketched_adamw
from fslora_kernels.ops.sketched_adamw.op import Cost, Rule, cost

__all__ = ["Cost", "Rule", "cost", "sketched_adamw"]
