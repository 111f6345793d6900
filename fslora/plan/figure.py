"""The picture of a plan: what other choices would cost, and how the figure is to fall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fslora.plan.report import Plan
from fslora.plan.solve import Outlook
from fslora.report.plots import FULL_RANK, SKETCHED, TRAINING, house_style, png_of
from fslora.report.units import byte_unit, format_ratio, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PLANNED, _MOST = SKETCHED, TRAINING


def draw_plan(plan: Plan) -> bytes:
    """Draw a plan as PNG: bytes against time of the choices, and the predicted curves.

    Raises:
        ValueError: matplotlib is not installed.
    """
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10.4, 3.8))
        left, right = figure.subplots(1, 2)
        _trade_off(left, plan)
        _curves(right, plan)
        return png_of(figure)


def _trade_off(axes: Axes, plan: Plan) -> None:
    problem, best = plan.problem, plan.solution.outlook
    uniform = [problem.outlook(sizes, interval=False) for sizes in problem.uniform()]
    uniform = [one for one in uniform if math.isfinite(one.seconds)]
    shown = [one for one in (*uniform, plan.most, best) if math.isfinite(one.seconds)]
    second, second_name = time_unit(max(one.seconds for one in shown))
    byte, byte_name = byte_unit(max(one.moved_bytes for one in shown))

    def points(rows: Sequence[Outlook]) -> tuple[list[float], list[float]]:
        return [o.seconds / second for o in rows], [o.moved_bytes / byte for o in rows]

    axes.plot(*points(uniform), "o-", color=FULL_RANK, markersize=4, label="one ratio for all")
    for one in uniform[:: max(1, len(uniform) - 1)]:
        ratio = format_ratio(max(one.sizes) / problem.costs.rank)
        at = (one.seconds / second, one.moved_bytes / byte)
        axes.annotate(ratio, at, (6, 8), textcoords="offset points", color=FULL_RANK)
    axes.plot(*points([plan.most]), "s", color=_MOST, markersize=8, label="each class its most")
    axes.plot(*points([best]), "*", color=_PLANNED, markersize=15, label="planned")
    axes.set(
        xlabel=f"time to the target ({second_name})",
        ylabel=f"moved until then ({byte_name})",
        title="Predicted cost of the choices",
        xlim=(0, 1.12 * max(one.seconds for one in shown) / second),
        ylim=(0, 1.2 * max(one.moved_bytes for one in shown) / byte),
    )
    axes.legend()


def _curves(axes: Axes, plan: Plan) -> None:
    fit, target = plan.problem.fit, plan.config.target
    rows = [
        ("planned", plan.solution.outlook, _PLANNED, "-"),
        ("each class its most", plan.most, _MOST, "-"),
        ("best ratio for all", plan.uniform, FULL_RANK, "--"),
    ]
    finite = [row.seconds for _, row, *_ in rows if math.isfinite(row.seconds)]
    longest = max(finite)
    unit, name = time_unit(longest)
    for label, row, colour, style in rows:
        if not math.isfinite(row.seconds):
            continue
        # To the target and not beyond: a pilot says nothing of what comes after it.
        times = np.linspace(0, row.rounds_high * row.round_seconds, 200)
        low, middle, high = (
            fit.values(times / row.round_seconds, rounds / fit.full_rounds[-1])
            for rounds in (row.rounds_low, row.rounds, row.rounds_high)
        )
        axes.plot(times / unit, middle, style, color=colour, label=label)
        axes.fill_between(times / unit, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(target.value, color="#8a8a8a", linestyle=":")
    axes.set(
        xlabel=f"simulated time ({name})",
        ylabel=target.figure,
        title="Predicted curves, 5th to 95th percentile",
    )
    axes.legend()
