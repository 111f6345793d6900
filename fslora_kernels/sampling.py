"""Drawing index sets: which ranks of which module are worked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fslora_kernels.seeds import fold_in_each, splitmix64, uniform


def sketch_size(rank: int, ratio: float) -> int:
    """Return S for a sketch ratio: the nearest whole number of ranks, at least one.

    Raises:
        ValueError: the ratio is not in (0, 1].
    """
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"a sketch ratio is in (0, 1], got {ratio}")
    return max(1, round(rank * ratio))


def draw_uniform(key: int, modules: Sequence[str], rank: int, size: int) -> Tensor:
    """Draw one index set per module, each uniform over all sets of ``size`` ranks.

    Module m's set holds the ``size`` ranks with the smallest outputs of SplitMix64 started at
    ``fold_in(key, m)``: rank j gets the (j+1)-th output, ties go to the lower rank.

    Args:
        key: what the draw is for, such as ``fold_in(seed, step)``.
        modules: module names.
        rank: R.
        size: S.

    Returns:
        int64 ``[modules, S]``, each row ascending.

    Raises:
        ValueError: ``size`` is not in 1 … ``rank``.

    Source: arXiv 2501.19389, random-k sketches Ω, E[Ω] = I.
    """
    return draw_uniform_each([key], modules, rank, size)[0]


def draw_uniform_each(keys: Sequence[int], modules: Sequence[str], rank: int, size: int) -> Tensor:
    """As ``draw_uniform`` for each of several keys, in one pass.

    Returns:
        int64 ``[keys, modules, S]``, each row ascending.

    Raises:
        ValueError: ``size`` is not in 1 … ``rank``.
    """
    if not 1 <= size <= rank:
        raise ValueError(f"a sketch has 1 to {rank} ranks, got {size}")
    return _orders(keys, modules, rank)[..., :size].sort(dim=-1).values


def draw_orders(key: int, modules: Sequence[str], rank: int) -> Tensor:
    """Draw one order of all ranks per module; the first S of it are ``draw_uniform``'s set.

    Args:
        key: what the draw is for.
        modules: module names.
        rank: R.

    Returns:
        int64 ``[modules, R]``, each row a permutation, uniform over all of them.
    """
    return _orders([key], modules, rank)[0]


def _orders(keys: Sequence[int], modules: Sequence[str], rank: int) -> Tensor:
    outputs = splitmix64(fold_in_each(keys, modules), rank)
    order = np.argsort(outputs, axis=1, kind="stable").astype(np.int64)
    return torch.from_numpy(order).view(len(keys), len(modules), rank)


def inclusion_probabilities(sizes: Tensor, count: int) -> Tensor:
    """Return with what probability each rank is to be drawn: half by its size, half evenly.

    πⱼ = min(1, c pⱼ), pⱼ = ½ sizeⱼ / Σ size + ½ / R, with c such that Σ π = S. So πⱼ ≥ S / 2R: no
    rank is left out for good, and no weight 1/πⱼ is above twice R/S.

    Args:
        sizes: float64 ``[modules, R]``, not negative; a module of zeros is drawn evenly.
        count: S, less than R.

    Returns:
        float64 ``[modules, R]``.
    """
    rank = sizes.shape[1]
    total = sizes.sum(dim=1, keepdim=True)
    shares = 0.5 / rank + 0.5 * torch.where(total > 0, sizes / total, 1 / rank)
    certain = torch.zeros_like(shares, dtype=torch.bool)
    while True:
        rest = shares.masked_fill(certain, 0)
        left = count - certain.sum(dim=1, keepdim=True)
        found = rest * left / rest.sum(dim=1, keepdim=True)
        over = found >= 1 - 1e-9  # so near to 1 that rounding could draw it twice
        if not bool(over.any()):
            return torch.where(certain, 1.0, found)
        certain |= over


def draw_systematic(key: int, modules: Sequence[str], inclusion: Tensor) -> Tensor:
    """Draw one index set per module, of fixed size, each rank with its own probability.

    The ranks that are not certain are laid end to end in a random order, each as long as its
    probability, and those are drawn that u, u + 1, u + 2, … fall on, u uniform in (0, 1).

    Args:
        key: what the draw is for.
        modules: module names.
        inclusion: float64 ``[modules, R]``, each row with the sum S.

    Returns:
        int64 ``[modules, S]``, each row ascending.

    Source: Madow, 1949, systematic sampling with unequal probabilities.
    """
    drawn = []
    orders = draw_orders(key, modules, inclusion.shape[1])
    for module, order, probability in zip(modules, orders, inclusion, strict=True):
        certain = order[probability[order] == 1]
        others = order[probability[order] < 1]
        count = round(float(probability.sum())) - len(certain)
        ends = probability[others].cumsum(0)[:-1].contiguous()  # the last one's is the sum
        points = torch.arange(count, dtype=torch.float64) + uniform(key, module, "start")
        places = torch.searchsorted(ends, points, right=True)
        drawn.append(torch.cat([certain, others[places]]).sort().values)
    return torch.stack(drawn)


def draw_indices(key: int, ranks: Mapping[str, int], ratio: float) -> dict[str, Tensor | None]:
    """Draw an index set for each module, as ``sketch`` and ``extract`` take them.

    Args:
        key: what the draw is for: the same key gives the same sets, whatever was drawn before.
        ranks: module name to R (``fslora_kernels.ranks(model)``).
        ratio: sketch ratio S/R in (0, 1].

    Returns:
        Module name to int64 ``[S]``, ascending, by ``draw_uniform``; None where S = R.

    Raises:
        ValueError: the ratio is not in (0, 1].

    Example:
        >>> draw_indices(0, {"layer": 8}, 0.25)
        {'layer': tensor([3, 5])}
    """
    indices: dict[str, Tensor | None] = dict.fromkeys(ranks)
    for rank in set(ranks.values()):
        size = sketch_size(rank, ratio)
        if size < rank:
            modules = [module for module, found in ranks.items() if found == rank]
            rows = draw_uniform(key, modules, rank, size)
            indices.update(zip(modules, rows, strict=True))
    return indices
