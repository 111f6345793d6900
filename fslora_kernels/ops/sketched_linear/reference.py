"""What the operation means, in plain torch, forward only."""

import torch
from torch import Tensor


def reference(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    index: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    rank_weight: Tensor | None = None,
    kept: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return ``x Wᵀ + bias + scale · (drop(x) A[I]ᵀ ∘ rank_weight) B[:, I]ᵀ``.

    The arguments are those of ``sketched_linear``; ``kept`` is the dropout mask, of x's shape.
    Gradients of this operation come from autograd on this function in float64, never by hand.

    Source: arXiv 2501.19389, the sketched forward pass W0 + B Ω A with Ω = (R/S) Σ_{j∈I} e_j e_jᵀ;
    R/S is part of ``scale``.
    """
    if index is not None:
        lora_a, lora_b = lora_a[index], lora_b[:, index]
    dropped = x if kept is None else torch.where(kept, x / (1.0 - dropout), 0.0)
    h = dropped @ lora_a.to(x.dtype).T
    if rank_weight is not None:
        h = h * rank_weight.to(x.dtype)
    delta = scale * (h @ lora_b.to(x.dtype).T)
    if bias is not None:
        delta = delta + bias.to(x.dtype)
    return delta if weight is None else x @ weight.to(x.dtype).T + delta
