"""One federated algorithm per file, each a factory that returns three pure functions."""

from fslora.strategies.fslora import fslora

STRATEGIES = {"fslora": fslora}

__all__ = ["STRATEGIES", "fslora"]
