"""What finished runs recorded, in one file of JSON lines for each setting.

A line has all that a comparison reads of a run: its settings, its rounds without what single
clients did, the hashes of its split. Restored, a run is finished and is not run again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.timing import git_commit
from fslora import checkpoint, disk
from fslora.compare.runs import finished
from fslora.config import SimulateConfig
from fslora.report.records import read_object
from fslora.settings import merged

Line = dict[str, Any]

PLACE = "$DATA"
_SETTINGS, _SUMMARY = "config.json", "summary.json"
_OF_CLIENTS = ("clients", "coverage", "eval_loss_by_ratio", "unavailable")
_PATHS = ("model", "data", "eval_data")


def restore(store: Path, folder: Path, data: Path) -> int:
    """Put kept runs back into their folders, except those that are there.

    Args:
        store: the kept lines; it need not be there.
        folder: of the comparison.
        data: the folder that the settings' paths are below.

    Returns:
        How many runs the store has.
    """
    lines = read(store)
    for place, line in lines.items():
        run = folder / place
        if (run / _SETTINGS).is_file():
            continue
        settings = {**line["settings"], "out": str(run)}
        for key in _PATHS:
            settings[key] = str(settings[key]).replace(PLACE, str(data))
        empty = {key: {} if key == "eval_loss_by_ratio" else [] for key in _OF_CLIENTS}
        rounds = (json.dumps({**record, **empty}, allow_nan=False) for record in line["rounds"])
        records = "".join(f"{record}\n" for record in rounds)
        disk.write_atomically(run / checkpoint.RECORDS_FILE, records.encode())
        disk.write_json(run / _SUMMARY, {"split": line["split"]})
        disk.write_json(run / _SETTINGS, settings)  # last: a run without it is none
    return len(lines)


def collect(folder: Path, store: Path, data: Path) -> int:
    """Keep the finished runs of a comparison, beside those that were kept before.

    Args:
        folder: of the comparison.
        store: where to keep them.
        data: the folder that the settings' paths are below.

    Returns:
        How many runs the store has now.
    """
    lines = read(store)
    for path in sorted(folder.glob(f"*/**/{_SETTINGS}")):
        run = path.parent
        place = run.relative_to(folder).as_posix()
        if place not in lines and ended(run):
            lines[place] = _line(run, place, data)
    if lines:
        text = "".join(json.dumps(lines[place], sort_keys=True) + "\n" for place in sorted(lines))
        disk.write_atomically(store, text.encode())
    return len(lines)


def read(store: Path) -> dict[str, Line]:
    """Read the kept lines by the place of their run in the comparison's folder."""
    if not store.is_file():
        return {}
    lines = map(json.loads, store.read_text(encoding="utf-8").splitlines())
    return {line["place"]: line for line in lines}


def ended(run: Path) -> bool:
    """Whether there is a run in a folder, and it has come to its end."""
    settings = run / _SETTINGS
    if not settings.is_file():
        return False
    values = merged(None, read_object(settings), str(settings))
    return finished(SimulateConfig(**{**values, "out": str(run), "resume": True}))


def _line(run: Path, place: str, data: Path) -> Line:
    settings = read_object(run / _SETTINGS)
    for key in _PATHS:
        settings[key] = str(settings[key]).replace(str(data), PLACE)
    rounds = [
        {key: value for key, value in record.items() if key not in _OF_CLIENTS}
        for record in checkpoint.read_records(run)
    ]
    split = read_object(run / _SUMMARY)["split"]
    settings.pop("out")
    return {
        "place": place,
        "commit": git_commit(),
        "settings": settings,
        "rounds": rounds,
        "split": split,
    }
