"""Sums, norms and truncations of low-rank products, computed from the factors.

A pair ``[K, D]``, ``[K, E]`` stands for the matrix BA = Σₖ bₖ aₖᵀ, ``[E, D]``. One of as many ranks
as that matrix has may be the matrix itself, beside an identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from fslora.protocol import LoRAWeights


def stack(pairs: Sequence[LoRAWeights], weights: Sequence[float] | None = None) -> LoRAWeights:
    """Return the pair whose product is the sum of the pairs' products, exactly.

    Args:
        pairs: of one layer, of any ranks.
        weights: one factor for each product; default 1.

    Returns:
        ``[ΣK, D]`` and ``[ΣK, E]``.

    Source: arXiv 2409.05976: [B₁ … Bₙ] [A₁; …; Aₙ] = Σᵢ BᵢAᵢ.
    """
    scaled = [pair.lora_b for pair in pairs]
    if weights is not None:
        scaled = [b * weight for b, weight in zip(scaled, weights, strict=True)]
    return LoRAWeights(torch.cat([pair.lora_a for pair in pairs]), torch.cat(scaled))


def truncated(pair: LoRAWeights, rank: int) -> LoRAWeights:
    """Return the best approximation of a product by at most ``rank`` ranks, in order of size.

    QR of each factor leaves a core of at most K x K to decompose, O((D + E)K² + K³) operations
    instead of the O(DE min(D, E)) of the dense matrix. In float64, returned in the pair's type.

    Args:
        pair: ``[K, D]`` and ``[K, E]``.
        rank: at most so many ranks are kept.

    Returns:
        A with orthonormal rows (V), and B with the singular values in it (UΣ).
    """
    q_a, r_a = torch.linalg.qr(pair.lora_a.double().t())
    q_b, r_b = torch.linalg.qr(pair.lora_b.double().t())
    u, sizes, vh = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    kept = slice(rank)
    lora_b = (q_b @ (u * sizes)).t()[kept]
    lora_a = (vh @ q_a.t())[kept]
    return LoRAWeights(
        lora_a.to(pair.lora_a.dtype).contiguous(), lora_b.to(pair.lora_b.dtype).contiguous()
    )


def product(pair: LoRAWeights) -> Tensor:
    """Return BA itself, ``[E, D]``; nothing is multiplied by an identity."""
    a, b = pair
    if _is_identity(a):
        return b.t()
    return a if _is_identity(b) else b.t() @ a


def total(pairs: Sequence[LoRAWeights]) -> LoRAWeights:
    """Return the sum of the pairs' products as one pair of as few ranks as is cheap.

    Their stack; where that has more ranks than a matrix of its shape can have, the matrix itself,
    equal up to rounding.
    """
    most = min(pairs[0].lora_a.shape[1], pairs[0].lora_b.shape[1])
    return as_matrix(pairs) if sum(pair.rank for pair in pairs) > most else stack(pairs)


def as_matrix(pairs: Sequence[LoRAWeights]) -> LoRAWeights:
    """Return the sum of the pairs' products as one matrix, beside an identity as the other factor.

    It has as many ranks as a matrix of its shape can have. Summed in float64, returned in the
    pairs' type.
    """
    products = (product(LoRAWeights(*(t.double() for t in pair))) for pair in pairs)
    matrix = reduce(torch.add, products).to(pairs[0].lora_a.dtype)
    one = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    if matrix.shape[1] <= matrix.shape[0]:
        return LoRAWeights(one, matrix.t().contiguous())
    return LoRAWeights(matrix, one)


def _is_identity(factor: Tensor) -> bool:
    rows, width = factor.shape
    one = torch.eye(rows, dtype=factor.dtype, device=factor.device) if rows == width else None
    return one is not None and torch.equal(factor, one)


def padded(pair: LoRAWeights, rank: int) -> LoRAWeights:
    """Append ranks that are zero: ``[rank, D]`` and ``[rank, E]``."""
    return LoRAWeights(*(pad(t, (0, 0, 0, rank - pair.rank)) for t in pair))


def norm(pair: LoRAWeights) -> float:
    """Return ‖BA‖ (Frobenius), from the K x K Gram matrices of the factors."""
    a, b = (t.double() for t in pair)
    return float(((a @ a.t()) * (b @ b.t())).sum().clamp(min=0).sqrt())


def participation_rank(pair: LoRAWeights) -> float:
    """Return (Σ σ²)² / Σ σ⁴ of BA's singular values: n for n equal ones, 0 for BA = 0.

    σ² are the eigenvalues of (A Aᵀ)(B Bᵀ) of the stored factors, K x K, so that traces suffice.
    """
    grams = [t.double() @ t.double().t() for t in pair if not _is_identity(t)]
    core = reduce(torch.matmul, grams) if grams else torch.eye(pair.rank, dtype=torch.float64)
    fourth = float((core * core.t()).sum())
    return float(core.trace()) ** 2 / fourth if fourth > 0 else 0.0


def tail_norm(adapters: Mapping[str, LoRAWeights], first: int) -> Tensor:
    """Return Σ over modules of ‖B[:, first:]‖ ‖A[first:]‖ (Frobenius), a scalar."""
    norms = [
        torch.linalg.vector_norm(pair.lora_b[first:])
        * torch.linalg.vector_norm(pair.lora_a[first:])
        for pair in adapters.values()
    ]
    return torch.stack(norms).sum()
