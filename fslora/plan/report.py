"""A plan on paper: the settings that ``simulate`` takes, the figures, the table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import ceil, inf
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fslora.config import SimulateConfig
from fslora.devices import Fleet
from fslora.plan.limits import Limits, broken
from fslora.plan.settings import PlanConfig
from fslora.plan.solve import Outlook, Problem, Solution
from fslora.report.units import format_bytes, format_seconds

# Of three pilots the two constants are exact, and no residual of a whole run turns an interval up.
_TELLING = 4
# Of a plan's own run, or said by the devices.
_LEFT_OUT = ("out", "resume", "ratios", "devices", "rounds")


@dataclass(frozen=True, slots=True)
class Plan:
    """A solved plan.

    Attributes:
        config: what was asked.
        problem: what the choice was judged by.
        solution: the choice.
        uniform: the best choice of one size for all.
        most: each class's largest size.
        limits: of a round.
    """

    config: PlanConfig
    problem: Problem
    solution: Solution
    uniform: Outlook
    most: Outlook
    limits: Limits

    @property
    def fleet(self) -> Fleet:
        """The fleet, each class with its ratio."""
        sizes, rank = self.solution.outlook.sizes, self.problem.costs.rank
        return Fleet(
            tuple(
                replace(device, ratio=size / rank)
                for device, size in zip(self.problem.fleet.devices, sizes, strict=True)
            )
        )

    def binding(self, number: int) -> str:
        """Say what keeps a class from a larger sketch."""
        sizes, costs = self.solution.outlook.sizes, self.problem.costs
        size = sizes[number]
        if size == costs.rank:
            return "nothing, it has every rank"
        if number not in self.problem.cohorts.member:
            return "nothing: its share of the clients is too small for it to be drawn"
        reason = broken(costs, self.problem.fleet.devices[number], self.limits, size + 1)
        if reason:
            return f"its {reason}"
        more = (*sizes[:number], size + 1, *sizes[number + 1 :])
        rise = self.problem.cost(more) / self.solution.outlook.cost(self.config.goal) - 1
        return f"the goal: a rank more costs {rise:+.1%} {self.config.goal}"


def settings_of(plan: Plan) -> dict[str, Any]:
    """The planned run's settings as a file for ``simulate --config`` holds them."""
    run = plan.config.run
    defaults = {item.name: item.default for item in fields(SimulateConfig)}
    changed = {
        name: value
        for name, value in asdict(run).items()
        if value != defaults[name] and name not in _LEFT_OUT
    }
    rounds = plan.solution.outlook.rounds_high
    return {**changed, "rounds": max(1, ceil(rounds)), "devices": plan.fleet.to_json()}


def settings_text(plan: Plan) -> str:
    """The planned run as TOML, with what it is in comments."""
    import tomli_w

    best, config = plan.solution.outlook, plan.config
    target = config.target
    head = (
        f"# A plan for the least {config.goal} to {target.figure} {target.value:g}.\n"
        f"# Predicted: {_rounds(best)} rounds, {format_seconds(best.seconds)} simulated, "
        f"{format_bytes(best.moved_bytes)} moved. rounds is the upper end.\n"
        "# fslora simulate --config plan.toml --out runs/planned\n"
    )
    return f"{head}\n{tomli_w.dumps(settings_of(plan))}"


def figures_of(plan: Plan) -> dict[str, Any]:
    """What ``plan.json`` holds."""
    problem = plan.problem
    return {
        "goal": plan.config.goal,
        "target": plan.config.target._asdict(),
        "exact": plan.solution.exact,
        "planned": _plain(plan.solution.outlook),
        "best_uniform": _plain(plan.uniform),
        "each_its_most": _plain(plan.most),
        "uniform": [_plain(problem.outlook(sizes)) for sizes in problem.uniform()],
        "classes": [
            {
                "device": device.name,
                "share": device.share,
                "size": size,
                "ratio": device.ratio,
                "binding": plan.binding(number),
                "memory_bytes": problem.costs.memory_bytes(size),
                "compute_seconds": problem.costs.seconds(device, size)[0],
                "seconds": sum(problem.costs.seconds(device, size)),
                "bytes_down": problem.costs.down_bytes(size),
                "bytes_up": problem.costs.up_bytes(size),
            }
            for number, (device, size) in enumerate(
                zip(plan.fleet.devices, plan.solution.outlook.sizes, strict=True)
            )
        ],
        "costs": asdict(problem.costs),
        "fit": {
            **asdict(problem.fit.best),
            "start": problem.fit.start,
            "levels": problem.fit.levels.tolist(),
            "full_rounds": problem.fit.full_rounds.tolist(),
            "deviation": problem.fit.deviation,
            "draws": [asdict(effort) for effort in problem.fit.draws],
        },
    }


def show(plan: Plan, console: Console) -> None:
    """Print the plan."""
    problem, best = plan.problem, plan.solution.outlook
    table = Table(title="The plan", title_justify="left")
    table.add_column("class", overflow="fold")
    for head in ("share", "S", "a round", "up", "down", "memory"):
        table.add_column(head, justify="right", no_wrap=True)
    costs = problem.costs
    for number, device in enumerate(problem.fleet.devices):
        size = best.sizes[number]
        table.add_row(
            escape(device.name),
            f"{device.share:.0%}",
            f"{size}/{costs.rank}",
            format_seconds(sum(costs.seconds(device, size))),
            format_bytes(costs.up_bytes(size)),
            format_bytes(costs.down_bytes(size)),
            format_bytes(costs.memory_bytes(size)),
        )
    console.print(table)
    for number, device in enumerate(problem.fleet.devices):
        line = f"{device.name}: what keeps it from a larger sketch is {plan.binding(number)}."
        console.print(line, markup=False)
    rows: Sequence[tuple[str, Outlook]] = (
        ("planned", best),
        ("best uniform", plan.uniform),
        ("each its most", plan.most),
    )
    target = plan.config.target
    table = Table(
        title=f"Predicted to {target.figure} {target.value:g} (5th to 95th percentile)",
        title_justify="left",
    )
    for head in ("", "S", "rounds", "a round", "time", "moved"):
        table.add_column(head, justify="right" if head else "left")
    for name, row in rows:
        table.add_row(
            name,
            ", ".join(map(str, row.sizes)),
            _rounds(row),
            format_seconds(row.round_seconds),
            format_seconds(row.seconds),
            format_bytes(row.moved_bytes),
        )
    console.print(table)
    for line in what_pilots_say(plan):
        console.print(line, markup=False)
    how = "all choices were compared" if plan.solution.exact else "found by a seeded search"
    console.print(f"The choice: {how}.")


def what_pilots_say(plan: Plan) -> list[str]:
    """Hold the fitted dependence against the bound."""
    fit, rank = plan.problem.fit, plan.problem.costs.rank
    least = min(plan.config.pilot_sizes)
    slow, low, high = fit.slowdown(least / rank)
    verdict = f"as the bound says, rounds grow with the inverse ratio (R/S = {rank / least:g})"
    if low <= 1 <= high:
        verdict = "the pilots show no dependence on the ratio that is beyond their noise"
    elif slow < 1:
        verdict = "against the bound: small sketches need no more rounds"
    order, first, last = fit.mixing()
    mixing = "the bound's mean of inverse ratios (q = 1) is within it"
    if not first <= 1 <= last:
        mixing = "not the bound's mean of inverse ratios (q = 1)" + (
            ": unequal clients do better than it says" if order < 1 else ""
        )
    if plan.config.pilot_seeds * (len(plan.config.pilot_sizes) + 1) < _TELLING:
        verdict = mixing = "fitted to as few pilots as can be, so that nothing says how sure it is"
    return [
        f"Pilots: S = {least} needs {slow:.2f} times the rounds of S = {rank} "
        f"[{low:.2f}, {high:.2f}]: {verdict}.",
        f"Unequal clients add up with q = {order:.2f} [{first:.2f}, {last:.2f}]: {mixing}.",
        f"The fitted rounds are off the pilots' by {fit.deviation:.1%} (root mean square).",
    ]


def _plain(outlook: Outlook) -> dict[str, Any]:
    """As JSON has it, where what is never reached is null."""
    return {n: None if v == inf else v for n, v in asdict(outlook).items()}


def _rounds(outlook: Outlook) -> str:
    return f"{outlook.rounds:.1f} [{outlook.rounds_low:.1f}, {outlook.rounds_high:.1f}]"
