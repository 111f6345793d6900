"""What a user could run instead of our layer, and our layer: one small builder for each row.

Every row takes the tensors of one cell and gives y and the gradients of x, A and B.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

import fslora_kernels
from benchmarks.problem import Problem, Row
from benchmarks.shapes import Cell
from fslora_kernels import _onednn
from fslora_kernels._dispatch import IMPLEMENTATIONS, unavailable

Builder = Callable[[Problem], Row]
BASE_BY_ONEDNN = "base, oneDNN"


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).requires_grad_()


def _x(problem: Problem) -> Tensor:
    return problem.x.detach().requires_grad_()


# -- torch -----------------------------------------------------------------------------------------


def base(problem: Problem) -> Row:
    """The bare base layer: forward and the gradient of x."""
    x = _x(problem)
    return Row("base", lambda: functional.linear(x, problem.weight), (x,), computes="base")


class _ByOneDNN(torch.autograd.Function):
    """A bare linear layer by the library that our layer takes on some processors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weight)
        return _onednn.product(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (weight,) = ctx.saved_tensors
        return _onednn.product(dy, weight), None


def base_by_onednn(problem: Problem) -> Row:
    """The bare base layer by oneDNN: what part of our layer's time is the library's."""
    x = _x(problem)

    def call() -> Tensor:
        result: Tensor = _ByOneDNN.apply(x, problem.weight)
        return result

    return Row(BASE_BY_ONEDNN, call, (x,), computes="base")


def _bare(cell: Cell) -> list[Builder]:
    """The bare layer, by both libraries where ours takes the other one."""
    shape = (cell.tokens, cell.in_features, cell.out_features)
    float32 = cell.device == "cpu" and cell.dtype == "float32"
    return [base, base_by_onednn] if float32 and _onednn.pays(*shape) else [base]


def eager(problem: Problem) -> Row:
    """Plain torch on the selected factors, as one would write it down."""
    x, (a, b) = _x(problem), map(_leaf, problem.selected())

    def call() -> Tensor:
        return x @ problem.weight.T + problem.scale * ((x @ a.T) @ b.T)

    return Row("eager", call, (x, a, b))


def index_select(problem: Problem) -> Row:
    """Full factors, gathered in every forward pass; their gradients have full shapes."""
    x, a, b = _x(problem), _leaf(problem.lora_a), _leaf(problem.lora_b)

    def call() -> Tensor:
        h = functional.linear(x, a.index_select(0, problem.index))
        delta = functional.linear(h, b.index_select(1, problem.index))
        return functional.linear(x, problem.weight) + delta * problem.scale

    return Row("index_select", call, (x, a, b))


def dense_mask(problem: Problem) -> Row:
    """The published way: all ranks are computed, and those outside the sketch multiplied by zero.

    The mask is applied to the hidden ranks, the cheapest place for it.
    """
    x, a, b = _x(problem), _leaf(problem.lora_a), _leaf(problem.lora_b)
    mask = torch.zeros_like(problem.lora_a[:, 0])
    mask[problem.index] = 1.0

    def call() -> Tensor:
        delta = functional.linear(functional.linear(x, a) * mask, b)
        return functional.linear(x, problem.weight) + delta * problem.scale

    return Row("dense mask", call, (x, a, b))


class _DeltaFirst(torch.autograd.Function):
    """The honest rival: the delta is written first, the base product accumulated into it."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        h = torch.mm(x, a.t()).mul_(scale)
        ctx.save_for_backward(x, weight, a, b, h)
        ctx.scale = scale
        return torch.mm(h, b).addmm_(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, a, b, h = ctx.saved_tensors
        db = torch.mm(h.t(), dy)
        dh = torch.mm(dy, b.t()).mul_(ctx.scale)
        dx = torch.mm(dh, a).addmm_(dy, weight)
        return dx, None, torch.mm(dh.t(), x), db, None


class _UnslothStyle(torch.autograd.Function):
    """Base product first, the delta added in place; x Aᵀ computed again and dy B twice in backward.

    Both weight gradients are oriented as a CPU likes them best. Source: the scheme of Unsloth's
    ``LoRA_W``, written anew.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return torch.mm(x, weight.t()).addmm_(torch.mm(x, a.t()), b.t(), alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, a, b = ctx.saved_tensors
        da = torch.mm(torch.mm(dy, b).t(), x).mul_(ctx.scale)
        db = torch.mm(torch.mm(x, a.t()).t(), dy).mul_(ctx.scale).t()
        dx = torch.mm(dy, weight).addmm_(torch.mm(dy, b), a, alpha=ctx.scale)
        return dx, None, da, db, None


def delta_first(problem: Problem) -> Row:
    """Torch's products in our order, rank-major B: what our torch path must not lose to."""
    x, (a, b) = _x(problem), problem.selected()
    a, b = _leaf(a), _leaf(b.t())

    def call() -> Tensor:
        result: Tensor = _DeltaFirst.apply(x, problem.weight, a, b, problem.scale)
        return result

    return Row("delta first", call, (x, a, b), rank_major_b=True)


def unsloth_style(problem: Problem) -> Row:
    """Unsloth's scheme on the selected factors."""
    x, (a, b) = _x(problem), map(_leaf, problem.selected())

    def call() -> Tensor:
        result: Tensor = _UnslothStyle.apply(x, problem.weight, a, b, problem.scale)
        return result

    return Row("Unsloth style", call, (x, a, b))


# -- PEFT ------------------------------------------------------------------------------------------


def peft_model(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float, as_it_comes: bool = False
) -> nn.Module:
    """Return a vanilla PEFT model of one linear layer that holds these factors.

    Args:
        weight: ``[E, D]``, used as it is.
        lora_a: ``[R, D]``, copied.
        lora_b: ``[E, R]``, copied.
        scale: of the delta.
        as_it_comes: keep PEFT's default, adapters in float32; else they take the weight's dtype.
    """
    from peft import LoraConfig, get_peft_model

    rank = lora_a.shape[0]
    plain = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
    plain[0].weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=["0"])
    model = get_peft_model(plain, config, autocast_adapter_dtype=as_it_comes)
    layer = model.base_model.model[0]
    layer.to(weight.device)
    if not as_it_comes:
        layer.to(weight.dtype)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(lora_a)
        layer.lora_B["default"].weight.copy_(lora_b)
    return model


def peft_layer(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> nn.Module:
    """Return vanilla PEFT's layer with these factors, in the weight's dtype."""
    return peft_model(weight, lora_a, lora_b, scale=scale).base_model.model[0]


def peft(
    problem: Problem,
    *,
    full: bool,
    as_it_comes: bool = False,
    autocast: bool = False,
    compiled: bool = False,
) -> Row:
    """PEFT at rank R or at rank S, in one of the ways that people run it."""
    factors = (problem.lora_a, problem.lora_b) if full else problem.selected()
    scale = problem.full_scale if full else problem.scale
    fp32 = as_it_comes or autocast
    model = peft_model(problem.weight, *factors, scale=scale, as_it_comes=fp32)
    layer = model.base_model.model[0]
    x = _x(problem)
    run: Callable[[Tensor], Tensor] = torch.compile(layer) if compiled else layer

    def under_autocast() -> Tensor:
        with torch.autocast(problem.cell.device, problem.x.dtype):
            return run(x)

    way = ", float32" * as_it_comes + ", autocast" * autocast + ", compiled" * compiled
    return Row(
        f"PEFT at {'R' if full else 'S'}{way}",
        under_autocast if autocast else lambda: run(x),
        (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight),
        computes="full" if full else "sketch",
        compiled=compiled,
    )


# -- ours ------------------------------------------------------------------------------------------


def ours(
    problem: Problem, *, full: bool = False, view: bool = False, as_it_comes: bool = False
) -> Row:
    """Our layer on a PEFT model: compact leaves at S or R, or (view) full factors and an index.

    The model is PEFT's as it comes, adapters in float32, or has adapters of the weight's dtype.
    """
    scale = problem.full_scale
    model = peft_model(
        problem.weight, problem.lora_a, problem.lora_b, scale=scale, as_it_comes=as_it_comes
    )
    fslora_kernels.fuse(model)
    (name,) = fslora_kernels.modules(model)
    layer = model.get_submodule(name)
    index = None if full or problem.cell.sketch_size == problem.cell.rank else problem.index
    if view:
        fslora_kernels.sketch(model, {name: index})
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    else:
        leaves = fslora_kernels.extract(model, {name: index})
        fslora_kernels.bind(model, leaves)
        a, b = leaves[name].lora_a, leaves[name].lora_b
    x = _x(problem)
    title = "ours at R" if full else "ours, view" if view else "ours"
    title += ", float32" * as_it_comes
    computes: Literal["full", "sketch"] = "full" if full else "sketch"
    return Row(title, lambda: layer(x), (x, a, b), computes, ours=True, rank_major_b=not view)


def op(problem: Problem, *, implementation: str | None = None, view: bool = False) -> Row:
    """Our operation without a layer around it."""
    x, (a, b) = _x(problem), problem.selected()
    a, b = (_leaf(problem.lora_a), _leaf(problem.lora_b)) if view else (_leaf(a), _leaf(b.t()))
    title = f"ours, {implementation}" if implementation else "ours, view" if view else "ours"

    def call() -> Tensor:
        return fslora_kernels.sketched_linear(
            x,
            problem.weight,
            a,
            b if view else b.t(),
            problem.index if view else None,
            scale=problem.scale,
            implementation=implementation,
        )

    return Row(title, call, (x, a, b), ours=True, rank_major_b=not view)


# -- lists -----------------------------------------------------------------------------------------


def layer_rows(cell: Cell, *, compiled: bool) -> list[Builder]:
    """List the rows of the layer benchmark: ours first, then the base, then the peers."""
    sketched = cell.sketch_size < cell.rank
    rows: list[Builder] = [ours, *_bare(cell)]
    for full in (True, False) if sketched else (True,):
        rows.append(partial(peft, full=full))
        if cell.dtype != "float32":
            rows += [partial(peft, full=full, **{w: True}) for w in ("as_it_comes", "autocast")]
        if compiled:
            rows.append(partial(peft, full=full, compiled=True))
    if sketched:
        rows += [partial(ours, full=True), partial(ours, view=True), dense_mask, index_select]
    if cell.dtype != "float32":
        rows.append(partial(ours, as_it_comes=True))
    return [*rows, unsloth_style, delta_first]


def kernel_rows(cell: Cell, *, compiled: bool) -> list[Builder]:
    """List the rows of the kernel benchmark: ours as dispatch chooses, then what else there is."""
    del compiled
    can = [name for name in IMPLEMENTATIONS if unavailable(name, cell.device) is None]
    rows: list[Builder] = [op, *_bare(cell), delta_first, unsloth_style, eager]
    if len(can) > 1:
        rows += [partial(op, implementation=name) for name in can]
    if cell.sketch_size < cell.rank:
        rows += [index_select, partial(op, view=True)]
    return rows
