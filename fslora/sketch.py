"""Sketches of a client: one index set per module."""

from __future__ import annotations

from collections.abc import Sequence

from fslora.protocol import Sketch
from fslora_kernels.sampling import draw_uniform


def draw_sketches(key: int, modules: Sequence[str], rank: int, size: int) -> dict[str, Sketch]:
    """Draw one index set per module by ``fslora_kernels.sampling.draw_uniform``.

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
    if size == rank:
        return {module: Sketch(None, rank) for module in modules}
    rows = draw_uniform(key, modules, rank, size)
    return {module: Sketch(row, rank) for module, row in zip(modules, rows, strict=True)}
