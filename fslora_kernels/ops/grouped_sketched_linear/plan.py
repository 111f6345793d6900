"""Which program works on which rows: the maps that the Triton kernels read, per offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from fslora_kernels.ops.sketched_linear.op import PADDED_RANKS, padded_ranks

# Depends on nothing else, so that the sum over a group's tokens is the same in any batch. A
# multiple of every tile's tokens.
TOKENS_PER_SPLIT = 512


@dataclass(frozen=True, slots=True)
class Bucket:
    """The groups that have tokens and whose ranks are padded to the same number.

    Attributes:
        padded: P, what their ranks are padded to.
        h_start: where their h ``[tokens, P]`` begins in the buffer of all, in elements.
        tokens: rows of that h.
        tiles: int32 ``[tiles, 6]``, what one program of ``grouped_apply_kernel`` works on.
        splits: int32 ``[splits, 5]``, what one program of ``grouped_wgrad_kernel`` sums over.
    """

    padded: int
    h_start: int
    tokens: int
    tiles: Tensor
    splits: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """What is launched for given offsets.

    Attributes:
        buckets: one launch each.
        parts: int32 ``[ΣS, 3]``, where ``grouped_reduce_kernel`` finds each rank's partial sums.
        partial_rows: rows of all partial sums.
        h_size: elements of all buckets' h.
    """

    buckets: tuple[Bucket, ...]
    parts: Tensor
    partial_rows: int
    h_size: int


# All layers of a model share their offsets, and copying a map to a device waits for it.
@lru_cache(maxsize=64)
def plan(
    token_offsets: tuple[int, ...],
    rank_offsets: tuple[int, ...],
    tile_tokens: tuple[int, ...],
    device: torch.device,
) -> Plan:
    """Lay out the work of a call.

    Args:
        token_offsets: ``[G + 1]``.
        rank_offsets: ``[G + 1]``.
        tile_tokens: rows of a tile of ``grouped_apply_kernel``, for each of ``PADDED_RANKS``.
        device: where the maps go.

    Returns:
        The plan. How a group is cut into tiles and splits depends on that group alone.
    """
    groups = list(zip(pairwise(token_offsets), pairwise(rank_offsets), strict=True))
    parts = [(0, 0, 0)] * rank_offsets[-1]
    buckets = []
    partial_rows = h_start = 0

    def on_device(rows: Sequence[tuple[int, ...]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).to(device)

    for padded, rows_per_tile in zip(PADDED_RANKS, tile_tokens, strict=True):
        tiles: list[tuple[int, ...]] = []
        splits: list[tuple[int, ...]] = []
        h_row = 0
        for group, ((first, last), (first_rank, last_rank)) in enumerate(groups):
            ranks = last_rank - first_rank
            if first == last or padded_ranks(ranks) != padded:
                continue
            shift = h_row - first
            tiles += [
                (group, row, min(row + rows_per_tile, last), row + shift, first_rank, ranks)
                for row in range(first, last, rows_per_tile)
            ]
            first_partial = partial_rows
            for row in range(first, last, TOKENS_PER_SPLIT):
                end = min(row + TOKENS_PER_SPLIT, last)
                splits.append((row, end, row + shift, partial_rows, ranks))
                partial_rows += ranks
            count = (partial_rows - first_partial) // ranks
            parts[first_rank:last_rank] = [
                (first_partial + rank, ranks, count) for rank in range(ranks)
            ]
            h_row += last - first
        if tiles:
            buckets.append(Bucket(padded, h_start, h_row, on_device(tiles), on_device(splits)))
            h_start += h_row * padded
    return Plan(tuple(buckets), on_device(parts), partial_rows, h_start)
