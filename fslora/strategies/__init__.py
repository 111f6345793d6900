"""One federated algorithm per file, each a factory that returns three pure functions."""

from fslora.strategies.fslora import fslora
from fslora.strategies.head_only import head_only

STRATEGIES = {"fslora": fslora, "head-only": head_only}

__all__ = ["STRATEGIES", "fslora", "head_only"]
