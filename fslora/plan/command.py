"""`fslora plan`: limits, pilots, fit, choice, and what is written of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from fslora import disk
from fslora.plan.bound import Fit, fit
from fslora.plan.cohorts import draw_cohorts
from fslora.plan.costs import Costs, count_costs
from fslora.plan.figure import draw_plan
from fslora.plan.limits import Limits, feasible_sizes
from fslora.plan.pilots import curve_of, pilots_of
from fslora.plan.report import Plan, figures_of, settings_text, show
from fslora.plan.settings import NO_CLOCK, PlanConfig
from fslora.plan.solve import Problem, solve
from fslora.prepare import prepare
from fslora_kernels.seeds import fold_in


def make_plan(config: PlanConfig, console: Console) -> Plan:
    """Plan, print the plan, and write ``plan.toml``, ``plan.json`` and ``plan.png``.

    Args:
        config: what is planned.
        console: where progress and the plan are shown.

    Raises:
        InfeasibleFleetError: a class can have no ratio at all; says what would help.
        ValueError: a setting, the data or the model cannot work, or the target is out of reach.
        StoppedRunError: a pilot diverged.
    """
    out = Path(config.run.out)
    disk.check_writable(out)  # known before any pilot
    run = prepare(replace(config.run, **NO_CLOCK))
    costs = count_costs(run)
    limits = Limits(config.run.deadline, 1e6 * config.traffic_mb)
    feasible = feasible_sizes(costs, config.fleet, limits)  # known before any pilot
    clients = len(run.data.names)
    del run
    plan = choose(config, costs, limits, tuple(feasible), clients, run_pilots(config, console))
    show(plan, console)
    write(plan, out)
    console.print(
        f"plan: {out / 'plan.toml'} (fslora simulate --config takes it)",
        markup=False,
        soft_wrap=True,
    )
    return plan


def run_pilots(config: PlanConfig, console: Console) -> Fit:
    """Run what is missing of the pilots, and fit the bound to all of them."""
    pilots = pilots_of(config)
    curves = []
    with console.status("") as status:
        for number, pilot in enumerate(pilots, start=1):
            status.update(f"pilot {number} of {len(pilots)}, ratios {pilot.ratios}")
            curves.append(curve_of(pilot, config.target))
    key = fold_in(config.run.seed, "fit")
    return fit(curves, config.target.value, config.run.rank, key)


def choose(
    config: PlanConfig,
    costs: Costs,
    limits: Limits,
    feasible: tuple[tuple[int, ...], ...],
    clients: int,
    fitted: Fit,
) -> Plan:
    """Find the sizes, and what they are held against.

    Args:
        config: what is planned.
        costs: of a client's round.
        limits: of a round.
        feasible: sizes that each class can have.
        clients: how many there are.
        fitted: rounds to the target.
    """
    run = config.run
    key = fold_in(run.seed, "planned cohorts")
    size = run.cohort_size
    cohorts = draw_cohorts(config.fleet, clients, size, run.per_round, run.deadline, key)
    problem = Problem(costs, config.fleet, cohorts, fitted, config.goal, feasible)
    solution = solve(problem, run.seed)
    uniform = problem.outlook(min(problem.uniform(), key=problem.cost))
    most = problem.outlook(problem.limited_to(costs.rank))
    return Plan(config, problem, solution, uniform, most, limits)


def write(plan: Plan, folder: Path) -> None:
    """Write a plan's files into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.toml").write_text(settings_text(plan), encoding="utf-8")
    disk.write_json(folder / "plan.json", figures_of(plan))
    (folder / "plan.png").write_bytes(draw_plan(plan))
