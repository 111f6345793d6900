"""The operation on Triton kernels that gather the selected ranks while they multiply.

Three kernels (``_tiles``). ``apply`` streams one block of rows of x past the gathered rows of A,
keeps the rounded h, and streams the gathered rows of Bᵀ past it: the delta. With the factors
exchanged the same kernel turns dy into dh and into the adapter's part of dx. ``wgrad`` sums hᵀ dy
and dhᵀ x over a fixed split of the tokens, and ``reduce`` adds the splits in their order and writes
the rows of the index: no atomics, so the gradients are the same bits in every run. The base product
is torch's, accumulated in place onto the delta. A dropout mask is drawn once, one bit a feature,
kept for the backward pass, and applied where the tiles are loaded: no dropped copy of x exists.

What it saves is passes over the activations, and copies of the selected factors. What it does not
do: it does not split a short batch over more programs, it is not fused into the base product, and
from 128 ranks on it leaves the field to torch, whose products are then limited by arithmetic. No
speed is claimed: the tiles (``configurations``) were chosen by ahead-of-time compilation (spills,
shared memory, matrix instructions), not by timing.

x and dy may have any strides, but rows that are not contiguous and aligned are copied in each pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fslora_kernels import _launch
from fslora_kernels._dispatch import interpreting
from fslora_kernels._tiles import (
    apply_kernel,
    mask_kernel,
    reduce_kernel,
    wgrad_kernel,
)
from fslora_kernels.ops.sketched_linear.configurations import (
    DROPPING,
    MASK,
    MAX_PADDED_WITH_DROPOUT,
    REDUCE,
    TILES,
    Tiles,
    apply_constants,
    mask_constants,
    reduce_constants,
    wgrad_constants,
)
from fslora_kernels.ops.sketched_linear.op import Arguments, padded_ranks
from fslora_kernels.tuning import measured_tiles

PROGRAMS_PER_PROCESSOR = 2


# -- where it runs ---------------------------------------------------------------------------------


def tiles_for(
    kernel: str,
    device: torch.device,
    arithmetic: str,
    padded: int,
    drop: str = "",
    asked: Tiles | None = None,
) -> Tiles:
    """Return the tiles that were measured on the device, or those that were chosen by compiling.

    Features are dropped from "x", or from "y", if any; some of that has tiles of its own, whatever
    is asked for.
    """
    target, _ = _launch.target_of(device)
    fixed = DROPPING.get((kernel, target, arithmetic, drop), {}).get(padded)
    if fixed is not None:
        return fixed
    if asked is not None:
        return asked
    default = TILES[kernel, target, arithmetic][padded]
    if device.type != "cuda":
        return default
    name = torch.cuda.get_device_name(device)
    return measured_tiles(name).get((kernel, arithmetic, padded), default)


def _ranks(arguments: Arguments) -> int:
    index = arguments.index
    return arguments.lora_a.shape[0] if index is None else index.shape[0]


# -- launchers -------------------------------------------------------------------------------------


def draw_mask(arguments: Arguments) -> Tensor:
    """Draw the dropout mask of x, eight features to a byte: uint8 ``[T, ⌈D/8⌉]``."""
    tokens, features = arguments.x.shape
    mask = torch.empty(tokens, -(-features // 8), dtype=torch.uint8, device=arguments.x.device)
    if tokens:
        _launch.launch(
            mask_kernel,
            (-(-mask.numel() // MASK.features),),
            MASK,
            mask,
            mask=mask,
            # 62 bits of it, and one above them: small numbers would be another type.
            seed=arguments.seed % 2**62 + 2**62,
            threshold=arguments.dropped,
            count=mask.numel(),
            **mask_constants(),
        )
    return mask


def apply(
    arguments: Arguments,
    x_TF: Tensor,
    u_RF: Tensor,
    v_RG: Tensor | None,
    bias: Tensor | None = None,
    *,
    drop_x: Tensor | None = None,
    drop_y: Tensor | None = None,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return h = gain · x u[I]ᵀ, its ranks padded, and y = h v[I] + bias (None without v).

    A mask drops features of x, or of the delta y.
    """
    tokens, features_in = x_TF.shape
    features_out = 0 if v_RG is None else v_RG.shape[1]
    ranks = _ranks(arguments)
    padded = padded_ranks(ranks)
    h_TP = torch.empty(tokens, padded, dtype=x_TF.dtype, device=x_TF.device)
    y_TG = None
    if v_RG is not None:
        y_TG = torch.empty(tokens, features_out, dtype=x_TF.dtype, device=x_TF.device)
    if not tokens:
        return h_TP, y_TG
    target, _ = _launch.target_of(x_TF.device)
    arithmetic = _launch.arithmetic_of(x_TF.dtype, target)
    mask = drop_x if drop_y is None else drop_y
    drop = "" if mask is None else "x" if drop_y is None else "y"
    tiles = tiles_for("apply", x_TF.device, arithmetic, padded, drop, tiles)
    x_TF, x_row = _launch.rows(x_TF)
    u_row, u_column, u_rows = _launch.strides(u_RF)
    v_row, v_column, v_rows = (0, 0, False) if v_RG is None else _launch.strides(v_RG)
    gain, index = arguments.kept_gain, arguments.index
    # An int would be compiled in, one kernel per value.
    if isinstance(gain, Tensor):
        gain = gain.to(x_TF.device, torch.float32).contiguous()
    else:
        gain = float(gain)
    constants = apply_constants(
        tiles,
        padded,
        arithmetic,
        drop_x=drop_x is not None,
        drop_y=drop_y is not None,
        has_index=index is not None,
        has_bias=bias is not None,
        has_gain_tensor=isinstance(gain, Tensor),
        u_rows=u_rows,
        v_rows=v_rows,
        expand=v_RG is not None,
    )
    _launch.launch(
        apply_kernel,
        (-(-tokens // tiles.tokens),),
        tiles,
        x_TF,
        x=x_TF,
        u=u_RF,
        v=v_RG,
        index=None if index is None else index.contiguous(),
        gain=gain,
        bias=None if bias is None else bias.to(x_TF.dtype).contiguous(),
        mask=mask,
        h=h_TP,
        y=y_TG,
        tokens=tokens,
        ranks=ranks,
        features_in=features_in,
        features_out=features_out,
        x_row=x_row,
        u_row=u_row,
        u_column=u_column,
        v_row=v_row,
        v_column=v_column,
        gain_stride=gain.ndim if isinstance(gain, Tensor) else 0,
        mask_row=0 if mask is None else mask.shape[1],
        **constants,
    )
    return h_TP, y_TG


def wgrad(
    arguments: Arguments,
    p_TP: Tensor,
    x_TF: Tensor,
    factor_RF: Tensor,
    drop_x: Tensor | None = None,
    *,
    tiles: Tiles | None = None,
) -> Tensor:
    """Return pᵀ x in the rows of the index of a tensor like the factor, strides included."""
    index = arguments.index
    out_RF = torch.empty_like(factor_RF) if index is None else torch.zeros_like(factor_RF)
    tokens, features = x_TF.shape
    if not tokens:
        return out_RF.zero_()
    ranks, padded = _ranks(arguments), p_TP.shape[1]
    target, processors = _launch.target_of(x_TF.device)
    arithmetic = _launch.arithmetic_of(x_TF.dtype, target)
    drop = "" if drop_x is None else "x"
    tiles = tiles_for("wgrad", x_TF.device, arithmetic, padded, drop, tiles)
    x_TF, x_row = _launch.rows(x_TF)
    # Enough programs for every processor, split the same way for the same shape on the same device.
    columns, blocks = -(-features // tiles.features), -(-tokens // tiles.tokens)
    splits = min(blocks, max(1, PROGRAMS_PER_PROCESSOR * processors // columns))
    tokens_per_split = -(-blocks // splits) * tiles.tokens
    splits = -(-tokens // tokens_per_split)
    partial = torch.empty(splits, ranks, features, dtype=torch.float32, device=x_TF.device)
    _launch.launch(
        wgrad_kernel,
        (columns, splits),
        tiles,
        x_TF,
        p=p_TP,
        x=x_TF,
        mask=drop_x,
        partial=partial,
        tokens=tokens,
        ranks=ranks,
        features=features,
        x_row=x_row,
        tokens_per_split=tokens_per_split,
        mask_row=0 if drop_x is None else drop_x.shape[1],
        **wgrad_constants(tiles, padded, arithmetic, drop_x=drop_x is not None),
    )
    _launch.launch(
        reduce_kernel,
        (-(-features // REDUCE.features), -(-ranks // REDUCE.tokens)),
        REDUCE,
        x_TF,
        partial=partial,
        index=None if index is None else index.contiguous(),
        out=out_RF,
        ranks=ranks,
        features=features,
        splits=splits,
        out_row=out_RF.stride(0),
        out_column=out_RF.stride(1),
        **reduce_constants(has_index=index is not None),
    )
    return out_RF


# -- the backend -----------------------------------------------------------------------------------


def refuses(arguments: Arguments) -> str | None:
    """Say why the kernels cannot, or should not, run this call."""
    x_TD, lora_a, lora_b = arguments.x, arguments.lora_a, arguments.lora_b
    reason = _launch.refuses(x_TD, lora_a, lora_b, _ranks(arguments), "the selection")
    if reason is not None or interpreting():
        return reason
    return _launch.unknown_target(x_TD.device, TILES) or _refuses_on_gpu(arguments)


def _refuses_on_gpu(arguments: Arguments) -> str | None:
    lora_a, lora_b = arguments.lora_a, arguments.lora_b
    if arguments.dropout and (
        arguments.x.dtype == torch.float32
        or padded_ranks(_ranks(arguments)) > MAX_PADDED_WITH_DROPOUT
    ):
        return (
            "with dropout the kernels spill registers in float32 and at more than "
            f"{MAX_PADDED_WITH_DROPOUT} ranks; torch regenerates the mask"
        )
    features = (lora_a.shape[1], lora_b.shape[1])
    if any(size == 0 or size % _launch.ALIGNMENT for size in features):
        return (
            f"in_features and out_features must be multiples of {_launch.ALIGNMENT}, else the "
            f"kernels spill registers, but are {features[0]} and {features[1]}"
        )
    if not _launch.strides(lora_a)[2]:
        return "lora_a's rows are not contiguous and aligned; pass lora_a.contiguous()"
    for name, factor in (("lora_a", lora_a), ("lora_b", lora_b)):
        if factor.data_ptr() % _launch.ALIGNMENT:
            unit = _launch.ALIGNMENT
            return f"{name} does not start at a multiple of {unit} bytes; pass {name}.clone()"
    return None


def forward(arguments: Arguments) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return y ``[T, E]``, and what the backward pass keeps.

    That is h times the gain, its ranks padded to a power of two, ``[T, P]``, and under dropout the
    mask, one bit a feature.
    """
    x_TD = arguments.x
    mask = draw_mask(arguments) if arguments.dropout else None
    h_TP, y_TE = apply(
        arguments, x_TD, arguments.lora_a, arguments.lora_b, arguments.bias, drop_x=mask
    )
    if arguments.weight is not None:
        y_TE.addmm_(x_TD, arguments.weight.to(x_TD.dtype).t())
    return y_TE, (h_TP,) if mask is None else (h_TP, mask)


def backward(
    arguments: Arguments,
    kept: tuple[Tensor, ...],
    dy_TE: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B (those that ``needs`` asks for).

    A and B's gradients have the shapes and strides of the arguments; rows outside the index set
    are zero.
    """
    h_TP, mask = kept if len(kept) == 2 else (*kept, None)
    needs_x, needs_a, needs_b = needs
    dx = da = db = None
    if dy_TE.shape[0]:
        dy_TE, _ = _launch.rows(dy_TE)
    if needs_b:
        db = wgrad(arguments, h_TP, dy_TE, arguments.lora_b)
    if not (needs_x or needs_a):
        return dx, da, db
    if needs_x:
        dh_TP, dx = apply(arguments, dy_TE, arguments.lora_b, arguments.lora_a, drop_y=mask)
    else:
        dh_TP, _ = apply(arguments, dy_TE, arguments.lora_b, None)
    if needs_a:
        da = wgrad(arguments, dh_TP, arguments.x, arguments.lora_a, mask)
    if needs_x and arguments.weight is not None:
        dx.addmm_(dy_TE, arguments.weight.to(dy_TE.dtype))
    return dx, da, db
