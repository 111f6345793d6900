"""One picture for each prediction, from the findings alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.theory.verdicts import Finding
from fslora.report.plots import DOWN, FULL_RANK, INK, SKETCHED, TRAINING, UP, house_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL = (3.9, 3.3)  # inches
_COLOURS = (FULL_RANK, SKETCHED, UP, DOWN, TRAINING, "#CC79A7")
_MARKS = "os^Dv"
Data = Mapping[str, Any]


def draw(findings: Sequence[Finding], folder: Path) -> list[Path]:
    """Write ``p2.png`` and so on: a panel for each setting that has figures.

    Raises:
        ValueError: matplotlib is not installed.
    """
    written = []
    folder.mkdir(parents=True, exist_ok=True)
    with house_style():
        from matplotlib.figure import Figure

        for name, panel in PANELS.items():
            shown = [f for f in findings if f.claim.name == name and f.data]
            if not shown:
                continue
            figure = Figure(figsize=(_PANEL[0] * len(shown), _PANEL[1]))
            axes = figure.subplots(1, len(shown), squeeze=False)[0]
            for axis, finding in zip(axes, shown, strict=True):
                panel(axis, finding.data)
                axis.set_title(f"{name}, {finding.setting}:\n{finding.verdict}")
            path = folder / f"{name.lower()}.png"
            figure.savefig(path, format="png", dpi=110, bbox_inches="tight")
            written.append(path)
    return written


def _moments(axis: Axes, data: Data) -> None:
    for number, values in enumerate(data.values()):
        spot = [number + 0.3 * (place / len(values) - 0.5) for place in range(len(values))]
        axis.plot(spot, values, ".", color=SKETCHED, markersize=3)
        axis.plot([number], [sum(values) / len(values)], "D", color=FULL_RANK)
    axis.axhline(1, color=INK, linestyle=":")
    axis.set_xticks(range(len(data)), list(data))
    axis.set_xlabel("sketch ratio S/R")
    axis.set_ylabel("‖sketched‖² / (R/S ‖full‖²)")


def _steps(axis: Axes, data: Data) -> None:
    ratios = [float(ratio) for ratio in data["steps"]]
    for place in range(len(next(iter(data["steps"].values())))):
        values = [steps[place] for steps in data["steps"].values()]
        axis.plot(ratios, values, _MARKS[place], color=SKETCHED, label=f"seed {place}")
    top = sum(data["steps"]["1"]) / len(data["steps"]["1"])
    for power, dash in ((1, "--"), (2, ":")):
        line = [top * ratio**power for ratio in ratios]
        axis.plot(ratios, line, dash, color=INK, label="∝ S/R" if power == 1 else "∝ (S/R)²")
    _logarithmic(axis, "sketch ratio S/R", "largest stable step size")


def _levels(axis: Axes, data: Data) -> None:
    inverse = data["mean_inverse"]
    for name, values in data["levels"].items():
        mixed = "," in name
        colour = FULL_RANK if mixed else SKETCHED
        axis.plot([inverse[name]] * len(values), values, "s" if mixed else "o", color=colour)
        _name(axis, name, inverse[name], max(values))
    start = sum(data["levels"]["1"]) / len(data["levels"]["1"])
    ends = [1, max(inverse.values())]
    axis.plot(ends, [start * end for end in ends], "--", color=INK, label="∝ mean(R/S)")
    _logarithmic(axis, "mean(R/S)", "‖∇f^S‖² where it settles")


def _rounds(axis: Axes, data: Data) -> None:
    inverse = data["mean_inverse"]
    for name, values in data["rounds"].items():
        mixed = "," in name
        for value in values:
            colour = FULL_RANK if mixed else SKETCHED
            axis.plot([inverse[name]], [value], "s" if mixed else "o", color=colour)
        _name(axis, name, inverse[name], max(values))
    start = sum(data["rounds"]["1"]) / len(data["rounds"]["1"])
    ends = [1, max(inverse.values())]
    axis.plot(ends, [start * end for end in ends], "--", color=INK, label="∝ mean(R/S)")
    if data["at_limit"]:
        axis.axhline(data["limit"], color=TRAINING, linestyle=":", label="limit")
    _logarithmic(axis, "mean(R/S)", "rounds to the target")


def _uplink(axis: Axes, data: Data) -> None:
    inverse = data["mean_inverse"]
    for name, (mean, low, high) in data["uplink"].items():
        colour = FULL_RANK if "," in name else SKETCHED
        axis.plot([inverse[name]], [mean], "s" if "," in name else "o", color=colour)
        axis.vlines(inverse[name], max(low, mean / 20), min(high, mean * 20), color=colour)
        _name(axis, name, inverse[name], mean, mixed_above=True)
    axis.axhline(1, color=INK, linestyle=":", label="full rank")
    _logarithmic(axis, "mean(R/S)", "uplink to the target / full rank's")


def _variance(axis: Axes, data: Data) -> None:
    counts = data["counts"]
    for place, sampler in enumerate(("uniform", "nested", "balanced")):
        axis.plot(counts, data[sampler], _MARKS[place] + "-", color=_COLOURS[place], label=sampler)
    first = data["uniform"][0]
    axis.plot(counts, [first / count for count in counts], "--", color=INK, label="∝ 1/N")
    _logarithmic(axis, "clients N", "variance of the averaged update")


def _speedup(axis: Axes, data: Data) -> None:
    for name, values in data["rounds"].items():
        clients, steps = (int(part.split("=")[1]) for part in name.split())
        colour = _COLOURS[steps % len(_COLOURS)]
        axis.plot([clients * steps] * len(values), values, "o", color=colour)
        _name(axis, name, clients * steps, max(values))
    products = sorted(
        (int(name.split()[0][2:]) * int(name.split()[1][2:]), sum(values) / len(values))
        for name, values in data["rounds"].items()
    )
    first, last = products[0], products[-1]
    line = [first[1], first[1] * first[0] / last[0]]
    axis.plot([first[0], last[0]], line, "--", color=INK, label="∝ 1 / NH")
    _logarithmic(axis, "clients x local steps", "rounds to ε")


def _floor(axis: Axes, data: Data) -> None:
    names = list(data)
    for place, (part, colour) in enumerate((("predicted", INK), ("measured", SKETCHED))):
        values = [data[name][part] for name in names]
        axis.plot(
            range(len(names)),
            [v[0] for v in values],
            "_o"[place],
            color=colour,
            label=part,
            markersize=14 if place == 0 else 5,
        )
        for number, value in enumerate(values):
            axis.annotate(
                f"rank {value[1]:.2f}",
                (number, value[0]),
                (6, 8 - 14 * place),
                textcoords="offset points",
                color=colour,
                fontsize=7,
            )
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel("sketch ratios")
    axis.set_ylabel("relative error at Ω = I")
    axis.legend(frameon=False, loc="upper left")


def _ends(axis: Axes, data: Data) -> None:
    for place, (method, ends) in enumerate(data["loss and rank"].items()):
        losses, ranks = zip(*ends, strict=True)
        axis.plot(ranks, losses, _MARKS[place], color=_COLOURS[place], label=method)
    axis.set_xlabel("effective rank of BA")
    axis.set_ylabel("loss at Ω = I")
    axis.legend(frameon=False)


def _order(axis: Axes, data: Data) -> None:
    names = list(data["rounds"])
    for number, values in enumerate(data["rounds"].values()):
        axis.plot(values, [number] * len(values), "o", color=_COLOURS[number])
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(data["limit"] + 1, color=TRAINING, linestyle=":")
    axis.set_xlabel("rounds to the target (dotted: never)")


def _name(axis: Axes, name: str, x: float, y: float, *, mixed_above: bool = False) -> None:
    # 1/4 and 1/8,1/2,1/2 have the same x, and 1/8,1/4,1/2 the next: above, below and to the right.
    above = ("," in name) == mixed_above
    offset, side = (-6, 8 if above else -14), "right"
    if len(set(name.split(","))) > 2:
        offset, side = (7, -3), "left"
    axis.annotate(name, (x, y), offset, textcoords="offset points", fontsize=7, ha=side)


def _logarithmic(axis: Axes, x: str, y: str) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    subs = (1, 2, 5) if high > 3 * low else (1, 1.2, 1.5, 2, 3, 5, 7, 8, 9)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    for scale in (axis.xaxis, axis.yaxis):  # the default's powers are mathematics, which is off
        scale.set_major_formatter(StrMethodFormatter("{x:g}"))
        scale.set_minor_formatter(NullFormatter())
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend(frameon=False, fontsize=8)


PANELS: dict[str, Callable[[Axes, Data], None]] = {
    "P1c": _moments,
    "P2": _steps,
    "P3a": _levels,
    "P3b": _rounds,
    "P3d": _uplink,
    "P4a": _variance,
    "P4d": _speedup,
    "P5a": _floor,
    "P5c": _ends,
    "P6": _order,
}
