"""Drawing index sets: which ranks of which module are worked on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fslora_kernels.seeds import fold_in, splitmix64


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
    if not 1 <= size <= rank:
        raise ValueError(f"a sketch has 1 to {rank} ranks, got {size}")
    keys = np.array([fold_in(key, module) for module in modules], dtype=np.uint64)
    order = np.argsort(splitmix64(keys, rank), axis=1, kind="stable")[:, :size]
    return torch.from_numpy(np.sort(order, axis=1).astype(np.int64))


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
