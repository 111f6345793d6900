"""Comparisons that no single layer shows: a decoder layer's projections, and many adapters.

Results are checked against float64 before anything is timed; the ways to compute them take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.compare import Result
from benchmarks.gpu import Row
from benchmarks.graphs import InGraphs, take_turns_in_graphs
from benchmarks.peers import peft_model
from benchmarks.timing import Clock, take_turns
from fslora_kernels import (
    Projection,
    grouped_sketched_linear,
    shared_sketched_linear,
    sketched_linear,
)
from fslora_kernels.ops.grouped_sketched_linear.reference import reference as grouped_reference
from fslora_kernels.ops.sketched_linear.reference import reference
from fslora_kernels.testing import check_error_budget

SCALE = 2.0
# Cell to how often an 8B layer has it: o is as q, v as k, up as gate.
PROJECTIONS = {"8b-q": 2, "8b-k": 2, "8b-gate": 2, "8b-down": 1}
NEEDED = ("ours", "base")  # a cell without them says nothing
# What is printed of the sum; the stage's file has every row.
SHOWN = (
    "ours",
    "ours, float32",
    "ours, torch",
    "PEFT at S",
    "PEFT at S, float32",
    "PEFT at R",
    "PEFT at R, float32",
    "PEFT at S, compiled",
    "PEFT at R, compiled",
)
SHOWN += ("Unsloth style", "delta first")
# Its inputs: features in, and out of the projections that share the input.
INPUTS = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))


@dataclass(frozen=True, slots=True)
class Extent:
    """How large the comparisons are.

    Attributes:
        tokens: T of the decoder layer; of all groups together.
        checked: tokens that the decoder layer's results are checked on.
        sketch_size: S.
        groups: how many adapters share a batch.
        shrink: divides the features.
        dtype: of everything.
        device: torch's device type.
        seconds: timing of each comparison.
        rounds: exactly so many instead; 0 goes by ``seconds``.
    """

    tokens: int = 8192
    checked: int = 256
    sketch_size: int = 16
    groups: int = 16
    shrink: int = 1
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    seconds: float = 1.5
    rounds: int = 0

    def draw(self, seed: int, *shape: int, std: float = 1.0) -> Tensor:
        """Draw a tensor on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(*shape, generator=generator, device=self.device)
        return (values * std).to(self.dtype)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to compute something.

    Attributes:
        forward: returns the outputs.
        leaves: whose gradients are wanted.
        dys: gradients of the outputs.
    """

    forward: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor]
    dys: Sequence[Tensor]

    def step(self) -> tuple[Tensor, ...]:
        """Run forward and backward; return the gradients."""
        return torch.autograd.grad(self.forward(), self.leaves, self.dys)

    def results(self) -> list[Tensor]:
        """Return outputs and gradients."""
        return [*(y.detach() for y in self.forward()), *self.step()]


def _check(name: str, way: Way, eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    for number, result in enumerate(way.results()):
        what = f"{name}, result {number}"
        check_error_budget(result, eager[number], exact[number], name=what)


def _timed(what: str, ways: Mapping[str, Way], extent: Extent, measure: Clock) -> Row:
    """Time the first way in turns with the others, then all of them inside CUDA graphs."""
    steps = {name: way.step for name, way in ways.items()}
    (ours, first), *peers = steps.items()
    turns = take_turns(first, dict(peers), measure, seconds=extent.seconds, rounds=extent.rounds)
    times = {ours: turns.ours_s, **turns.peer_s}
    graphs = InGraphs()
    if extent.device == "cuda":
        graphs = take_turns_in_graphs(
            ours, steps, measure, seconds=extent.seconds, rounds=extent.rounds
        )
    in_graphs = {} if (g := graphs.turns) is None else {ours: g.ours_s, **g.peer_s}
    return {
        "what": what,
        "ok": True,
        "ms": {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()},
        "spread": str(turns.spread),
        "ratios": {name: str(turns.pairs(name).ratio) for name, _ in peers},
        "graph_ms": {name: 1e3 * statistics.median(s) for name, s in in_graphs.items()},
        "graph_spread": None if g is None else str(g.spread),
        "graph_errors": dict(graphs.errors),
    }


def _ratio(row: Row, of: str, to: str) -> str:
    """Print a ratio of medians, eager and inside a CUDA graph."""
    text = f"{row['ms'][of] / row['ms'][to]:.3f}"
    in_graph = [row["graph_ms"].get(name) for name in (of, to)]
    return f"{text} (in a graph {in_graph[0] / in_graph[1]:.3f})" if all(in_graph) else text


# -- a decoder layer -------------------------------------------------------------------------------


def layer_sum(results: Sequence[Result], beside: str = "") -> Row:
    """Add up the seven projections of an 8B layer, from cells that were measured one by one.

    Rows that are wrong in a cell are left out; ``beside`` says in the title what others there are.
    """
    cells = {result.cell.name: result for result in results if result.cell.name in PROJECTIONS}
    row: Row = {"what": f"8B layer, sum of seven projections{beside}", "ok": False}
    needed = [timed for result in cells.values() for timed in result.rows if timed.name in NEEDED]
    if cells.keys() != PROJECTIONS.keys() or any(timed.error for timed in needed):
        return row | {"error": f"not every one of {', '.join(PROJECTIONS)} was measured and right"}
    ms: dict[str, float] = {}
    graph_ms: dict[str, float] = {}
    for name in (timed.name for timed in cells["8b-q"].rows):
        found = [
            (1e3 * count, timed)
            for cell, count in PROJECTIONS.items()
            for timed in cells[cell].rows
            if timed.name == name and timed.error is None
        ]
        if len(found) < len(PROJECTIONS):
            continue  # a peer that is wrong somewhere has no sum
        ms[name] = sum(count * statistics.median(timed.seconds) for count, timed in found)
        in_graphs = [count * timed.graph_s for count, timed in found if timed.graph_s is not None]
        if len(in_graphs) == len(found):
            graph_ms[name] = sum(in_graphs)
    shown = []
    for name in (name for name in SHOWN if name in ms):
        shown.append(f"{name} {ms[name] / ms['base'] - 1:+.1%}")
        if name in graph_ms and "base" in graph_ms:
            shown[-1] += f" (in a graph {graph_ms[name] / graph_ms['base'] - 1:+.1%})"
    cell = cells["8b-q"].cell
    line = f"{row['what']}, S={cell.sketch_size}, T={cell.tokens}: base {ms['base']:.3f} ms; "
    line += f"beyond it (target: ours ≤ 11%) {', '.join(shown)}"
    return row | {"ok": True, "ms": ms, "graph_ms": graph_ms, "line": line}


@dataclass(frozen=True, slots=True)
class Shared:
    """Projections of one input.

    Attributes:
        x: ``[T, D]``, a leaf.
        projections: their factors are leaves.
        dys: ``[T, E]`` of each.
    """

    x: Tensor
    projections: Sequence[Projection]
    dys: Sequence[Tensor]

    def to(self, dtype: torch.dtype) -> Shared:
        """Return the same values in another dtype, as leaves of their own."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_()

        projections = [
            Projection(p.weight.to(dtype), leaf(p.lora_a), leaf(p.lora_b), scale=p.scale)
            for p in self.projections
            if p.weight is not None
        ]
        return Shared(leaf(self.x), projections, [dy.to(dtype) for dy in self.dys])


def _block(extent: Extent, tokens: int) -> list[Shared]:
    """Draw the seven projections of a decoder layer."""
    seeds, block = iter(range(1000)), []
    for full_in, full_outs in INPUTS:
        in_features, outs = full_in // extent.shrink, [n // extent.shrink for n in full_outs]
        projections = []
        for out in outs:
            weight = extent.draw(next(seeds), out, in_features, std=in_features**-0.5)
            lora_a, lora_b = (
                extent.draw(next(seeds), extent.sketch_size, size, std=std)
                for size, std in (
                    (in_features, in_features**-0.5),
                    (out, extent.sketch_size**-0.5),
                )
            )
            factors = lora_a.requires_grad_(), lora_b.t().requires_grad_()
            projections.append(Projection(weight, *factors, scale=SCALE))
        x = extent.draw(next(seeds), tokens, in_features).requires_grad_()
        dys = [extent.draw(next(seeds), tokens, out) for out in outs]
        block.append(Shared(x, projections, dys))
    return block


def _way(
    block: Sequence[Shared],
    forward: Callable[[Shared], Sequence[Tensor]],
    factors: Sequence[Tensor] | None = None,
) -> Way:
    """Apply ``forward`` to all inputs; ``factors`` are the projections' own if None."""
    own = [t for shared in block for p in shared.projections for t in (p.lora_a, p.lora_b)]
    return Way(
        lambda: [y for shared in block for y in forward(shared)],
        [*(shared.x for shared in block), *(own if factors is None else factors)],
        [dy for shared in block for dy in shared.dys],
    )


def _each(call: Callable[..., Tensor], shared: Shared) -> list[Tensor]:
    return [call(shared.x, p.weight, p.lora_a, p.lora_b, scale=p.scale) for p in shared.projections]


def _together(shared: Shared) -> Sequence[Tensor]:
    if len(shared.projections) == 1:
        return _each(sketched_linear, shared)
    return shared_sketched_linear(shared.x, shared.projections)


def _ours(block: Sequence[Shared]) -> dict[str, Way]:
    return {
        "ours": _way(block, partial(_each, sketched_linear)),
        "ours, shared x": _way(block, _together),
    }


def _peft(block: Sequence[Shared], *, as_it_comes: bool) -> Way:
    """PEFT's layers at rank S, with these factors."""
    layers = {
        id(p): peft_model(
            p.weight, p.lora_a, p.lora_b, scale=p.scale, as_it_comes=as_it_comes
        ).base_model.model[0]
        for shared in block
        for p in shared.projections
        if p.weight is not None
    }
    factors = [
        factor["default"].weight for it in layers.values() for factor in (it.lora_A, it.lora_B)
    ]
    return _way(block, lambda s: [layers[id(p)](s.x) for p in s.projections], factors)


def decoder_layer(extent: Extent, measure: Clock) -> Row:
    """Time the projections of an 8B layer as one step: q, k, v on one input, gate, up on another.

    Raises:
        AssertionError: a result of ours is wrong.
    """
    few = _block(extent, extent.checked)
    eager, exact = (
        _way([s.to(dtype) for s in few], partial(_each, reference)).results()
        for dtype in (extent.dtype, torch.float64)
    )
    for name, way in _ours(few).items():
        _check(name, way, eager, exact)
    block = _block(extent, extent.tokens)
    ways = {
        **_ours(block),
        "base": _way(
            block, lambda s: [functional.linear(s.x, p.weight) for p in s.projections], ()
        ),
        "PEFT": _peft(block, as_it_comes=False),
        "PEFT, float32": _peft(block, as_it_comes=True),
    }
    what = f"8B layer in one step, S={extent.sketch_size}, T={extent.tokens}"
    row = _timed(what, ways, extent, measure)
    over = ", ".join(f"{name} {_ratio(row, name, 'base')}" for name in ways if name != "base")
    line = f"{what}: base {row['ms']['base']:.3f} ms; over it (target: ours ≤ 1.11) {over}"
    return row | {"line": line}


# -- many adapters ---------------------------------------------------------------------------------


def grouped(extent: Extent, measure: Clock) -> Row:
    """Time adapters of one batch in one call, one after the other, and one adapter for all.

    Raises:
        AssertionError: a result of ours is wrong.
    """
    features, size, count = 4096 // extent.shrink, extent.sketch_size, extent.groups
    x = extent.draw(0, extent.tokens, features).requires_grad_()
    weight = extent.draw(1, features, features, std=features**-0.5)
    dy = extent.draw(2, extent.tokens, features)
    pool = [
        extent.draw(seed, count * size, features, std=std).requires_grad_()
        for seed, std in ((3, features**-0.5), (4, size**-0.5))
    ]
    tokens = [group * extent.tokens // count for group in range(count + 1)]
    ranks = [group * size for group in range(count + 1)]
    scale = torch.full((count,), SCALE, device=extent.device)
    lengths = [last - first for first, last in pairwise(tokens)]
    own = [
        [factor.detach()[first:last].clone().requires_grad_() for factor in pool]
        for first, last in pairwise(ranks)
    ]

    def at_once(call: Callable[..., Tensor], dtype: torch.dtype = extent.dtype) -> Way:
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (x, *pool)]
        base = weight.to(dtype)
        return Way(
            lambda: [call(leaves[0], base, *leaves[1:], tokens, ranks, scale=scale)],
            leaves,
            [dy.to(dtype)],
        )

    def one(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        return sketched_linear(x, weight, factors[0], factors[1].t(), scale=SCALE)

    ways = {
        "grouped": at_once(grouped_sketched_linear),
        "sequential": Way(
            lambda: list(map(one, x.split(lengths), own)),
            [x, *(factor for factors in own for factor in factors)],
            [*dy.split(lengths)],
        ),
        "one adapter": Way(lambda: [one(x, own[0])], [x, *own[0]], [dy]),
        "base": Way(lambda: [functional.linear(x, weight)], [x], [dy]),
    }
    eager, exact = (
        at_once(grouped_reference, dtype).results() for dtype in (extent.dtype, torch.float64)
    )
    _check("grouped", ways["grouped"], eager, exact)
    what = f"{count} adapters × {extent.tokens // count} tokens, {features}²"
    row = _timed(what, ways, extent, measure)
    return row | {
        "line": f"{what}: {row['ms']['grouped']:.3f} ms; sequential over it (target ≥ 2.5) "
        f"{_ratio(row, 'sequential', 'grouped')}, it over one adapter (target ≤ 1.05) "
        f"{_ratio(row, 'grouped', 'one adapter')}, over base {_ratio(row, 'grouped', 'base')}"
    }
