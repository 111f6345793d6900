"""The command line that the layer and kernel benchmarks share: a list of cells, one table each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.compare import Result, compare, record
from benchmarks.figure import draw, need_matplotlib
from benchmarks.flags import at_least
from benchmarks.lorafusion import load, lorafusion
from benchmarks.peers import Builder
from benchmarks.problem import missing_for
from benchmarks.roofline import Ceilings, ceilings
from benchmarks.shapes import Cell, cells
from benchmarks.table import LEGEND, cell_table, cell_title, summary
from benchmarks.timing import Clock, append_record, check_device, clock, provenance

RowList = Callable[..., list[Builder]]
_SECONDS = {"cpu": 5.0, "cuda": 2.0}


def run(name: str, about: str | None, row_list: RowList, arguments: Sequence[str]) -> int:
    """Measure the chosen cells; return 1 if a row is wrong, 2 if the flags are."""
    chosen = _flags(name, about).parse_args(arguments)
    try:
        if not chosen.list:
            check_device(chosen.device)
        chosen_cells = cells(chosen.device, full=chosen.full, names=chosen.shapes)
        fusion = load(chosen.lorafusion) if chosen.lorafusion else None
        if chosen.figure:
            need_matplotlib()
    except ValueError as error:
        print(f"benchmarks {name}: {error}", file=sys.stderr)
        return 2
    if chosen.list:
        print("\n".join(map(cell_title, chosen_cells)))
        return 0
    torch.set_num_threads(1)
    measure = clock(chosen.device)
    known: dict[str, Ceilings] = {}
    results = []
    facts = provenance(chosen.device) | {"threads": torch.get_num_threads()}
    print(f"{facts['device']}, commit {facts['commit']}, {_clock_name(chosen.device)}\n{LEGEND}\n")
    for number, cell in enumerate(chosen_cells, 1):
        if reason := missing_for(cell):
            print(f"{cell.id} is left out: {reason}\n")
            continue
        new = cell.dtype not in known
        result = measure_cell(
            cell,
            _rows(row_list(cell, compiled=chosen.compile), fusion),
            known,
            measure,
            seconds=chosen.seconds or _SECONDS[chosen.device],
            rounds=chosen.repeats,
        )
        if new:
            print(f"ceilings measured now, {cell.dtype}: {known[cell.dtype]}\n")
        results.append(result)
        print(f"[{number}/{len(chosen_cells)}] {cell_table(result)}\n", flush=True)
        if chosen.out:
            keep(result, chosen.out, {"benchmark": name, **facts})
    print(summary(results))
    if chosen.figure:
        try:
            draw(results, chosen.figure)
            print(f"figure: {chosen.figure}")
        except ValueError as error:
            print(f"no figure: {error}", file=sys.stderr)
    return int(any(result.red for result in results))


def _rows(rows: list[Builder], fusion: Callable[..., Tensor] | None) -> list[Builder]:
    return rows if fusion is None else [*rows, partial(lorafusion, function=fusion)]


def measure_cell(
    cell: Cell,
    rows: Sequence[Builder],
    known: dict[str, Ceilings],
    measure: Clock,
    *,
    seconds: float,
    rounds: int = 0,
    shrink: int = 1,
) -> Result:
    """Measure one cell, and the ceilings of its dtype if they are not known.

    Args:
        cell: the shape.
        rows: of ours first, then the base and the others.
        known: name of a dtype to its ceilings in this run; what is missing is added.
        measure: the clock.
        seconds: wall time for the timing.
        rounds: exactly so many instead; 0 goes by ``seconds``.
        shrink: as in ``ceilings``.
    """
    if cell.dtype not in known:
        dtype: torch.dtype = getattr(torch, cell.dtype)
        known[cell.dtype] = ceilings(cell.device, dtype, measure, shrink=shrink)
    return compare(cell, rows, known[cell.dtype], measure, seconds=seconds, rounds=rounds)


def keep(result: Result, path: Path, facts: dict[str, object]) -> None:
    """Append a line of JSON for every row of a cell."""
    for row in result.rows:
        append_record(path, {**facts, **record(result, row)})


def _clock_name(device: str) -> str:
    if device == "cuda":
        return "times by the GPU's own events, caches flushed"
    return "one thread, CPU time of this process"


def _flags(name: str, about: str | None) -> argparse.ArgumentParser:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The columns:\n{LEGEND}\n\nExample: a quick look at one layer\n"
        f"  python -m benchmarks {name} --shapes square-768-t512 --seconds 3 --figure look.png",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=(),
        metavar="NAME",
        help="only cells whose names begin so (or match, with *); --list shows all names",
    )
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--full", action="store_true", help="the whole grid: hours on a CPU")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.0,
        help="timing of each cell; default 5 on a CPU, 2 on a GPU, but at least five rounds",
    )
    parser.add_argument(
        "--repeats",
        type=at_least(0),
        default=0,
        help="exactly so many rounds a cell, not by seconds",
    )
    if name == "layer":
        parser.add_argument(
            "--compile",
            action=argparse.BooleanOptionalAction,
            default=gpu,
            help="rows for PEFT under torch.compile (a minute for each shape on a CPU)",
        )
    else:
        parser.set_defaults(compile=False)  # no row of PEFT
    parser.add_argument(
        "--lorafusion", type=Path, help="a checkout of LoRAFusion, for a row of it (needs a GPU)"
    )
    parser.add_argument("--out", type=Path, help="append every row to this JSONL file")
    parser.add_argument("--figure", type=Path, help="draw time, FLOPs, bytes and memory (PNG)")
    return parser
