"""Yogi, which torch does not have, as a torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_BETA1, _BETA2, _TAU = 0.9, 0.99, 1e-3


class Yogi(torch.optim.Optimizer):
    """FedYogi's server step, with Δ = -gradient and the paper's β₁ = 0.9, β₂ = 0.99, τ = 10⁻³.

        m ← β₁m + (1-β₁)Δ;    v ← v - (1-β₂) Δ² sign(v - Δ²);    x ← x + lr · m / (√v + τ),

    from m = 0 and v = τ². Not bias-corrected.

    Source: arXiv 2003.00295, Algorithm 2.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        """Take the parameters, each with its gradient at ``step``."""
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Move every parameter once."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state, change = self.state[parameter], -parameter.grad
                m = state.get("exp_avg", torch.zeros_like(change))
                v = state.get("exp_avg_sq", torch.full_like(change, _TAU**2))
                state["exp_avg"] = m = _BETA1 * m + (1 - _BETA1) * change
                square = change.square()
                state["exp_avg_sq"] = v = v - (1 - _BETA2) * square * torch.sign(v - square)
                parameter.add_(group["lr"] * m / (v.sqrt() + _TAU))
