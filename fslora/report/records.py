"""What a run folder says: settings, one record a round, the summary if the run came to its end."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fslora.report.units import score_name

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One run as its folder records it.

    Attributes:
        config: the settings, a flat mapping.
        rounds: the records of `rounds.jsonl` in order; round 0 is the evaluation before training.
        summary: `summary.json`, or None if the run has not come to its end.
        notes: what a reader of the report has to know about the files, one sentence each.
    """

    config: Record
    rounds: list[Record]
    summary: Record | None
    notes: list[str]

    @property
    def rounds_done(self) -> int:
        """The number of the last recorded round."""
        return int(self.rounds[-1]["round"])

    @property
    def judged_by(self) -> str:
        """The recorded figure that says how good the adapter is: the metric where there is one."""
        return "eval_metric" if self.series("eval_metric")[0] else "eval_loss"

    @property
    def score(self) -> str:
        """The name of the metric."""
        task, metric = (str(self.config.get(key) or "metric") for key in ("task", "metric"))
        return score_name(task, metric)

    @property
    def bytes_moved(self) -> int:
        """Bytes that all rounds moved, both directions together."""
        if self.summary is not None:
            return int(self.summary["bytes_up"] + self.summary["bytes_down"])
        return sum(record["bytes_up"] + record["bytes_down"] for record in self.rounds)

    @property
    def full_rank_bytes(self) -> int | None:
        """Bytes that FedAvg-LoRA at full rank would have moved, both directions, if known."""
        if self.summary is None:
            return None
        return int(self.summary["full_rank_bytes_up"] + self.summary["full_rank_bytes_down"])

    @property
    def classes(self) -> list[Record]:
        """One record a capacity class, by rising ratio.

        Without a summary they are counted from the rounds and lack what only the summary knows:
        sketch size, share of full rank, losses.
        """
        if self.summary is not None:
            return sorted(self.summary["classes"], key=lambda record: record["ratio"])
        parts: dict[float, list[Record]] = {}
        for record in self.rounds:
            for client in record["clients"]:
                parts.setdefault(client["ratio"], []).append(client)
        return [
            {
                "ratio": ratio,
                "clients": len({client["id"] for client in clients}),
                "participations": len(clients),
                "bytes_up": sum(client["bytes_up"] for client in clients),
                "bytes_down": sum(client["bytes_down"] for client in clients),
            }
            for ratio, clients in sorted(parts.items())
        ]

    @property
    def rejected(self) -> list[tuple[int, Record]]:
        """(round, client record) of every update that the server refused."""
        return [
            (record["round"], client)
            for record in self.rounds
            for client in record["clients"]
            if client["rejected"]
        ]

    @property
    def coverage(self) -> list[Record]:
        """The rounds in which ranks were trained, in order: not round 0."""
        return [record for record in self.rounds if record["round"] > 0 and record["coverage"]]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Rounds and values of a figure, without the rounds in which it was not measured."""
        points = [
            (record["round"], record[key]) for record in self.rounds if is_number(record[key])
        ]
        return [at for at, _ in points], [value for _, value in points]

    def before_after(self, key: str) -> tuple[float, float] | None:
        """An evaluated figure (`eval_loss`, `eval_metric`) before training and after it."""
        if self.summary is not None:
            before, after = self.summary[f"{key}_before"], self.summary[f"{key}_after"]
            return (before, after) if is_number(before) and is_number(after) else None
        values = self.series(key)[1]
        return (values[0], values[-1]) if values else None


def is_number(value: float | None) -> bool:
    """Whether a recorded figure is there and finite (a diverged run records NaN)."""
    return value is not None and math.isfinite(value)


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: `config.json` or `rounds.jsonl` is missing.
        ValueError: a file is damaged (a cut last round is not: a crash leaves one), or holds no
            round.
    """
    rounds, notes = _read_rounds(folder / "rounds.jsonl")
    config = read_object(folder / "config.json")
    summary_path = folder / "summary.json"
    summary = read_object(summary_path) if summary_path.exists() else None
    if summary is None:
        notes.append(
            f"This run has not come to its end: {rounds[-1]['round']} of "
            f"{config.get('rounds', 'unknown')} rounds are recorded and there is no summary.json, "
            "so what only the end knows is left out. --resume continues it."
        )
    return Run(config, rounds, summary, notes)


def read_object(path: Path) -> Record:
    """Read a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); run the simulation again") from (
            error
        )
    if isinstance(content, dict):
        return content
    raise ValueError(f"{path} must hold one JSON object; run the simulation again")


def _read_rounds(path: Path) -> tuple[list[Record], list[str]]:
    # Not splitlines: a client's id may hold a character that it takes for a line's end.
    lines = _read_text(path).removesuffix("\n").split("\n")
    rounds: dict[int, Record] = {}
    notes = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            at = int(record["round"])
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise ValueError(
                    f"line {number} of {path} is not the record of a round ({error!r}); "
                    "remove that line, or run the simulation again"
                ) from error
            notes.append("The last line of rounds.jsonl is cut off (a crash?) and was left out.")
            continue
        if at in rounds:
            notes.append(f"Round {at} is recorded twice; the later record counts.")
        rounds[at] = record
    if not rounds:
        raise ValueError(f"{path} holds no whole round yet: let the run finish one, then report")
    return [rounds[at] for at in sorted(rounds)], notes


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: is {path.parent} the folder that `fslora simulate --out` wrote?"
        )
    return path.read_text(encoding="utf-8", errors="replace")
