"""A whole comparison: search, runs, table; what a terminal shows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fslora import checkpoint, disk
from fslora.compare.runs import run_all
from fslora.compare.search import found_for, search, trials_of
from fslora.compare.settings import CompareConfig, Setting
from fslora.compare.table import tabulate
from fslora.compare.tensorboard import summary_writer, write_curves
from fslora.config import SimulateConfig
from fslora.prepare import check_strategy
from fslora.report.records import read_object
from fslora.settings import read_settings

COMPARE_FILE = "compare.json"


def compare(config: CompareConfig, console: Console) -> dict[str, Any]:
    """Make or continue a comparison, and write its `compare.json`.

    Args:
        config: what is compared.
        console: where progress is shown.

    Returns:
        What `compare.json` holds.

    Raises:
        ValueError: a setting, the data, the model or a folder cannot work; names the remedy.
        FileNotFoundError: a file that is not there.
        NotImplementedError: the implementation cannot run on the device.
    """
    if config.tensorboard:
        summary_writer()  # missing, it is missed now and not after hours
    trials = [run for *_, run in trials_of(config)]
    planned = [
        config.of_run(entry, seed, {}) for entry in config.entries for seed in config.seed_values
    ]
    for run in (*trials, *planned):
        check_strategy(run)  # refused now, and not after hours
    with _bar(console, "searching", trials) as on_round:
        tried = search(config, on_round)
    runs = {
        (entry.label, seed): config.of_run(
            entry, seed, found_for(tried, entry.label, config.search_seed(seed))
        )
        for entry in config.entries
        for seed in config.seed_values
    }
    for (label, seed), run in runs.items():
        _check_winner(label, found_for(tried, label, config.search_seed(seed)), run)
    with _bar(console, "comparing", planned) as on_round:
        failures = run_all(list(runs.values()), config.jobs, on_round)
    for folder, reason in failures.items():
        console.print(f"{folder} stopped: {reason}", markup=False, soft_wrap=True)
    comparison = {"datasets": [tabulate(config, runs, failures, tried)]}
    out = Path(config.run.out)
    with disk.explained_errors(out):
        disk.write_json(out / COMPARE_FILE, comparison)
    if config.tensorboard:
        folders = [Path(run.out) for run in runs.values()]
        write_curves(Path(config.tensorboard).expanduser(), folders)
    return comparison


def _check_winner(label: str, found: Mapping[str, Setting], run: SimulateConfig) -> None:
    """Refuse to go on with a run whose settings an extended search no longer chooses."""
    if not run.resume:
        return
    before = read_settings(Path(run.out) / "config.json")
    for name, value in found.items():
        if before.get(name) != value:
            raise ValueError(
                f"the search now chooses {name} = {value} for {label}, and {run.out} was begun "
                f"with {before.get(name)}: remove that folder to have it run again, or choose "
                "another --out"
            )


def join(folders: Sequence[Path], out: Path) -> None:
    """Put finished comparisons, one of each data set, into one `compare.json`.

    Raises:
        ValueError: one is not finished, two have the same data set, or one would be written over.
    """
    if out.resolve() in (folder.resolve() for folder in folders):
        raise ValueError(f"--out {out} is one of those that are joined; choose another --out")
    datasets = []
    for folder in folders:
        path = folder / COMPARE_FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no finished comparison; run it with --out {folder}")
        datasets += read_object(path)["datasets"]
    names = [data["name"] for data in datasets]
    if len(set(names)) < len(names):
        raise ValueError(f"data sets {', '.join(names)}: give each a --name of its own")
    with disk.explained_errors(out):
        disk.write_json(out / COMPARE_FILE, {"datasets": datasets})


@contextmanager
def _bar(
    console: Console, what: str, runs: Sequence[SimulateConfig]
) -> Iterator[Callable[[], None]]:
    """One bar over the rounds of all runs, which reads how far they are from their folders."""
    columns = (
        TextColumn(what + " {task.fields[ended]}/" + f"{len(runs)} runs"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f} rounds"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not runs) as bars:
        bar = bars.add_task("", total=sum(run.rounds for run in runs), ended=0)

        def on_round() -> None:
            done = [min(checkpoint.rounds_done(Path(run.out)), run.rounds) for run in runs]
            ended = sum(at == run.rounds for at, run in zip(done, runs, strict=True))
            bars.update(bar, completed=sum(done), ended=ended)

        on_round()
        yield on_round
