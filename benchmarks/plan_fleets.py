"""Plans against the best single ratio and each device's most, in simulated seconds to a target.

For each committed fleet: one plan from shared pilots, then runs with other seeds. The best single
ratio is chosen with hindsight, by its own runs. A run at one ratio learns the same on every fleet
of benchmarks/fleets (nobody is ever away), so it is trained once, and every fleet's clock is read
for its rounds without training.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from rich.console import Console

from benchmarks.timing import append_record, provenance
from benchmarks.workload import shared_data, shared_model
from fslora.client import LocalTrainer
from fslora.config import SimulateConfig
from fslora.models import take_state
from fslora.plan.command import make_plan
from fslora.plan.pilots import reached, run_to
from fslora.plan.settings import PlanConfig
from fslora.prepare import Run, deal_ratios, examples_of, make_clock, make_strategy, prepare
from fslora.report.units import format_seconds
from fslora.server import draw_cohort

FLEETS = Path(__file__).parent / "fleets"
SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Result:
    """One choice of ratios on one fleet.

    Attributes:
        fleet: its name.
        choice: "planned", "uniform" or "most".
        sizes: S of each class.
        rounds: to the target, of each seed; None where it was not reached.
        seconds: simulated, likewise.
        predicted_seconds: by the plan.
    """

    fleet: str
    choice: str
    sizes: tuple[int, ...]
    rounds: tuple[int | None, ...]
    seconds: tuple[float | None, ...]
    predicted_seconds: float | None = None

    @property
    def mean_seconds(self) -> float:
        """Mean over the seeds; infinite if one did not reach the target."""
        return mean(math.inf if value is None else value for value in self.seconds)


def base_config(out: Path) -> SimulateConfig:
    """The run that is planned, without its fleet.

    Raises:
        FileNotFoundError: the shared model or data are not at hand.
    """
    model, data = shared_model("stories260K-hf"), shared_data() / "tinyshakespeare/input.txt.gz"
    if model is None or not data.is_file():
        raise FileNotFoundError("the shared data are not here; FSLORA_SHARED may point to them")
    return SimulateConfig(
        model=model,
        data=str(data),
        reader="play",
        partition="natural:speaker",
        clients=98,
        per_round=6,
        rank=16,
        rounds=60,
        local_steps=2,
        batch_size=4,
        max_length=64,
        lr=2e-3,
        threads=1,
        eval_examples=64,
        targets="loss:3.4",
        out=str(out),
    )


class Arena:
    """Runs choices of ratios and reads every fleet's clock for them."""

    def __init__(self, base: SimulateConfig, seeds: Sequence[int]) -> None:
        """Load data and model once for each seed."""
        self.base, self.seeds = base, seeds
        self._runs = {seed: prepare(replace(base, seed=seed)) for seed in seeds}

    def result(
        self, fleet: str, devices: str, choice: str, sizes: tuple[int, ...], predicted: float | None
    ) -> Result:
        """Train a choice with every seed, or take it from an earlier fleet, and time it."""
        rounds, seconds = [], []
        for seed in self.seeds:
            config = self._config(seed, devices, sizes)
            trained = config if len(set(sizes)) > 1 else self._uniform(seed, sizes[0])
            (target,) = self.base.target_values
            record = run_to(trained, target)[-1]
            there = reached(record, target)
            rounds.append(record["round"] if there else None)
            seconds.append(self._seconds(seed, config, record["round"]) if there else None)
        return Result(fleet, choice, sizes, tuple(rounds), tuple(seconds), predicted)

    def _uniform(self, seed: int, size: int) -> SimulateConfig:
        out = Path(self.base.out) / f"runs/uniform-{size}-seed-{seed}"
        ratios = repr(size / self.base.rank)
        return replace(self.base, seed=seed, ratios=ratios, out=str(out))

    def _config(self, seed: int, devices: str, sizes: tuple[int, ...]) -> SimulateConfig:
        tables = json.loads(devices)
        for table, size in zip(tables, sizes, strict=True):
            table["ratio"] = size / self.base.rank
        name = f"runs/{'-'.join(map(str, sizes))}-{tables[0]['name'].replace(':', '-')}-seed-{seed}"
        out = str(Path(self.base.out) / name)
        return replace(self.base, seed=seed, devices=json.dumps(tables), out=out)

    def _seconds(self, seed: int, config: SimulateConfig, rounds: int) -> float:
        """Read the clock of the simulator for so many rounds, without training."""
        run = self._on(seed, config)
        trainer = LocalTrainer(run.model, run.task, examples_of(run))
        clock = make_clock(run, trainer)
        if clock is None:
            raise ValueError("a fleet is needed")
        state = run.strategy.init(*take_state(run.model), seed)
        total = 0.0
        for number in range(1, rounds + 1):
            cohort = draw_cohort(seed, number, run.data.names, config.cohort_size)
            tasks = run.strategy.assign(replace(state, round=number - 1), cohort)
            total += clock.plan(tasks).seconds or 0.0
        return total

    def _on(self, seed: int, config: SimulateConfig) -> Run:
        run = replace(self._runs[seed], config=config)
        run = replace(run, ratio_of=deal_ratios(config, run.data.names))
        return replace(run, strategy=make_strategy(config, run.ratio_of_id))


def judge(
    arena: Arena, fleet: Path, sizes: Sequence[int], pilots: Path, console: Console
) -> list[Result]:
    """Plan for one fleet, and run the plan and what it is held against."""
    out = Path(arena.base.out) / fleet.stem
    base = replace(arena.base, devices=str(fleet), out=str(out))
    config = PlanConfig(run=base, pilot_seeds=2, pilots=str(pilots))
    console.rule(fleet.stem)
    plan = make_plan(config, console)
    tables = json.dumps(config.fleet.to_json())
    best = plan.solution.outlook
    wanted = [("planned", best.sizes, best.seconds), ("most", plan.most.sizes, plan.most.seconds)]
    wanted += [
        ("uniform", one, plan.problem.outlook(one).seconds)
        for one in dict.fromkeys(plan.problem.limited_to(size) for size in sizes)
    ]
    return [
        arena.result(fleet.stem, tables, choice, sizes, predicted)
        for choice, sizes, predicted in wanted
    ]


def verdict(results: Sequence[Result]) -> tuple[float, str]:
    """How long planned runs take over the better of the two others, and a line that says it."""
    of = {name: [r for r in results if r.choice == name] for name in ("planned", "uniform", "most")}
    planned, most = of["planned"][0], of["most"][0]
    uniform = min(of["uniform"], key=lambda one: one.mean_seconds)
    over = planned.mean_seconds / min(uniform.mean_seconds, most.mean_seconds)
    cells = (
        f"{one.choice} {one.sizes} "
        f"{'never' if math.isinf(one.mean_seconds) else format_seconds(one.mean_seconds)} "
        f"{list(one.rounds)}"
        for one in (planned, uniform, most)
    )
    return over, f"{planned.fleet:<14} {over:.3f}   " + "   ".join(cells)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan-fleets", description=__doc__)
    parser.add_argument(
        "--fleets", default="equal,free-network,poor-half,tiers,small-memory,check-in"
    )
    parser.add_argument("--sizes", default="16,8,4,2,1", help="of the single ratios, S")
    parser.add_argument("--folder", type=Path, default=Path("runs/plan-fleets"))
    parser.add_argument("--out", type=Path, help="append the results to this JSONL file")
    chosen = parser.parse_args(arguments)
    sizes = [int(size) for size in chosen.sizes.split(",")]
    fleets = [FLEETS / f"{name}.toml" for name in chosen.fleets.split(",")]
    if missing := [fleet for fleet in fleets if not fleet.is_file()]:
        parser.error(f"there is no fleet {missing[0].stem} in {FLEETS}")
    console = Console()
    arena = Arena(base_config(chosen.folder), SEEDS)
    lines = []
    for fleet in fleets:
        results = judge(arena, fleet, sizes, chosen.folder / "pilots", console)
        over, line = verdict(results)
        lines.append(line)
        console.print(line, markup=False)
        if chosen.out:
            for result in results:
                fields = {**asdict(result), "planned_over_better": over}
                append_record(chosen.out, {"benchmark": "plan-fleets", **provenance(), **fields})
    print("\nplanned over the better of the two others, mean simulated time of three seeds")
    print("\n".join(lines))
    return 0
