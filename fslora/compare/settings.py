"""What a comparison is made of: a base config, strategies with options, seeds, a search grid."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fslora.config import SimulateConfig
from fslora.settings import merged, read_settings

DEFAULT_OUT = "runs/compare"
Setting = str | int | float | bool

# The track is the same for all: what a strategy's options and the search may not touch.
TRACK = (
    *("model", "data", "eval_data", "train_rows", "validation", "task", "text_column"),
    *("label_column", "prompt_columns", "response_column", "header", "reader", "metric"),
    *("partition", "clients", "per_round", "strategy", "rounds", "local_steps", "batch_size"),
    *("accumulation", "max_length", "seed", "device", "dtype", "implementation", "threads"),
    *("layers", "eval_every", "eval_sketched", "eval_examples", "devices", "device_order"),
    *("deadline", "over_select", "faults", "targets", "out", "resume"),
    *("attack", "attackers", "attack_strength"),
)


@dataclass(frozen=True, slots=True)
class CompareConfig:
    """Compare strategies on identical splits, schedules and budgets, over several seeds.

    Every strategy and seed is one run in OUT/runs/STRATEGY/seed-N, as `fslora simulate` makes it.
    The same command again continues what was interrupted and repeats nothing. OUT/report.html
    shows the metric against rounds, bytes and simulated seconds; OUT/compare.md has the tables.

    Attributes:
        run: what all runs share; their strategy, seed and resume are set for each.
        strategies: comma-separated; the first is held against each of the others. Options of one
            follow a colon: fslora,fslora:server_lr=2,lr=3e-3,fedit.
        seeds: comma-separated; each has its own split, the same for all strategies.
        search: settings to try for every strategy, before the comparison: KEY=VALUE,VALUE…, such
            as lr=1e-3,3e-3,1e-2; several keys, separated by semicolons, are tried in all
            combinations. Judged on a tenth of the clients' own data: once, with the first seed,
            where all seeds are judged by the same rows (--eval-data, or running text of natural
            clients); else for each seed.
        search_rounds: rounds of each trial; 0 takes half of --rounds.
        jobs: runs at a time, each with one thread unless --threads says otherwise.
        name: of the data set in the tables; default the name of --data.
        tensorboard: folder to write the curves of all runs to, for TensorBoard.
    """

    run: SimulateConfig
    strategies: str = "fslora,fedit,hetlora,flexlora,flora"
    seeds: str = "0,1,2"
    search: str = ""
    search_rounds: int = 0
    jobs: int = 1
    name: str = ""
    tensorboard: str = ""

    def __post_init__(self) -> None:
        """Refuse values that cannot work, each by its flag."""
        if (Path(self.run.out) / "config.json").is_file():
            raise ValueError(f"{self.run.out} holds a run of its own; choose another --out")
        if self.run.strategy != "fslora" or self.run.seed or self.run.resume:
            raise ValueError(
                "--strategy, --seed and --resume are those of one run: name --strategies and "
                "--seeds; the same command again goes on with a comparison"
            )
        if self.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {self.jobs}")
        if self.search_rounds < 0:
            raise ValueError(f"--search-rounds must be at least 0, got {self.search_rounds}")
        if not self.seed_values or len(set(self.seed_values)) < len(self.seed_values):
            raise ValueError(f"--seeds {self.seeds!r} must be different numbers such as 0,1,2")
        labels = [entry.folder for entry in self.entries]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"--strategies {self.strategies!r} must name each strategy once")
        for entry in self.entries:
            if both := sorted(entry.options.keys() & self.grid.keys()):
                raise ValueError(
                    f"{entry.label} sets {both[0]}, which --search tries: leave it out of one"
                )

    @property
    def seed_values(self) -> tuple[int, ...]:
        """The seeds as numbers."""
        try:
            return tuple(int(part) for part in self.seeds.split(",") if part.strip())
        except ValueError:
            raise ValueError(f"--seeds {self.seeds!r} is not a list such as 0,1,2") from None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The strategies with their options."""
        texts: list[str] = []
        for part in (text.strip() for text in self.strategies.split(",")):
            more = "=" in part and ":" not in part.partition("=")[0]
            if texts and (more or part[:1].isdigit()):
                texts[-1] += f",{part}"  # one more option, or value of a list, of the one before
            elif part:
                texts.append(part)
        return tuple(map(read_entry, texts))

    @property
    def grid(self) -> dict[str, list[Setting]]:
        """The settings to search and the values of each."""
        found = {}
        for part in (text for text in self.search.split(";") if text.strip()):
            name, _, values = part.strip().partition("=")
            name = name.replace("-", "_")
            if name in found:
                raise ValueError(f"--search names {name} twice: put its values into one list")
            found[name] = [option(name, value, "--search") for value in values.split(",")]
            if len(set(found[name])) < len(found[name]):
                raise ValueError(f"--search tries a value of {name} twice: {values}")
        return found

    @property
    def trials(self) -> Iterator[dict[str, Setting]]:
        """Every combination of the grid's values."""
        names, values = self.grid.keys(), self.grid.values()
        for combination in itertools.product(*values):
            yield dict(zip(names, combination, strict=True))

    @property
    def title(self) -> str:
        """The data set's name in the tables."""
        return self.name or Path(self.run.data).name.partition(".")[0] or self.run.data

    @property
    def figure(self) -> str:
        """What decides: the "metric" of classes, else the "loss", which is finer than a score."""
        return "metric" if self.run.task == "classification" else "loss"

    def search_seed(self, seed: int) -> int:
        """The seed with which the settings for this one are searched."""
        # Running text of natural clients is held out at its end, whatever the seed.
        fixed = self.run.task == "causal-lm" and self.run.partition.startswith("natural")
        return self.seed_values[0] if self.run.eval_data or fixed else seed

    def of_run(self, entry: Entry, seed: int, found: Mapping[str, Any]) -> SimulateConfig:
        """The config of one run of the comparison.

        Args:
            entry: its strategy.
            seed: its seed.
            found: what the search found for them.
        """
        out = Path(self.run.out) / "runs" / entry.folder / f"seed-{seed}"
        return self._config(entry, seed, found, out, {})

    def of_trial(self, entry: Entry, seed: int, values: Mapping[str, Any]) -> SimulateConfig:
        """The config of one trial of the search."""
        place = ",".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in values.items()
        )
        out = Path(self.run.out) / "search" / entry.folder / f"seed-{seed}" / _safe(place)
        rounds = self.search_rounds or -(-self.run.rounds // 2)
        # Only the end of a trial is looked at; one that is extended goes on as it was begun.
        begun = out / "config.json"
        every = read_settings(begun)["eval_every"] if begun.is_file() else rounds
        only = {"validation": True, "rounds": rounds, "eval_every": every, "targets": ""}
        return self._config(entry, seed, values, out, only)

    def _config(
        self,
        entry: Entry,
        seed: int,
        values: Mapping[str, Any],
        out: Path,
        changes: Mapping[str, Any],
    ) -> SimulateConfig:
        return replace(
            self.run,
            **{**entry.options, **values, **changes},
            strategy=entry.strategy,
            seed=seed,
            threads=self.run.threads or 1,
            eval_sketched=False,  # only one strategy has it, and no table shows it
            out=str(out),
            resume=(out / "config.json").is_file(),
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One strategy of a comparison.

    Attributes:
        label: as it was asked for, such as fslora:server_lr=2.
        strategy: its name.
        options: settings of its own.
    """

    label: str
    strategy: Any
    options: dict[str, Setting] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The label as the name of a folder."""
        return _safe(self.label)


def read_comparison(path: Path) -> dict[str, Any]:
    """Read a file of settings; those of the comparison alone are under `compare`.

    Returns:
        Settings of `CompareConfig` and of its runs, without the strategy, seed and resume of one.

    Raises:
        ValueError: the file is missing or damaged, or has an unknown setting.
    """
    values = read_settings(path)
    own = values.pop("compare", {})
    if not isinstance(own, dict):
        raise ValueError(  # noqa: TRY004 - a malformed file, no caller's mistake
            f"{path}: [compare] is a table of settings, not {own!r}; write them below it"
        )
    types = {item.name: item.type for item in fields(CompareConfig) if item.name != "run"}
    given = merged(None, values, str(path))
    for name in ("strategy", "seed", "resume"):
        given.pop(name, None)
    for key, value in own.items():
        name = key.replace("-", "_")
        text = ",".join(map(str, value)) if isinstance(value, list) else value
        if name not in types:
            raise ValueError(f"{path}: [compare] has no {key!r}; it has {', '.join(types)}")
        if type(text).__name__ != types[name]:
            raise ValueError(f"{path}: [compare] {key} = {value!r} is not of type {types[name]}")
        given[name] = text
    return given


def read_entry(text: str) -> Entry:
    """Read `name` or `name:key=value,key=value`; a value may be a list, such as ratios=1/4,1/2.

    Raises:
        ValueError: an unknown strategy or setting, or a setting that all strategies share.
    """
    name, _, rest = text.partition(":")
    options: dict[str, Setting] = {}
    for part in re.split(r",(?=[^,=]*=)", rest) if rest else ():
        key, _, value = part.partition("=")
        key = key.strip().replace("-", "_")
        if key in options:
            raise ValueError(f"{text}: {key} is there twice")
        options[key] = option(key, value, text)
    return Entry(text, _value("strategy", name, "--strategies"), options)


def option(name: str, text: str, source: str) -> Setting:
    """Read the value of a setting that strategies may differ in.

    Raises:
        ValueError: no such setting, a bad value, or a setting that belongs to the track.
    """
    if name in TRACK:
        raise ValueError(
            f"{source}: {name} must be the same for all strategies, or they are not comparable; "
            "give it as a flag of the whole comparison"
        )
    if name not in {item.name for item in fields(SimulateConfig)}:
        raise ValueError(f"{source}: unknown setting {name!r}; settings are the flags of --help")
    return _value(name, text.strip(), source)


def _value(name: str, text: str, source: str) -> Setting:
    kind: Any = get_type_hints(SimulateConfig)[name]
    try:
        if get_origin(kind) is Literal:
            value: Setting = {str(choice): choice for choice in get_args(kind)}[text]
        elif kind is bool:
            value = {"true": True, "false": False}[text.lower()]
        else:
            value = kind(text)
    except (KeyError, ValueError):
        choices = ", ".join(map(str, get_args(kind))) or f"a value of type {kind.__name__}"
        raise ValueError(f"{source}: {name} cannot be {text!r}; it takes {choices}") from None
    return value


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]", "_", text)
