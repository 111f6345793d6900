"""Shapes that every backend is tested, tuned and measured on, declared once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Case:
    """One call's shape and what is special about it.

    Attributes:
        name: readable id.
        tokens: T.
        in_features: D.
        out_features: E.
        rank: R.
        sketch_size: S, or None for no index at all.
        bias: the layer has a bias.
        base: False computes the delta alone.
        strided_x: x is a transposed view.
        rank_major_b: lora_b is the transpose of a contiguous ``[R, E]``.
        rank_weight: importance weights on the ranks.
        tensor_scale: the scale is a tensor.
        dropout: probability.
    """

    name: str
    tokens: int
    in_features: int
    out_features: int
    rank: int
    sketch_size: int | None
    bias: bool = False
    base: bool = True
    strided_x: bool = False
    rank_major_b: bool = False
    rank_weight: bool = False
    tensor_scale: bool = False
    dropout: float = 0.0


CASES = (
    Case("full_rank", 64, 64, 96, 16, None),
    Case("full_rank_bias", 33, 48, 80, 8, None, bias=True),
    Case("half", 64, 64, 64, 16, 8),
    Case("one_rank", 64, 64, 64, 16, 1),
    Case("every_rank_by_index", 40, 32, 64, 8, 8),
    Case("odd_everything", 37, 51, 29, 13, 5, bias=True),
    Case("compact_leaf", 64, 64, 96, 8, None, rank_major_b=True),
    Case("view_rank_major", 64, 64, 96, 16, 4, rank_major_b=True),
    Case("strided_x", 48, 64, 64, 16, 4, strided_x=True),
    Case("delta_alone", 48, 64, 64, 16, 4, base=False),
    Case("delta_alone_bias", 17, 64, 32, 16, 16, base=False, bias=True),
    Case("rank_weight", 48, 64, 64, 16, 4, rank_weight=True),
    Case("tensor_scale", 48, 64, 64, 16, 4, tensor_scale=True),
    Case("dropout", 48, 64, 64, 16, 4, dropout=0.25),
    Case("dropout_compact_bias", 33, 64, 80, 8, None, bias=True, rank_major_b=True, dropout=0.5),
    Case("dropout_odd", 37, 51, 29, 13, 5, tensor_scale=True, dropout=0.25),
    Case("no_tokens", 0, 64, 64, 16, 4, bias=True),
    Case("one_token", 1, 64, 64, 16, 4),
    Case("many_ranks", 64, 96, 64, 128, 72),
    Case("tall", 300, 32, 32, 16, 2),
)
