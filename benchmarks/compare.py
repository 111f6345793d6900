"""One cell: every row is judged, counted, and timed in turns with ours."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.checks import Referee
from benchmarks.counting import Operations
from benchmarks.graphs import InGraphs, take_turns_in_graphs
from benchmarks.peers import BASE_BY_ONEDNN, Builder
from benchmarks.problem import Problem, Row, make_problem
from benchmarks.roofline import Ceilings, least_time
from benchmarks.shapes import Cell
from benchmarks.timing import (
    LEAST_ROUNDS,
    SLOWER_ABOVE,
    Clock,
    Interval,
    Turns,
    bootstrap,
    ratio_of_medians,
    take_turns,
)
from fslora_kernels.memory import AliveBytes, addresses, saved_storages
from fslora_kernels.ops.sketched_linear import Cost, cost

FULL_PEFT = "PEFT at R"
FULL_OURS = "ours at R"
_BARE = ("base", BASE_BY_ONEDNN)  # no adapter, and so no peer
_PADDING = 16  # of ranks, in the Triton kernels
# Rows that are also timed inside a CUDA graph.
_IN_GRAPHS = frozenset(
    {"ours", "base", "ours, torch", "ours, triton", FULL_PEFT, "PEFT at S", "delta first"}
) | {"ours, float32", "PEFT at S, float32"}


@dataclass(frozen=True, slots=True)
class Counted:
    """What one step of a row does and keeps.

    Attributes:
        flops: executed, padding and masked ranks included.
        bytes_moved: read and written by each operation.
        launches: operations on a CPU; None on a GPU, where counting kernels takes a profiler, which
            may slow whatever is timed after it.
        saved_bytes: kept for the backward pass, x included, weight and factors not.
        peak_bytes: most bytes alive at once of all that the step made.
    """

    flops: int
    bytes_moved: int
    launches: int | None
    saved_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Timed:
    """One row of a cell's table.

    Attributes:
        name: of the row.
        ours: it is a way of ours, not a peer.
        error: why its figures are not shown; everything below is None then.
        seconds: each round's forward and backward.
        over_base: ratio to the bare base layer.
        over_peft: ratio to PEFT at rank R.
        ours_over: ours over this row, neighbour by neighbour.
        adapter_s: seconds beyond the bare base layer's in the same round.
        roofline: the least possible time of the cell over this row's.
        counted: None where counting cannot look inside.
        graph_s: median inside a CUDA graph, without the cost of Python and launching; some rows, on
            a GPU.
        graph_over_base: ratio to the bare base layer inside graphs, as ``over_base``.
        graph_error: why there is no such figure where there should be one.
    """

    name: str
    ours: bool
    error: str | None = None
    seconds: tuple[float, ...] = ()
    over_base: Interval | None = None
    over_peft: Interval | None = None
    ours_over: Interval | None = None
    adapter_s: Interval | None = None
    roofline: float | None = None
    counted: Counted | None = None
    graph_s: float | None = None
    graph_over_base: Interval | None = None
    graph_error: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One cell.

    Attributes:
        cell: what was measured.
        rows: ours first.
        spread: A/A of ours; None if ours is red.
        graph_spread: A/A of ours inside a CUDA graph; None where there is none.
        adapter_share: ours' adapter time at S over that at R, where S < R; beyond the bare layer by
            oneDNN where ours takes that.
        useful_flops: what the cell needs.
        least_s: its least possible time.
        ceilings: measured in the same run.
    """

    cell: Cell
    rows: list[Timed]
    spread: Interval | None
    adapter_share: Interval | None
    useful_flops: int
    least_s: float
    ceilings: Ceilings
    graph_spread: Interval | None = None

    @property
    def best_peer(self) -> Timed | None:
        """The row that ours does worst against; neither ours nor a bare base layer."""
        ratios = {
            row.ours_over.median: row
            for row in self.rows
            if row.ours_over is not None and not row.ours and row.name not in _BARE
        }
        return ratios[max(ratios)] if ratios else None

    @property
    def slower(self) -> bool:
        """Whether ours is slower than the best peer by more than the noise and 3%.

        Too few rounds have no interval and say nothing.
        """
        best = self.best_peer
        if best is None or best.ours_over is None or len(best.seconds) < LEAST_ROUNDS:
            return False
        return best.ours_over.low > SLOWER_ABOVE

    @property
    def red(self) -> list[Timed]:
        """Rows whose results are wrong."""
        return [row for row in self.rows if row.error is not None]


def compare(
    cell: Cell,
    builders: Iterable[Builder],
    ceilings: Ceilings,
    measure: Clock,
    *,
    seconds: float,
    rounds: int = 0,
) -> Result:
    """Judge, count and time a cell's rows.

    Args:
        cell: the shape.
        builders: of ours first, then the base and the others.
        ceilings: of this device and dtype.
        measure: the clock.
        seconds: wall time for the timing.
        rounds: exactly so many instead; 0 goes by ``seconds``.

    Returns:
        Everything that was found. A row whose results are wrong has no figures; where ours or the
        base is wrong, nothing is timed.
    """
    problem = make_problem(cell)
    referee = Referee(problem)
    rows = [_built(build, problem) for build in builders]
    if any(row.compiled for row in rows):
        # Else torch's limit of recompilations sends the layers of later cells back to eager.
        torch.compiler.reset()
    errors = {row.name: referee.error(row) for row in rows}
    ours, peers = rows[0], {row.name: row for row in rows[1:] if errors[row.name] is None}
    turns, graphs = None, InGraphs()
    counted: dict[str, Counted | None] = {}
    if errors[ours.name] is None and "base" in peers:
        steps = {name: partial(row.step, problem.dy) for name, row in peers.items()}
        own = partial(ours.step, problem.dy)
        turns = take_turns(own, steps, measure, seconds=seconds, rounds=rounds)
        if cell.device == "cuda":
            steps = {ours.name: own} | {n: step for n, step in steps.items() if n in _IN_GRAPHS}
            graphs = take_turns_in_graphs(
                ours.name, steps, measure, seconds=seconds / 2, rounds=rounds
            )
        counted = {row.name: _count(row, problem) for row in (ours, *peers.values())}
    least = partial(
        least_time,
        cell.tokens,
        cell.in_features,
        cell.out_features,
        itemsize_bytes=problem.x.itemsize,
        flop_rate=ceilings.flops_per_s,
        byte_rate=ceilings.bytes_per_s,
    )
    timed = []
    for row in rows:
        if errors[row.name] is not None or turns is None:
            error = errors[row.name] or f"not timed: {ours.name} or base is wrong"
            timed.append(Timed(row.name, row.ours, error))
            continue
        floor_s = least(0 if row.computes == "base" else cell.sketch_size)
        found = _timed(row, ours.name, turns, floor_s, counted[row.name])
        timed.append(_in_graph(found, ours.name, graphs))
    return Result(
        cell=cell,
        rows=timed,
        spread=None if turns is None else turns.spread,
        adapter_share=None if turns is None else _adapter_share(turns),
        useful_flops=sum(one.base_flops + one.lora_flops for one in _both(cell)),
        least_s=least(cell.sketch_size),
        ceilings=ceilings,
        graph_spread=None if graphs.turns is None else graphs.turns.spread,
    )


def _built(build: Builder, problem: Problem) -> Row:
    """Build a row; one that cannot be built is red, and the others go on."""
    try:
        return build(problem)
    except Exception as error:  # a peer that is missing or has another interface
        function = getattr(build, "func", build)
        options = ", ".join(f"{k}={v}" for k, v in getattr(build, "keywords", {}).items())
        failed = error

        def call() -> Tensor:
            raise failed

        return Row(f"{getattr(function, '__name__', function)} {options}".strip(), call, ())


def _in_graph(row: Timed, ours: str, graphs: InGraphs) -> Timed:
    """Add a row's figures from inside a CUDA graph, if it has any."""
    turns, name = graphs.turns, row.name
    row = replace(row, graph_error=graphs.errors.get(name))
    if turns is None or (name != ours and name not in turns.peer_s):
        return row
    seconds = turns.ours_s if name == ours else turns.peer_s[name]
    over = None
    if "base" in turns.peer_s:
        beside = turns.beside_s["base"] if name == ours else seconds
        over = bootstrap([a / b for a, b in zip(beside, turns.peer_s["base"], strict=True)])
    return replace(row, graph_s=statistics.median(seconds), graph_over_base=over)


def _both(cell: Cell, pad_ranks_to: int = 1) -> list[Cost]:
    """What the forward and the backward pass of a cell need."""
    return [
        cost(
            cell.tokens,
            cell.in_features,
            cell.out_features,
            cell.sketch_size,
            backward=backward,
            itemsize_bytes=getattr(torch, cell.dtype).itemsize,
            pad_ranks_to=pad_ranks_to,
        )
        for backward in (False, True)
    ]


def _count(row: Row, problem: Problem) -> Counted | None:
    """Run one step under the counters."""
    if row.compiled:
        return None
    cell, (x, *factors) = problem.cell, row.leaves
    inputs = [problem.weight, problem.dy, problem.index, problem.lora_a, problem.lora_b]
    known = addresses([*inputs, *factors])
    alive, operations = AliveBytes({*known, *addresses([x])}), Operations()
    with operations, alive:
        with saved_storages(known) as saved:
            y = row.call()
        torch.autograd.grad(y, row.leaves, problem.dy)
    executed, moved = operations.flops, operations.bytes_moved
    stated = sum(one.base_flops + one.lora_flops for one in _both(cell))
    if row.ours and cell.device != "cpu" and executed < stated:
        # Triton's launches are not torch calls: their share is stated, not counted.
        needed = _both(cell, _PADDING)
        executed = sum(one.base_flops + one.lora_flops for one in needed)
        moved += sum(one.lora_bytes for one in needed)
    return Counted(
        flops=executed,
        bytes_moved=moved,
        launches=operations.count if cell.device == "cpu" else None,
        saved_bytes=sum(saved.values()),
        peak_bytes=alive.peak,
    )


def _timed(row: Row, ours: str, turns: Turns, floor_s: float, counted: Counted | None) -> Timed:
    """Gather a row's figures, round by round against the base and PEFT."""
    is_ours = row.name == ours
    base_s = turns.peer_s["base"]
    seconds = turns.beside_s["base"] if is_ours else turns.peer_s[row.name]

    def over(name: str) -> Interval | None:
        if name not in turns.peer_s:
            return None
        if is_ours:
            return turns.pairs(name).ratio
        return bootstrap([a / b for a, b in zip(seconds, turns.peer_s[name], strict=True)])

    return Timed(
        name=row.name,
        ours=row.ours,
        seconds=tuple(turns.ours_s if is_ours else seconds),
        over_base=over("base"),
        over_peft=over(FULL_PEFT),
        ours_over=None if is_ours else turns.pairs(row.name).ratio,
        adapter_s=bootstrap([a - b for a, b in zip(seconds, base_s, strict=True)]),
        roofline=floor_s / statistics.median(seconds),
        counted=counted,
    )


def _adapter_share(turns: Turns) -> Interval | None:
    if FULL_OURS not in turns.peer_s:
        return None
    # Beyond the bare layer by the library that ours takes, else the library's gain hides the rest.
    bare = BASE_BY_ONEDNN if BASE_BY_ONEDNN in turns.peer_s else "base"
    base_s = turns.peer_s[bare]
    at_s = [a - b for a, b in zip(turns.beside_s[bare], base_s, strict=True)]
    at_r = [a - b for a, b in zip(turns.peer_s[FULL_OURS], base_s, strict=True)]
    return ratio_of_medians(at_s, at_r)


def record(result: Result, row: Timed) -> dict[str, object]:
    """Return everything about one row as plain values."""
    cell = result.cell
    return {
        "cell": {**asdict(cell), "id": cell.id, "ratio": cell.ratio},
        "least_s": result.least_s,
        "useful_flops": result.useful_flops,
        "ceilings": asdict(result.ceilings),
        "spread": result.spread and asdict(result.spread),
        "graph_spread": result.graph_spread and asdict(result.graph_spread),
        "adapter_share": result.adapter_share and asdict(result.adapter_share),
        **{("row" if key == "name" else key): value for key, value in asdict(row).items()},
    }
