"""What the operation means, in plain torch, forward only."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fslora_kernels.ops.sketched_linear.reference import reference as one_group


def reference(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    token_offsets: Sequence[int],
    rank_offsets: Sequence[int],
    index: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    scale: Tensor | Sequence[float],
) -> Tensor:
    """Return ``x Wᵀ + bias + scale_g · (x A[I_g]ᵀ) B[I_g]`` on the rows of every group g.

    The arguments are those of ``grouped_sketched_linear``: each group is one ``sketched_linear``.
    Gradients of this operation come from autograd on this function in float64, never by hand.
    """
    rows = []
    groups = zip(pairwise(token_offsets), pairwise(rank_offsets), scale, strict=True)
    for (first, last), (first_rank, last_rank), scale_g in groups:
        chosen = slice(first_rank, last_rank) if index is None else index[first_rank:last_rank]
        rows.append(
            one_group(
                x[first:last], weight, lora_a[chosen], lora_b[chosen].t(), bias=bias, scale=scale_g
            )
        )
    return torch.cat(rows)
