"""The figure: time, operations, bytes and memory against the sketch ratio, with the roofline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.compare import FULL_PEFT, Result, Timed
from benchmarks.shapes import Cell, ratio_name
from fslora.report.plots import DOWN, FULL_RANK, INK, SKETCHED, STYLE, TRAINING, UP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Row to label, colour, dash; the order is that of the legend. Others are in the table only.
LINES = {
    "ours": ("ours", FULL_RANK, "-"),
    FULL_PEFT: ("PEFT at rank R", TRAINING, "-"),
    "PEFT at S": ("PEFT at rank S", SKETCHED, "-"),
    "dense mask": ("dense mask", "#CC79A7", "--"),
    "Unsloth style": ("Unsloth style", DOWN, "--"),
    "delta first": ("torch, delta first", UP, "--"),
}
# At S = R these are what stands at rank S; the curves end there too.
_AT_FULL = {"PEFT at S": FULL_PEFT, "dense mask": FULL_PEFT}
_PANEL = (2.9, 2.9)  # inches
_LEGEND = 0.7


def need_matplotlib() -> None:
    """Check that a figure can be drawn, before there is anything to draw.

    Raises:
        ValueError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("the figure needs matplotlib: pip install matplotlib")


def draw(results: Sequence[Result], path: Path) -> None:
    """Write a PNG with a row of four panels for each series of cells.

    Args:
        results: cells; those that differ only in S become one row.
        path: of the PNG; its folder is made if missing.

    Raises:
        ValueError: matplotlib is not installed, or in no cell are ours and the base right.
    """
    need_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    groups: dict[str, list[Result]] = {}
    for result in results:
        if "ours" in _rows(result) and "base" in _rows(result):
            groups.setdefault(result.cell.series, []).append(result)
    if not groups:
        raise ValueError("in no cell were ours and the base measured and right")
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(4 * _PANEL[0], _LEGEND + _PANEL[1] * len(groups)))
        top, *strips = figure.subfigures(
            1 + len(groups), 1, height_ratios=[_LEGEND] + [_PANEL[1]] * len(groups)
        )
        for strip, group in zip(strips, groups.values(), strict=True):
            axes = strip.subplots(1, 4)
            _row(axes, sorted(group, key=lambda result: result.cell.ratio))
            strip.suptitle(_title(group[0].cell), x=0.01, ha="left", fontsize=10)
        handles, labels = axes[0].get_legend_handles_labels()
        columns = -(-len(labels) // 2)
        top.legend(handles, labels, loc="center left", ncols=columns, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def _rows(result: Result) -> dict[str, Timed]:
    return {row.name: row for row in result.rows if row.error is None}


def _title(cell: Cell) -> str:
    tuned = "may be tuned on" if cell.tuned else "unseen by tuning"
    return (
        f"{cell.name}: T = {cell.tokens}, {cell.in_features} → {cell.out_features}, "
        f"R = {cell.rank}, {cell.dtype}, {tuned}"
    )


def _row(axes: Sequence[Axes], group: list[Result]) -> None:
    """Draw one series: a panel for each quantity."""
    ratios = [result.cell.ratio for result in group]
    for panel, (title, read) in zip(axes, QUANTITIES.items(), strict=True):
        for place, (name, (label, colour, dash)) in enumerate(LINES.items()):
            points = [(r.cell.ratio, _value(r, name, read)) for r in group]
            shown = [(ratio, value) for ratio, value in points if value is not None]
            if shown:
                style = {"color": colour, "marker": "o", "markersize": 4, "label": label}
                # Equal curves are common: ours lies on top of them, and dashes on top of ours.
                style["zorder"] = 3 + (dash == "--") - 0.01 * place
                panel.plot(*zip(*shown, strict=True), dash, **style)
        panel.set_title(title)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ratios, [ratio_name(ratio) for ratio in ratios])
        panel.set_xticks([], minor=True)
        panel.set_xlabel("sketch ratio S/R")
    for panel in axes[1:]:
        panel.set_ylim(bottom=0)
    _intervals(axes[0], group)
    # One level for all ratios: what the bare base layer took over the whole series.
    base_s = statistics.median(s for result in group for s in _rows(result)["base"].seconds)
    least = [result.least_s / base_s for result in group]
    axes[0].plot(ratios, least, ":", color=INK, linewidth=1.4, label="least, by measured roofline")
    useful = [(result.useful_flops - _base_flops(result)) / 1e6 for result in group]
    axes[1].plot(ratios, useful, ":", color=INK, linewidth=1.4, zorder=5)


def _intervals(panel: Axes, group: list[Result]) -> None:
    """Draw ours' 95% intervals."""
    for result in group:
        over = _rows(result)["ours"].over_base
        if over is not None:
            panel.vlines(result.cell.ratio, over.low, over.high, color=FULL_RANK, linewidth=1.0)


def _base_flops(result: Result) -> int:
    counted = _rows(result)["base"].counted
    return 0 if counted is None else counted.flops


def _value(result: Result, name: str, read: Callable[[Timed, Timed], float | None]) -> float | None:
    rows = _rows(result)
    row = rows.get(name)
    if row is None and result.cell.ratio == 1.0:
        row = rows.get(_AT_FULL.get(name, ""))
    return None if row is None else read(row, rows["base"])


def _time(row: Timed, _base: Timed) -> float | None:
    return None if row.over_base is None else row.over_base.median


def _flops(row: Timed, base: Timed) -> float | None:
    if row.counted is None or base.counted is None:
        return None
    return (row.counted.flops - base.counted.flops) / 1e6


def _bytes(row: Timed, base: Timed) -> float | None:
    if row.counted is None or base.counted is None:
        return None
    return (row.counted.bytes_moved - base.counted.bytes_moved) / 1e6


def _peak(row: Timed, _base: Timed) -> float | None:
    return None if row.counted is None else row.counted.peak_bytes / 1e6


QUANTITIES: dict[str, Callable[[Timed, Timed], float | None]] = {
    "time over the bare base layer's": _time,
    "Mflop beyond the base layer": _flops,
    "MB moved beyond the base layer": _bytes,
    "peak memory of a step, MB": _peak,
}
