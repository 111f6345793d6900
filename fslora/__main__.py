"""The command ``fslora``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import TypeVar

from fslora import __version__
from fslora.errors import is_for_the_user

Config = TypeVar("Config")

_USAGE = """usage: fslora COMMAND [flags]

Federated Sketching LoRA: one high-rank adapter, trained by devices of unequal strength.

commands:
  simulate   fine-tune a model with simulated clients of unequal strength
  compare    several strategies and seeds side by side, on identical splits and budgets
  plan       choose each device class's sketch ratio for the least time, bytes or energy
  probe      measure this machine and write it down as a device to plan for
  report     write the report of a run folder again, finished or not
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
    except KeyboardInterrupt:
        flag = " and --resume" if given[0] == "simulate" else ""
        sys.stderr.write(f"\nfslora: stopped; go on with the same command{flag}\n")
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
    from fslora.settings import merged, read_settings

    files = argparse.ArgumentParser(prog="fslora simulate", add_help=False)
    files.add_argument("--preset", choices=sorted(PRESETS))
    files.add_argument("--config", type=Path)
    chosen, flags = files.parse_known_args(arguments)
    default = PRESETS[chosen.preset]() if chosen.preset else None
    if default is None and chosen.config is None and "--resume" in flags:
        chosen.config = _saved_settings(flags)
    if chosen.config is not None:
        values = merged(default, read_settings(chosen.config), str(chosen.config))
        default = SimulateConfig(**values)
    config = tyro.cli(
        SimulateConfig,
        args=flags,
        default=default,
        prog="fslora simulate",
        description=f"{cleandoc(SimulateConfig.__doc__ or '').split('Attributes:')[0].strip()}\n\n"
        f"--preset {{{','.join(sorted(PRESETS))}}} takes ready-made settings, --config FILE.toml "
        "takes them from a file (names as the flags below); flags override both.",
    )
    _run(config)


def _compare(arguments: Sequence[str]) -> None:
    import tyro

    from fslora.compare.settings import DEFAULT_OUT, CompareConfig, read_comparison
    from fslora.presets import PRESETS

    files = argparse.ArgumentParser(prog="fslora compare", add_help=False)
    files.add_argument("--preset", choices=sorted(PRESETS))
    files.add_argument("--config", type=Path)
    files.add_argument("--join")
    chosen, flags = files.parse_known_args(arguments)
    if chosen.join:
        _join(chosen.join.split(","), flags)
        return
    default = PRESETS[chosen.preset]() if chosen.preset else None
    config = tyro.cli(
        tyro.conf.OmitArgPrefixes[CompareConfig],
        args=[*([] if chosen.config else [f"--out={DEFAULT_OUT}"]), *flags],
        default=read_comparison(default, chosen.config) or tyro.MISSING_NONPROP,
        prog="fslora compare",
        description=f"{cleandoc(CompareConfig.__doc__ or '').split('Attributes:')[0].strip()}\n\n"
        f"--preset {{{','.join(sorted(PRESETS))}}} takes ready-made settings, --config FILE.toml "
        "takes them from a file (names as the flags below; strategies, seeds and what else only "
        "this command knows under [compare]); flags override both.\n\n"
        "fslora compare --join FOLDER,FOLDER… --out FOLDER puts finished comparisons of several "
        "data sets into one table and one page.",
    )
    from rich.console import Console

    from fslora.compare.command import compare

    compare(config, Console())
    _report_comparison(Path(config.run.out))


def _plan(arguments: Sequence[str]) -> None:
    from fslora.plan.settings import DEFAULT_OUT, PlanConfig

    config = _around_a_run("plan", PlanConfig, DEFAULT_OUT, arguments)
    from rich.console import Console

    from fslora.plan.command import make_plan

    make_plan(config, Console())


def _probe(arguments: Sequence[str]) -> None:
    from fslora.plan.settings import DEFAULT_OUT, ProbeConfig

    config = _around_a_run("probe", ProbeConfig, DEFAULT_OUT, arguments)
    from rich.console import Console

    from fslora.plan.probe import probe

    probe(config, Console())


def _around_a_run(name: str, kind: type[Config], out: str, arguments: Sequence[str]) -> Config:
    """Read the flags of a command whose config holds a run's as ``run``.

    A file's settings go before the flags as flags: alone they need not make a valid config.
    """
    from dataclasses import asdict

    import tyro

    from fslora.config import SimulateConfig
    from fslora.presets import PRESETS
    from fslora.settings import merged, read_settings

    files = argparse.ArgumentParser(prog=f"fslora {name}", add_help=False)
    files.add_argument("--preset", choices=sorted(PRESETS))
    files.add_argument("--config", type=Path)
    chosen, flags = files.parse_known_args(arguments)
    run = PRESETS[chosen.preset]() if chosen.preset else None
    if chosen.config is not None:
        run = SimulateConfig(**merged(run, read_settings(chosen.config), str(chosen.config)))
    config: Config = tyro.cli(
        tyro.conf.OmitArgPrefixes[kind],  # type: ignore[valid-type,misc]
        args=[*_as_flags({} if run is None else asdict(run)), f"--out={out}", *flags],
        prog=f"fslora {name}",
        description=f"{cleandoc(kind.__doc__ or '').split('Attributes:')[0].strip()}\n\n"
        "--preset NAME or --config FILE.toml takes the run's settings, as for fslora simulate.",
    )
    return config


def _as_flags(values: Mapping[str, object]) -> list[str]:
    given = []
    for name, value in values.items():
        dashed = name.replace("_", "-")
        switch = f"--{dashed}" if value else f"--no-{dashed}"
        given.append(switch if isinstance(value, bool) else f"--{dashed}={value}")
    return given


def _report(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fslora report", description="Write the report of a run, finished or not, again."
    )
    parser.add_argument("folder", type=Path, help="what fslora simulate --out wrote")
    chosen = parser.parse_args(arguments)
    from fslora.report import write_report

    sys.stdout.write(f"report: {write_report(chosen.folder)}\n")


def _join(folders: Sequence[str], flags: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="fslora compare --join FOLDER,FOLDER…")
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args(flags).out
    from fslora.compare.command import join

    join([Path(folder) for folder in folders], out)
    _report_comparison(out)


def _report_comparison(folder: Path) -> None:
    from fslora.report.comparison import write_comparison

    report = write_comparison(folder)
    sys.stdout.write(f"tables: {report.with_name('compare.md')}\nreport: {report}\n")


def _saved_settings(flags: Sequence[str]) -> Path | None:
    """The settings of the run that is to be continued, so that --out and --resume suffice."""
    peek = argparse.ArgumentParser(add_help=False)
    peek.add_argument("--out", type=Path, default=Path("runs/last"))
    path: Path = peek.parse_known_args(flags)[0].out / "config.json"
    return path if path.is_file() else None


def _run(config: object) -> None:
    from rich.console import Console

    from fslora.config import SimulateConfig
    from fslora.console import closing_lines, closing_table, progress
    from fslora.report import write_report
    from fslora.simulate import simulate

    if not isinstance(config, SimulateConfig):
        raise TypeError(f"not a config: {config}")
    console = Console()
    with progress(config, console) as watcher:
        summary = simulate(config, watcher)
    closing_table(summary, console)
    folder = Path(config.out)
    try:
        report = write_report(folder)
    except ValueError as error:
        console.print(f"no report: {error}", markup=False)
        report = None
    closing_lines(folder, report, console)


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
    parser.add_argument("--out", type=Path, help="another file, which you can read or share")
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
