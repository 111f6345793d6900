"""The pictures of a comparison: the figure against rounds, bytes and simulated time."""

import textwrap
from typing import TYPE_CHECKING, Any

from fslora.report.comparison_tables import figure_name, value_of
from fslora.report.plots import (
    INK,
    empty_figure,
    house_style,
    png_of,
    whole_numbers,
)
from fslora.report.records import Record
from fslora.report.units import byte_unit, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008) without their yellow, which a white page swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
DASHES = ("-", "--", ":")
_LEGEND_ROW = 0.22  # inches
_LEGEND_LETTERS = 44  # of the names in a line; their figures come on top
_LINE_LETTERS = 66  # of a name and its figure in a line of their own
_MOST_BANDS = 4
_MANY_DECADES = 1e3
_LOG_FROM = 5.0  # where costs differ more than this, the cheap methods would share a sliver


def draw_comparison(data: Record) -> dict[str, bytes]:
    """Draw the curves of one data set.

    Returns:
        PNG files by name: `rounds.png`, `bytes.png` and, with a clock, `time.png`.

    Raises:
        ValueError: matplotlib is not installed.
    """
    axes_of = {"rounds.png": "round", "bytes.png": "bytes", "time.png": "sim_seconds"}
    with house_style():
        drawn = {name: draw_curves(data, key) for name, key in axes_of.items()}
        return {name: png_of(figure) for name, figure in drawn.items() if figure is not None}


def draw_curves(data: Record, against: str) -> "Figure | None":
    """The figure's mean over the seeds, and its 95% interval: a band, or a bar at the end.

    A method that pays nothing is a dotted line across, at the height where it ended.

    Args:
        data: a data set of `compare.json`.
        against: "round", "bytes" or "sim_seconds".
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    curves = {each["label"]: each["curve"] for each in data["strategies"] if each["curve"]}
    ends = [_cost(curve[-1], against) for curve in curves.values()]
    paid = [end for end in ends if end]
    if not paid:
        return None
    size, label = _unit(against, max(paid))
    columns = _legend_columns(list(curves))
    labels = {
        name: textwrap.fill(f"{name} {value_of(curve[-1]['value']['mean'], data)}", _LINE_LETTERS)
        for name, curve in curves.items()
    }
    rows = sum(len(text.splitlines()) for text in labels.values())
    figure = empty_figure(3.4 + _LEGEND_ROW * -(-rows // columns))
    axes = figure.subplots()
    logarithmic = against != "round" and max(paid) > _LOG_FROM * min(paid)
    lines, bars, drawn = [], [], []
    for place, (name, curve) in enumerate(curves.items()):
        style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)]}
        style["label"] = labels[name]
        if not _cost(curve[-1], against):
            if _cost(curve[-1], against) is None:
                continue
            drawn += curve[-1:]
            height = _scaled(curve[-1]["value"]["mean"], data)
            lines.append(axes.axhline(height, linestyle=(0, (1, 2)), **style))
            continue
        # A logarithmic axis has no place for what nothing was paid for.
        points = [point for point in curve if _cost(point, against) or not logarithmic]
        drawn += points
        x = [(_cost(point, against) or 0) / size for point in points]
        style["linestyle"] = DASHES[place // len(COLOURS) % len(DASHES)]
        lines += _curve(axes, x, points, data, style)
        end = {key: curve[-1]["value"][key] for key in ("low", "high")}
        if not has_bands(data) and end["low"] is not None:
            scaled = {key: _scaled(value, data) for key, value in end.items()}
            bars.append((x[-1], scaled, style["color"]))
    _bars(figure, axes, bars)
    if logarithmic:
        axes.set_xscale("log")
        costs = [_cost(point, against) for curve in curves.values() for point in curve]
        least = min(cost for cost in costs if cost)
        wide = max(paid) > _MANY_DECADES * least  # "2" and "5" would have no room
        axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        label += ", logarithmic"
    else:
        axes.set_xlim(0, max(paid) / size * 1.01)
    if against == "round":
        axes.xaxis.set_major_locator(whole_numbers())
    axes.set_xlabel(label)
    axes.set_ylabel(figure_name(data))
    axes.set_ylim(*_limits(drawn, [curve[-1] for curve in curves.values()], data))
    figure.legend(
        handles=lines,
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=3.2,  # or dashes look like the line of the first method in their colour
    )
    return figure


def _legend_columns(names: list[str]) -> int:
    """Two where the names of both have room beside each other, else one."""
    half = -(-len(names) // 2)
    widths = [max(map(len, part), default=0) for part in (names[:half], names[half:])]
    return 2 if sum(widths) <= _LEGEND_LETTERS else 1


def has_bands(data: Record) -> bool:
    """Whether the lines are few enough to see the bands around them."""
    return sum(bool(each["curve"]) for each in data["strategies"]) <= _MOST_BANDS


def _curve(
    axes: "Axes",
    x: list[float],
    points: list[Record],
    data: Record,
    style: dict[str, Any],
) -> list[Any]:
    """A line of means, and a band of intervals where lines are few and seeds several."""
    means = [_scaled(point["value"]["mean"], data) for point in points]
    few = len(x) <= 25
    drawn = axes.plot(x, means, marker="o" if few else "", markersize=3.5, **style)
    if has_bands(data) and all(point["value"]["low"] is not None for point in points):
        low, high = ([_scaled(p["value"][end], data) for p in points] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
    return list(drawn)


def _bars(figure: "Figure", axes: "Axes", ends: list[tuple[float, Record, str]]) -> None:
    """Intervals as bars at the ends of lines: (x, interval, colour) of each."""
    from matplotlib.transforms import ScaledTranslation

    for at, (x, found, colour) in enumerate(ends):
        # Side by side, as lines often end in one place.
        place = sum(abs(other - x) < 0.03 * x for other, *_ in ends[:at])
        aside = ScaledTranslation(0.05 + 0.045 * place, 0, figure.dpi_scale_trans)
        axes.plot(
            [x, x],
            [found["low"], found["high"]],
            color=colour,
            linewidth=1.4,
            transform=axes.transData + aside,
            clip_on=False,
        )


def _limits(drawn: list[Record], ends: list[Record], data: Record) -> tuple[float, float]:
    """Room for the means that are drawn, and for the intervals at the ends."""
    keys = [(point, "mean") for point in drawn]
    keys += [(point, end) for point in ends for end in ("low", "high")]
    values = [point["value"][key] for point, key in keys if point["value"][key] is not None]
    heights = [_scaled(value, data) for value in values]
    room = 0.05 * (max(heights) - min(heights)) or 0.5
    return min(heights) - room, max(heights) + room


def _scaled(value: float, data: Record) -> float:
    return 100 * value if data["figure"] == "metric" else value


def _cost(point: Record, against: str) -> float | None:
    """How far along the axis a point is, None where it was not measured."""
    found: float | None = point["round"] if against == "round" else point[against]["mean"]
    return found


def _unit(against: str, most: float) -> tuple[float, str]:
    if against == "round":
        return 1.0, "round"
    if against == "bytes":
        size, unit = byte_unit(most)
        return size, f"moved so far, up and down, all clients ({unit})"
    seconds, unit = time_unit(most)
    return seconds, f"simulated time on the clients' devices ({unit})"
