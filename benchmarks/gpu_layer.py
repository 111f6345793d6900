"""Two stages of ``benchmarks.gpu``: the benchmarks ``layer`` and ``memory``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from time import perf_counter

import torch

from benchmarks import memory as decoder
from benchmarks.compare import Result, Timed
from benchmarks.counting import launches
from benchmarks.gpu import Row, Setting
from benchmarks.gpu_targets import NEEDED, PROJECTIONS, Extent, decoder_layer, grouped, layer_sum
from benchmarks.grid import keep, measure_cell
from benchmarks.lorafusion import load, lorafusion
from benchmarks.peers import Builder, base, delta_first, layer_rows, op, ours, peft
from benchmarks.problem import Problem, make_problem
from benchmarks.problem import Row as ProblemRow
from benchmarks.roofline import Ceilings
from benchmarks.shapes import CUDA, GPU_TARGETS, Cell
from benchmarks.table import cell_table
from benchmarks.timing import clock, provenance
from fslora_kernels import tuning

# Wall time for the timing of each cell; at least five rounds are run.
TARGET_SECONDS, CELL_SECONDS = 1.0, 0.3
_RESERVE_S = 30  # the start of the process, a last cell, launches, and the figure
BESIDE_COMPILED = ", beside torch.compile"
COMPARED = ("ours, float32", "ours, torch", "PEFT at R", "PEFT at R, float32")
COMPARED += ("PEFT at S, compiled", "PEFT at R, compiled")
_DRY_SHRINK = 128
_DRY_ROWS = 4
DRY_EXTENT = Extent(
    tokens=16, checked=8, groups=2, shrink=128, dtype=torch.float32, device="cpu", rounds=1
)

# -- layer -----------------------------------------------------------------------------------------


def layer(setting: Setting) -> Iterator[Row]:
    """Run the layer benchmark: first what the targets are stated on, then the default list.

    The series that the time allows are measured, one that may be tuned on and one that may not in
    turns; the last rows say how many, and where the figure is.
    """
    end = perf_counter() + setting.limit_s - _RESERVE_S
    (setting.out / "layer.jsonl").unlink(missing_ok=True)
    yield {"what": "tiles", "ok": True, "line": f"tiles: {_tiles(setting)}; {_tf32()}"}
    cells = Cells(setting)
    extent = DRY_EXTENT if setting.dry else Extent()
    for compare in (decoder_layer, grouped):
        yield _guarded(compare.__name__, partial(compare, extent, cells.measure))
    yield from cells.rows(_targets(setting), TARGET_SECONDS, end)
    yield layer_sum(cells.results)
    beside = Cells(setting, compiled=True)
    yield from beside.rows([c for c in _targets(setting) if c.name in PROJECTIONS], 0.5, end)
    yield layer_sum(beside.results, beside=BESIDE_COMPILED)
    known = {result.cell.id for result in cells.results}
    others = [cell for cell in _default(setting) if cell.id not in known]
    yield from cells.rows(others, CELL_SECONDS, end)
    yield _guarded("figure", partial(_figure, cells.results, setting))
    if not setting.dry:
        yield _guarded("launches", _launches)  # last: the profiler may slow what comes after it


class Cells:
    """Measures cells one after the other and keeps their results.

    Attributes:
        measure: the clock.
        results: of the cells so far.
    """

    def __init__(self, setting: Setting, *, compiled: bool = False) -> None:
        """Measure nothing yet; later the usual rows, or PEFT under torch.compile beside ours.

        Those are apart, as compiling takes longer than all else.
        """
        self._compiled = compiled
        self.measure = clock(setting.device)
        self.results: list[Result] = []
        self._setting = setting
        self._facts = {"benchmark": "layer", **provenance(setting.device)}
        self._known: dict[str, Ceilings] = {}

    def rows(self, cells: list[Cell], seconds: float, end: float) -> Iterator[Row]:
        """Yield a row for each cell until the time is up, and one that says how many."""
        for number, cell in enumerate(cells):
            if perf_counter() > end:
                rest = f"out of time: {number} of {len(cells)} cells; `benchmarks layer` has all"
                yield {"what": "cells left", "ok": True, "refused": rest, "line": rest}
                return
            what = f"{cell.id}{BESIDE_COMPILED * self._compiled}"
            yield _guarded(what, partial(self._row, cell, seconds))

    def _builders(self, cell: Cell) -> list[Builder]:
        dry = self._setting.dry
        if self._compiled:
            # A dry run does not wait for the compiler.
            ways = [partial(peft, full=full, compiled=not dry) for full in (False, True)]
            return [ours, base, *ways]
        rows: list[Builder] = layer_rows(cell, compiled=False)[: _DRY_ROWS if dry else None]
        if self._setting.lorafusion:
            rows.append(partial(_lorafusion, checkout=self._setting.lorafusion))
        if cell in _targets(self._setting):
            rows += [partial(op, implementation=name) for name in self._setting.implementations]
        return rows

    def _row(self, cell: Cell, seconds: float) -> Row:
        dry = self._setting.dry
        result = measure_cell(
            cell,
            self._builders(cell),
            self._known,
            self.measure,
            seconds=seconds,
            rounds=int(dry),
            shrink=16 if dry else 1,
        )
        self.results.append(result)
        keep(result, self._setting.out / "layer.jsonl", self._facts)
        return _cell_row(result, beside=BESIDE_COMPILED * self._compiled)


def _targets(setting: Setting) -> list[Cell]:
    if not setting.dry:
        return list(GPU_TARGETS)
    return [_small(cell) for cell in GPU_TARGETS if cell.name in PROJECTIONS]


def _default(setting: Setting) -> list[Cell]:
    """Return the default list, series that may be tuned on and others in turns."""
    tuned, unseen = ([s for s in CUDA if s.tuned is wanted] for wanted in (True, False))
    turns = chain.from_iterable(zip_longest(tuned, unseen))
    cells = [cell for series in turns if series is not None for cell in series.cells("cuda")]
    return [_small(cell) for cell in cells[2:4]] if setting.dry else cells


def _small(cell: Cell) -> Cell:
    """Shrink a cell for a CPU; Triton's interpreter has no bf16 products."""
    return replace(
        cell,
        tokens=16,
        in_features=cell.in_features // _DRY_SHRINK,
        out_features=cell.out_features // _DRY_SHRINK,
        rank=8,
        sketch_size=2 if cell.sketch_size < cell.rank else 8,
        dtype="float16",
        device="cpu",
    )


def _lorafusion(problem: Problem, *, checkout: Path) -> ProblemRow:
    """Load it only here: a checkout that cannot be imported is one red row."""
    return lorafusion(problem, function=load(checkout))


def _tf32() -> str:
    """Say how float32 products are computed: PEFT as it comes has some."""
    precision = torch.backends.cuda.matmul.fp32_precision
    return f"float32 products {'in TF32' if precision == 'tf32' else 'without TF32'}"


def _launches() -> Row:
    """Count the kernels of a step of some rows of the first target."""
    cell = GPU_TARGETS[0]
    problem = make_problem(cell)
    rows = [build(problem) for build in (ours, base, partial(peft, full=False), delta_first)]
    found = {row.name: launches(partial(row.step, problem.dy)) for row in rows}
    shown = ", ".join(f"{name} {count}" for name, count in found.items())
    line = f"{cell.id}: kernels of a step: {shown}"
    return {"what": "launches", "ok": True, "launches": found, "line": line}


def _tiles(setting: Setting) -> str:
    if setting.dry:
        return "the interpreter's"
    path = tuning.table_path(torch.cuda.get_device_name())
    return "defaults, nothing was measured on this device" if path is None else path.name


def _guarded(what: str, measure: Callable[[], Row]) -> Row:
    """Return a row that says so if measuring fails; the next one goes on."""
    try:
        return measure()
    except Exception as error:
        return {"what": what, "ok": False, "error": f"{type(error).__name__}: {error}"}


def _cell_row(result: Result, beside: str) -> Row:
    rows = {row.name: row for row in result.rows}
    # A peer that is wrong has no figures; the others' hold.
    defects = [red for red in result.red if red.ours or red.name in NEEDED]
    row: Row = {"what": f"{result.cell.id}{beside}", "ok": not defects}
    row["error"] = "; ".join(f"{red.name}: {red.error}" for red in defects) or None
    row["red"] = {red.name: red.error for red in result.red}
    row["ms"] = {n: 1e3 * statistics.median(r.seconds) for n, r in rows.items() if r.seconds}
    row["graph_ms"] = {n: 1e3 * r.graph_s for n, r in rows.items() if r.graph_s is not None}
    row["graph_errors"] = {n: r.graph_error for n, r in rows.items() if r.graph_error}
    row["slower_than_the_best_peer"] = result.slower
    row["table"] = cell_table(result)
    timed = all(rows[name].error is None for name in NEEDED)
    return row | {"line": _line(result, rows, beside)} if timed else row


def _line(result: Result, rows: dict[str, Timed], beside: str) -> str:
    ours, base = rows["ours"], rows["base"]
    text = f"{result.cell.id}{beside}: {1e3 * statistics.median(ours.seconds):.3f} ms = "
    text += f"{ours.over_base} × base, {ours.roofline:.0%} of the roofline"
    if ours.graph_s and base.graph_s:
        text += f", in a graph {1e3 * ours.graph_s:.3f} ms = {ours.graph_over_base}"
        text += f" (A/A {result.graph_spread})"
    for name in COMPARED:
        over = rows[name].ours_over if name in rows else None
        text += f"; ours ÷ {name} {over.median:.3f}" if over is not None else ""
    best = result.best_peer
    if best is not None:
        text += f"; best peer {best.name} {best.ours_over}{'   SLOWER' if result.slower else ''}"
    wrong = [red.name for red in result.red]
    return text + (f"; left out, wrong or failing: {', '.join(wrong)}" if wrong else "")


def _figure(results: list[Result], setting: Setting) -> Row:
    row: Row = {"what": "figure", "ok": True}
    try:
        import matplotlib as mpl
    except ImportError:
        return row | {"refused": "matplotlib is not installed; layer.jsonl has the figures"}
    from benchmarks.figure import draw

    draw(results, setting.out / "layer.png")
    return row | {"line": f"layer.png, {len(results)} cells, by matplotlib {mpl.__version__}"}


# -- memory ----------------------------------------------------------------------------------------

# The decoder layer of an 8B model.
SIZE = decoder.Size(
    batch=1,
    length=2048,
    hidden=4096,
    intermediate=14336,
    heads=32,
    rank=64,
    sketch_size=16,
    dtype="bfloat16",
    device="cuda",
)
DRY_SIZE = decoder.Size(batch=1, length=4, hidden=32, intermediate=48, heads=4)
DROPOUT = 0.1


def memory(setting: Setting) -> Iterator[Row]:
    """Count what a decoder layer keeps, ours and PEFT's, with and without dropout."""
    whole = decoder.Layer(DRY_SIZE if setting.dry else SIZE)
    wrong = decoder.errors(whole, DROPOUT)
    peers: dict[tuple[str, float], decoder.Held] = {}
    for held in decoder.rows(whole, (0.0, DROPOUT)):
        peers[held.row, held.dropout] = held
        row: Row = {"what": f"{held.row}, dropout {held.dropout:g}", "ok": held.row not in wrong}
        if held.row in wrong:
            yield row | {"error": wrong[held.row]}
            continue
        row |= asdict(held)
        peft = peers.get((decoder.peer_of(held.row), held.dropout), held)
        shares = [
            f"{name} {getattr(held, f'{name}_bytes') / 1e6:9.1f} MB "
            f"({getattr(held, f'{name}_bytes') / max(1, getattr(peft, f'{name}_bytes')):.2f})"
            for name in ("saved", "held", "peak")
        ]
        yield row | {"line": f"{row['what']:<32} {'   '.join(shares)}   in brackets: of PEFT's"}
