"""Drawing index sets: which ranks of which module a client works on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fslora.protocol import Sketch
from fslora.seeds import fold_in, splitmix64


def sketch_size(rank: int, ratio: float) -> int:
    """Return S for a sketch ratio: the nearest whole number of ranks, at least one.

    Raises:
        ValueError: the ratio is not in (0, 1].
    """
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"a sketch ratio is in (0, 1], got {ratio}")
    return max(1, round(rank * ratio))


def draw_sketches(key: int, modules: Sequence[str], rank: int, size: int) -> dict[str, Sketch]:
    """Draw one index set per module, each uniform over all sets of ``size`` ranks.

    Module m's set holds the ``size`` ranks with the smallest outputs of SplitMix64 started at
    ``fold_in(key, m)``: rank j gets the (j+1)-th output, ties go to the lower rank.

    Args:
        key: ``fold_in(seed, round, client)``.
        modules: module names.
        rank: R.
        size: S.

    Returns:
        Module name to its sketch; at S = R the index is None and nothing is drawn.

    Raises:
        ValueError: ``size`` is not in 1 … ``rank``.

    Source: arXiv 2501.19389, random-k sketches Ω, E[Ω] = I.
    """
    if not 1 <= size <= rank:
        raise ValueError(f"a sketch has 1 to {rank} ranks, got {size}")
    if size == rank:
        return {module: Sketch(None, rank) for module in modules}
    keys = np.array([fold_in(key, module) for module in modules], dtype=np.uint64)
    order = np.argsort(splitmix64(keys, rank), axis=1, kind="stable")[:, :size]
    indices = torch.from_numpy(np.sort(order, axis=1).astype(np.int64))
    return {module: Sketch(index, rank) for module, index in zip(modules, indices, strict=True)}
