"""The command ``fslora``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import cleandoc
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fslora import __version__
from fslora.errors import StoppedRunError, is_for_the_user

if TYPE_CHECKING:
    from rich.console import Console

    from fslora.config import SimulateConfig

Config = TypeVar("Config")

_USAGE = """usage: fslora COMMAND [flags]

Federated Sketching LoRA: one high-rank adapter, trained by devices of unequal strength.

commands:
  simulate   fine-tune a model with simulated clients of unequal strength
  compare    several strategies and seeds side by side, on identical splits and budgets
  plan       choose each device class's sketch ratio for the least time, bytes or energy
  probe      measure this machine and write it down as a device to plan for
  report     write the report of a run, finished or not, or of a comparison again
  doctor     say which kernels can run on this machine, and why not
  tune       measure the best tiles for this machine's GPU and keep them
  bench      time layers, kernels, models and rounds; needs the repository

  fslora simulate --preset demo        twenty clients on real text, under two minutes
  fslora COMMAND --help                every flag, explained
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # peft 0.21 reads a property that transformers 5.23 renamed.
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
    if given[:1] == ["--version"]:
        sys.stdout.write(f"fslora {__version__}\n")
        return 0
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "simulate": _simulate,
        "compare": _compare,
        "plan": _plan,
        "probe": _probe,
        "report": _report,
        "doctor": _doctor,
        "tune": _tune,
        "bench": _bench,
    }
    if not given or given[0] not in commands:
        wrong = bool(given) and given[0] not in ("-h", "--help")
        (sys.stderr if wrong else sys.stdout).write(_USAGE)
        if wrong:
            sys.stderr.write(f"\nfslora: there is no command {given[0]!r}\n")
        return 2 if wrong else 0
    try:
        commands[given[0]](given[1:])
    except KeyboardInterrupt as stop:
        remedy = str(stop) or "go on with the same command"
        sys.stderr.write(f"\nfslora: stopped; {remedy}\n")
        return 130
    except BrokenPipeError:  # as of `fslora … --help | head`: whoever reads has read enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - written to at exit
        return 141
    except Exception as error:
        if not is_for_the_user(error):
            raise
        sys.stderr.write(f"fslora: {error}\n")
        return 2
    return 0


def _simulate(arguments: Sequence[str]) -> None:
    import tyro

    from fslora.config import SimulateConfig
    from fslora.presets import PRESETS
    from fslora.settings import as_flags, merged, read_settings, saved_settings

    chosen, flags = _files("simulate", arguments)
    if not chosen.preset and not chosen.config and "--resume" in flags:
        chosen.config = saved_settings(_out_of(flags))  # so that --out and --resume suffice
    given = {}
    if chosen.config:
        given = merged(None, read_settings(chosen.config), str(chosen.config))
    config = tyro.cli(
        SimulateConfig,
        args=[*as_flags(given), *flags],  # a file need not make a valid config alone
        default=PRESETS[chosen.preset]() if chosen.preset else None,
        prog="fslora simulate",
        description=f"{cleandoc(SimulateConfig.__doc__ or '').split('Attributes:')[0].strip()}\n\n"
        f"--preset {{{','.join(sorted(PRESETS))}}} takes ready-made settings, --config FILE.toml "
        "takes them from a file (names as the flags below); flags override both.",
    )
    _run(config)


def _compare(arguments: Sequence[str]) -> None:
    from dataclasses import replace

    import tyro

    from fslora.compare.settings import DEFAULT_OUT, CompareConfig, read_comparison
    from fslora.presets import PRESETS
    from fslora.settings import as_flags

    joining = argparse.ArgumentParser(prog="fslora compare", add_help=False)
    joining.add_argument("--join")
    chosen, flags = joining.parse_known_args(arguments)
    if chosen.join:
        _join(chosen.join.split(","), flags)
        return
    chosen, flags = _files("compare", flags)
    default = None
    if chosen.preset:
        run = replace(PRESETS[chosen.preset](), strategy="fslora", seed=0, out=DEFAULT_OUT)
        default = CompareConfig(run)
    given = read_comparison(chosen.config) if chosen.config else {}
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[CompareConfig],
        args=[f"--out={DEFAULT_OUT}", *as_flags(given), *flags],
        default=default or tyro.MISSING_NONPROP,
        prog="fslora compare",
        description=f"{cleandoc(CompareConfig.__doc__ or '').split('Attributes:')[0].strip()}\n\n"
        f"--preset {{{','.join(sorted(PRESETS))}}} takes ready-made settings, --config FILE.toml "
        "takes them from a file (names as the flags below; strategies, seeds and what else only "
        "this command knows under [compare]); flags override both.\n\n"
        "fslora compare --join FOLDER,FOLDER… --out FOLDER puts finished comparisons of several "
        "data sets into one table and one page.",
    )
    from fslora.compare.command import compare

    for entry in config.entries:
        _warn(config.of_run(entry, config.seed_values[0], {}), f"{entry.label}: ")
    (found,) = compare(config, _console())["datasets"]
    _report_comparison(Path(config.run.out))
    if all(run["failed"] for strategy in found["strategies"] for run in strategy["runs"]):
        raise StoppedRunError("no run came to its end, for the reasons above")


def _plan(arguments: Sequence[str]) -> None:
    from fslora.plan.settings import DEFAULT_OUT, PlanConfig

    config = _around_a_run("plan", PlanConfig, DEFAULT_OUT, arguments)
    from fslora.plan.command import make_plan

    make_plan(config, _console())


def _probe(arguments: Sequence[str]) -> None:
    from fslora.plan.settings import DEFAULT_OUT, ProbeConfig

    config = _around_a_run("probe", ProbeConfig, DEFAULT_OUT, arguments)
    from fslora.plan.probe import probe

    probe(config, _console())


def _around_a_run(name: str, kind: type[Config], out: str, arguments: Sequence[str]) -> Config:
    """Read the flags of a command whose config holds a run's as ``run``."""
    import tyro

    from fslora.presets import PRESETS
    from fslora.settings import as_flags, merged, read_settings

    chosen, flags = _files(name, arguments)
    values = read_settings(chosen.config) if chosen.config else {}
    given = merged(PRESETS[chosen.preset]() if chosen.preset else None, values, str(chosen.config))
    config: Config = tyro.cli(
        tyro.conf.OmitArgPrefixes[kind],  # type: ignore[valid-type,misc]
        args=[*as_flags(given), f"--out={out}", *flags],
        prog=f"fslora {name}",
        description=f"{cleandoc(kind.__doc__ or '').split('Attributes:')[0].strip()}\n\n"
        "--preset NAME or --config FILE.toml takes the run's settings, as for fslora simulate.",
    )
    return config


def _files(name: str, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Take the preset's name and the file of settings out of the flags."""
    from fslora.presets import PRESETS

    files = argparse.ArgumentParser(prog=f"fslora {name}", add_help=False)
    files.add_argument("--preset", choices=sorted(PRESETS))
    files.add_argument("--config", type=_path)
    return files.parse_known_args(arguments)


def _path(text: str) -> Path:
    return Path(expanduser(text))


def _report(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fslora report",
        description="Write the report of a run, finished or not, or of a comparison, again.",
    )
    parser.add_argument("folder", type=_path, help="--out of fslora simulate or fslora compare")
    chosen = parser.parse_args(arguments)
    from fslora.report import write_report

    if (chosen.folder / "compare.json").is_file():
        _report_comparison(chosen.folder)
        return
    sys.stdout.write(f"report: {write_report(chosen.folder)}\n")


def _join(folders: Sequence[str], flags: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="fslora compare --join FOLDER,FOLDER…")
    parser.add_argument("--out", type=_path, required=True)
    out: Path = parser.parse_args(flags).out
    from fslora.compare.command import join

    join([_path(folder) for folder in folders], out)
    _report_comparison(out)


def _report_comparison(folder: Path) -> None:
    from fslora.console import print_table
    from fslora.report.comparison import summary_table, write_comparison

    report = write_comparison(folder)
    print_table(summary_table(folder), _console())
    sys.stdout.write(f"tables: {report.with_name('compare.md')}\nreport: {report}\n")


def _out_of(flags: Sequence[str]) -> Path:
    peek = argparse.ArgumentParser(add_help=False)
    peek.add_argument("--out", type=_path, default=Path("runs/last"))
    out: Path = peek.parse_known_args(flags)[0].out
    return out


def _run(config: object) -> None:
    from fslora.config import SimulateConfig
    from fslora.console import closing_lines, closing_table, progress
    from fslora.report import write_report
    from fslora.simulate import simulate

    if not isinstance(config, SimulateConfig):
        raise TypeError(f"not a config: {config}")
    console, folder = _console(), Path(config.out)
    _warn(config)
    try:
        with progress(config, console) as watcher:
            summary = simulate(config, watcher)
    except KeyboardInterrupt:
        if (folder / "config.json").is_file():
            raise KeyboardInterrupt(
                "go on with the same command and --resume, or draw what there is: "
                f"fslora report {folder}"
            ) from None
        raise KeyboardInterrupt("nothing was begun yet") from None
    closing_table(summary, console)
    try:
        report = write_report(folder)
    except ValueError as error:
        console.print(f"no report: {error}", markup=False)
        report = None
    closing_lines(folder, report, console, config.layers)


def _warn(config: SimulateConfig, whose: str = "") -> None:
    """Say which of a run's settings will do nothing, or hardly anything."""
    from fslora.trust import idle_attack, thin_coverage

    thin = thin_coverage(config.strategy, config.rule, config.per_round, config.mean_coverage)
    for warning in filter(None, (thin, idle_attack(config.strategy, config.attack))):
        sys.stderr.write(f"fslora: {whose}{warning}\n")


def _console() -> Console:
    """Build a console whose run goes on quietly when its reader has gone, as of `| head -1`."""
    from rich.console import Console

    class Patient(Console):
        def on_broken_pipe(self) -> None:
            with suppress(SystemExit):
                super().on_broken_pipe()

    return Patient()


def _doctor(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fslora doctor", description="Say which kernels can run on this machine, and why not."
    )
    parser.parse_args(arguments)
    from rich.console import Console

    from fslora.doctor import doctor

    doctor(Console())


def _tune(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fslora tune",
        description="Measure which tiles the Triton kernels run fastest with on this GPU (about a "
        "minute) and keep them where every later run finds them.",
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 …")
    parser.add_argument("--out", type=_path, help="another file, which you can read or share")
    chosen = parser.parse_args(arguments)
    from rich.console import Console

    from fslora.tune import tune

    tune(chosen.device, chosen.out, Console())


def _bench(arguments: Sequence[str]) -> None:
    import subprocess

    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks/__main__.py").is_file():
        raise FileNotFoundError(
            "the benchmarks are in the repository and not in the installed package: clone it, call "
            "`pip install -e '.[dev]'` there, then `fslora bench` or `python -m benchmarks`"
        )
    # A process of its own: this package knows nothing of the benchmarks but where they are.
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); import benchmarks.__main__ as b; "
    command = [sys.executable, "-c", start + "sys.exit(b.main())", str(root), *arguments]
    raise SystemExit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    sys.exit(main())
