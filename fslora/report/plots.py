"""The pictures of a report, drawn with matplotlib's object API: no window, no global figure.

Colours are those of Okabe and Ito (2008), which colour-blind readers tell apart; one colour means
one thing in all pictures.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fslora.report.records import Run, is_number
from fslora.report.units import byte_unit, format_bytes, format_ratio, format_seconds, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

FULL_RANK, SKETCHED, TRAINING = "#0072B2", "#D55E00", "#767676"
UP, DOWN = "#009E73", "#56B4E9"
INK = "#1a1a1a"
WIDTH = 5.2  # inches: letters of 10 points are still legible where a phone shrinks the picture
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a name with $ in it is a name
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8a8a8a",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
    "savefig.dpi": 200,
}


def draw_all(run: Run) -> dict[str, bytes]:
    """Draw what the run has figures for.

    Returns:
        PNG files by name, in the order of the page: `loss.png`, `bytes.png`, `time.png`,
        `classes.png`, `coverage.png`; one for which nothing was recorded is absent.

    Raises:
        ValueError: matplotlib is not installed.
    """
    with house_style():
        figures = {
            "loss.png": draw_loss(run),
            "bytes.png": draw_bytes(run),
            "time.png": draw_time(run),
            "classes.png": draw_classes(run),
            "coverage.png": draw_coverage(run),
        }
        return {name: png_of(figure) for name, figure in figures.items() if figure is not None}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in the style of all our pictures.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ValueError(
            "the report draws with matplotlib: pip install 'fslora[report]'"
        ) from error
    with mpl.rc_context():
        # The user's own matplotlibrc (TeX, dark styles) must not break the pictures.
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def draw_loss(run: Run) -> "Figure | None":
    """Losses against rounds; the metric on a panel below where there is one."""
    lines = [
        ("train_loss", "training", TRAINING, "-"),
        ("eval_loss", "evaluation,\nfull rank", FULL_RANK, "-"),
        ("eval_loss_sketched", "evaluation,\nsketched", SKETCHED, "--"),
    ]
    losses = {key: run.series(key) for key, *_ in lines}
    lines = [line for line in lines if losses[line[0]][0]]
    if not lines:
        return None
    metric_rounds, metric = run.series("eval_metric")
    figure = empty_figure(5.2 if metric else 3.4)
    panels = figure.subplots(2 if metric else 1, squeeze=False, sharex=True)[:, 0]
    for key, _, colour, dash in lines:
        _line(panels[0], *losses[key], colour, dash)
    panels[0].set_ylabel("loss (nats)")
    _label_ends(panels[0], [(losses[key][1][-1], name, colour) for key, name, colour, _ in lines])
    if metric:
        _line(panels[1], metric_rounds, metric, FULL_RANK, "-")
        panels[1].set_ylabel(run.score)
        _label_ends(panels[1], [(metric[-1], "full rank", FULL_RANK)])
    panels[-1].set_xlabel("round")
    panels[-1].set_xlim(0, max(run.rounds_done, 1))
    panels[-1].xaxis.set_major_locator(whole_numbers())
    return figure


def draw_bytes(run: Run) -> "Figure | None":
    """Full-rank evaluation loss against the bytes moved so far, both directions together."""
    moved = 0
    points = []
    for record in run.rounds:
        moved += record["bytes_up"] + record["bytes_down"]
        if is_number(record["eval_loss"]):
            points.append((moved, record["eval_loss"]))
    if not points or moved == 0:
        return None
    most = max(run.full_rank_bytes or 0, moved)
    size, unit = byte_unit(most)
    figure = empty_figure(3.4)
    axes = figure.subplots()
    _line(axes, [at / size for at, _ in points], [loss for _, loss in points], FULL_RANK, "-")
    axes.set_xlabel(f"moved so far, up and down, all clients ({unit})")
    axes.set_ylabel("evaluation loss, full rank (nats)")
    axes.set_title(f"● this run {format_bytes(moved)}", color=FULL_RANK)
    if run.full_rank_bytes:
        _reference(axes, run.full_rank_bytes / size)
        full_rank = f"┆ FedAvg-LoRA at full rank {format_bytes(run.full_rank_bytes)}"
        axes.set_title(full_rank, loc="right")
    axes.set_xlim(0, most / size * 1.06)
    return figure


def draw_time(run: Run) -> "Figure | None":
    """The whole adapter's metric, or its loss where there is none, against simulated seconds."""
    figure_name = run.judged_by
    points = [
        (record["sim_seconds_total"], record[figure_name])
        for record in run.rounds
        if is_number(record.get("sim_seconds_total")) and is_number(record[figure_name])
    ]
    if not points or points[-1][0] == 0:
        return None
    size, unit = time_unit(points[-1][0])
    metric = figure_name == "eval_metric"
    name = run.score if metric else "evaluation loss"
    figure = empty_figure(3.4)
    axes = figure.subplots()
    _line(axes, [at / size for at, _ in points], [value for _, value in points], FULL_RANK, "-")
    axes.set_xlabel(f"simulated time on the clients' devices ({unit})")
    axes.set_ylabel(f"{name}, full rank" + ("" if metric else " (nats)"))
    axes.set_title(f"{points[-1][1]:.3f} after {format_seconds(points[-1][0])}", color=FULL_RANK)
    axes.set_xlim(0, points[-1][0] / size * 1.06)
    return figure


def draw_classes(run: Run) -> "Figure | None":
    """Bytes per participation of each capacity class; its loss before and after, where known."""
    classes = [record for record in run.classes if record["participations"]]
    if not classes:
        return None
    losses = [
        record
        for record in classes
        if is_number(record.get("loss_before")) and is_number(record.get("loss_after"))
    ]
    heights = [1.1 + 0.62 * len(classes)] + ([0.9 + 0.42 * len(losses)] if losses else [])
    figure = empty_figure(sum(heights))
    panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    _class_bytes(panels[0], run, classes)
    if losses:
        _class_losses(panels[1], losses)
    return figure


def draw_coverage(run: Run) -> "Figure | None":
    """How many of the cohort's modules trained each rank component: bars, or a map over rounds."""
    records = run.coverage
    if not records:
        return None
    from matplotlib.ticker import PercentFormatter

    percent = PercentFormatter(1, decimals=0)
    shares_RT = list(zip(*(record["coverage"] for record in records), strict=True))
    figure = empty_figure(3.4)
    axes = figure.subplots()
    if len(records) == 1:
        axes.bar(range(len(shares_RT)), records[0]["coverage"], color=FULL_RANK)
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_formatter(percent)
        axes.set_ylabel("clients' modules that trained it")
        axes.set_xlabel("rank component")
        axes.xaxis.set_major_locator(whole_numbers())
        return figure
    image = axes.imshow(
        shares_RT,
        cmap="viridis",
        vmin=0,
        aspect="auto",
        interpolation="nearest",
        extent=(records[0]["round"] - 0.5, records[-1]["round"] + 0.5, len(shares_RT) - 0.5, -0.5),
    )
    axes.grid(visible=False)
    axes.set_xlabel("round")
    axes.set_ylabel("rank component")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(whole_numbers())
    bar = figure.colorbar(image, ax=axes, format=percent)
    bar.set_label("clients' modules that trained it")
    bar.outline.set_visible(False)
    return figure


def _class_bytes(axes: "Axes", run: Run, classes: list[dict[str, Any]]) -> None:
    """Horizontal bars, up above down, and a line where full rank would be."""
    total = sum(record["participations"] for record in classes)
    full = {}
    if run.summary is not None:
        full = {way: run.summary[f"full_rank_bytes_{way}"] / total for way in ("up", "down")}
    bars = [
        (row, way, record[f"bytes_{way}"] / record["participations"])
        for row, record in enumerate(classes)
        for way in ("up", "down")
    ]
    longest = max([value for _, _, value in bars] + list(full.values()))
    size, unit = byte_unit(longest)
    for row, way, value in bars:
        middle = row + (-0.2 if way == "up" else 0.2)
        axes.barh(middle, value / size, 0.38, color=UP if way == "up" else DOWN)
        inside = value > 0.55 * longest
        axes.annotate(
            f"{format_bytes(value)} {way}",
            (value / size, middle),
            xytext=(-4 if inside else 4, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=9,
        )
    for value in full.values():
        _reference(axes, value / size)
    axes.set_title("bytes per participation" + (" (┆ full rank)" if full else ""))
    axes.set_xlabel(unit)
    axes.set_xlim(0, longest / size * 1.06 or 1)
    _class_rows(axes, classes)


def _class_losses(axes: "Axes", classes: list[dict[str, Any]]) -> None:
    """One line a class, from a ring (before) to a dot (after)."""
    for row, record in enumerate(classes):
        before, after = record["loss_before"], record["loss_after"]
        axes.plot([before, after], [row, row], color="#bdbdbd", zorder=1)
        axes.scatter(before, row, s=45, facecolor="white", edgecolor=FULL_RANK, zorder=2)
        axes.scatter(after, row, s=45, color=FULL_RANK, zorder=2)
        for value, left in ((before, before < after), (after, after <= before)):
            axes.annotate(
                f"{value:.3f}",
                (value, row),
                xytext=(-7 if left else 7, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=9,
            )
    axes.set_title("loss, ○ before and ● after")
    axes.set_xlabel("loss (nats)")
    axes.margins(x=0.25)
    _class_rows(axes, classes)


def _class_rows(axes: "Axes", classes: list[dict[str, Any]]) -> None:
    axes.set_yticks(range(len(classes)), [format_ratio(record["ratio"]) for record in classes])
    axes.set_ylim(len(classes) - 0.45, -0.55)
    axes.set_ylabel("sketch ratio")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _line(axes: "Axes", x: list[Any], y: list[float], colour: str, dash: str) -> None:
    few = len(x) <= 25
    axes.plot(x, y, dash, color=colour, marker="o" if few else "", markersize=4, clip_on=False)


def _reference(axes: "Axes", x: float) -> None:
    axes.axvline(x, color=INK, linestyle=":", linewidth=1.4)


def _label_ends(axes: "Axes", labels: list[tuple[float, str, str]]) -> None:
    """Write names and last values at the right edge, pushed apart where they would overlap.

    Args:
        axes: with all its lines drawn.
        labels: (last value, name, colour) of each line.
    """
    low, high = axes.get_ylim()
    gap = 0.16  # two lines of letters, as a share of the axis
    places: list[float] = []
    for value, name, colour in sorted(labels):
        place = (value - low) / (high - low)
        places.append(max(place, places[-1] + gap) if places else place)
        axes.text(
            1.03,
            places[-1],
            f"{name} {value:.3f}",
            color=colour,
            transform=axes.transAxes,
            va="center",
            fontsize=9,
        )


def whole_numbers() -> "Locator":
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def empty_figure(height: float) -> "Figure":
    """An empty figure of the common width; `height` in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def png_of(figure: "Figure") -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
