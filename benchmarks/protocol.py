"""The comparison of all strategies that docs/results.md reports, as benchmarks/protocol.toml says.

The protocol was committed before the first run. Every run is an ordinary simulation, searched and
summed up by ``fslora compare``, one comparison for each setting; what a finished run recorded is
kept in benchmarks/results/protocol, so that another machine, or a later day, repeats nothing; what
each call of this command took of a processor is noted beside it.
``--protocol FILE`` runs another one, kept and reported likewise under the names that it gives.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.claims import claims_table
from benchmarks.protocol_cache import collect, ended, restore
from benchmarks.timing import append_record, device_name, git_commit
from benchmarks.workload import shared_data
from fslora import disk
from fslora.compare.command import COMPARE_FILE, compare, join
from fslora.compare.search import trials_of
from fslora.compare.settings import CompareConfig
from fslora.config import SimulateConfig
from fslora.report.comparison import write_comparison
from fslora.report.comparison_tables import markdown, paper_table, target_tables
from fslora.report.records import read_object
from fslora.settings import merged

HERE = Path(__file__).resolve().parent
PROTOCOL = HERE / "protocol.toml"
DOCUMENT = "docs/results.md"
MARK = "<!-- What follows is written by `python -m benchmarks protocol`. -->"
SPENT = "spent.jsonl"
_PATHS = ("model", "data", "eval_data")


@dataclass(frozen=True, slots=True)
class Setting:
    """One data set of the table, dealt to clients in one way.

    Attributes:
        slug: names its folder and its file of results.
        config: the comparison.
    """

    slug: str
    config: CompareConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing of the table, and write it; return 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks protocol", description=__doc__)
    parser.add_argument("--protocol", type=Path, default=PROTOCOL, help="another protocol")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--only", default="", help="settings by their slugs, comma-separated")
    parser.add_argument("--out", type=Path, help="the run folders; default runs/ and its name")
    parser.add_argument(
        "--collect", action="store_true", help="run nothing: keep what finished, write the table"
    )
    chosen = parser.parse_args(arguments)
    console = Console()
    protocol: Path = chosen.protocol
    if not protocol.is_file():
        parser.error(f"there is no file {protocol}")
    document = HERE.parent / document_of(protocol)
    out: Path = chosen.out or Path("runs") / protocol.stem
    settings = read_protocol(protocol, out, chosen.jobs)
    wanted = chosen.only.split(",") if chosen.only else list(settings)
    if unknown := [slug for slug in wanted if slug not in settings]:
        parser.error(f"there is no setting {unknown[0]!r}; there is {', '.join(settings)}")
    for slug, setting in settings.items():
        store = HERE / "results" / protocol.stem / f"{slug}.jsonl"
        folder = Path(setting.config.run.out)
        before = restore(store, folder, shared_data())
        if slug not in wanted:
            continue
        console.print(f"{slug}: {before} runs were finished before")
        start_s = _cpu_s()
        try:
            if not chosen.collect:
                compare(setting.config, console)
        finally:
            spent_s = _cpu_s() - start_s
            count = collect(folder, store, shared_data())
            console.print(f"{slug}: {count} finished runs are kept in {store}")
            if count > before and not chosen.collect:
                spent = {"setting": slug, "runs": count - before, "cpu_seconds": round(spent_s, 1)}
                provenance = {"commit": git_commit(), "processor": device_name("cpu")}
                append_record(store.parent / SPENT, spent | provenance)
    for setting in settings.values():
        sum_up(setting, console)
    write_results(settings, out, document, console)
    return 0


def _cpu_s() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    return sum(os.times()[:4])


def read_protocol(path: Path, out: Path, jobs: int) -> dict[str, Setting]:
    """Read the settings of the table.

    Args:
        path: a TOML file with the tables ``run`` and ``compare``, shared by all settings, and one
            ``[[setting]]`` for each with a ``slug``, its own ``run`` and ``compare``, and the
            strategies that only it has as ``also``. Models and data are named below the folder
            of shared data. ``document`` names the page that is written; that of
            benchmarks/protocol.toml is docs/results.md.
        out: the folder of run folders.
        jobs: runs at a time.

    Returns:
        Slug to setting, in the file's order.

    Raises:
        ValueError: an unknown setting or a value of the wrong type.
    """
    protocol = tomllib.loads(path.read_text(encoding="utf-8"))
    settings = {}
    for table in protocol["setting"]:
        slug = table["slug"]
        run = {**protocol["run"], **table["run"], "out": str(out / slug)}
        run |= {key: str(shared_data() / run[key]) for key in _PATHS if run.get(key)}
        own = {**protocol["compare"], **table["compare"], "jobs": jobs}
        own["strategies"] = [*own["strategies"], *table.get("also", [])]
        config = CompareConfig(
            SimulateConfig(**merged(None, run, str(path))),
            **{key: _text(value) for key, value in own.items()},
        )
        settings[slug] = Setting(slug, config)
    return settings


def sum_up(setting: Setting, console: Console) -> None:
    """Compare a setting whose runs have all finished: nothing is trained. Else it has no table."""
    config = setting.config
    (Path(config.run.out) / COMPARE_FILE).unlink(missing_ok=True)  # it may be of fewer runs
    runs = [run for *_, run in trials_of(config)]
    runs += [
        config.of_run(entry, seed, {}) for entry in config.entries for seed in config.seed_values
    ]
    if all(ended(Path(run.out)) for run in runs):
        try:
            compare(config, console)
        except ValueError as error:  # what is kept is of another protocol
            console.print(f"{setting.slug}: {error}", markup=False)


def document_of(path: Path) -> str:
    """Return the page that a protocol's tables are written into, from the repository's root.

    Raises:
        ValueError: another protocol than the table's own names none.
    """
    named = tomllib.loads(path.read_text(encoding="utf-8")).get("document")
    if named is None and path.resolve() != PROTOCOL:
        raise ValueError(f'{path} names no page for its tables: document = "docs/….md"')
    return str(named or DOCUMENT)


def write_results(
    settings: Mapping[str, Setting], out: Path, document: Path, console: Console
) -> None:
    """Write the table of the settings that are finished, and say which are not."""
    finished = [slug for slug in settings if (out / slug / COMPARE_FILE).is_file()]
    for slug in settings:
        if slug not in finished:
            console.print(f"{slug}: not finished")
    if not finished:
        return
    join([out / slug for slug in finished], out)
    report = write_comparison(out)
    datasets = read_object(out / COMPARE_FILE)["datasets"]
    tables = [markdown(paper_table(datasets))]
    for data in datasets:
        found = [*target_tables(data), claims_table(data)]
        tables += [f"## {data['name']}\n", *(markdown(table, level=3) for table in found)]
    missing = [slug for slug in settings if slug not in finished]
    if missing:
        tables.insert(0, f"Not finished yet: {', '.join(missing)}.\n")
    before = document.read_text(encoding="utf-8") if document.is_file() else ""
    page = f"{before.partition(MARK)[0]}{MARK}\n\n" + "\n".join(tables)
    disk.write_atomically(document, page.encode())
    console.print(f"tables: {document}\nreport: {report}")


def _text(value: Any) -> Any:  # noqa: ANN401
    return ",".join(map(str, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
