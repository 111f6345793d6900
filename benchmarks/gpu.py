"""Every check and figure that needs a GPU, in one script of less than ten minutes.

    python -m benchmarks gpu --out FOLDER

From the repository's root; nothing needs to be installed. Five files are written under FOLDER
(default: ``benchmarks/results/`` and the device's name): ``results.json``, every stage by its name,
kept up to date while it runs; ``tuned.json``, ``layer.jsonl``, ``layer.png``; and ``table.txt``,
printed last, also when the script is told to end. The stage "tuning" also puts its table among the
shipped ones, so that the later stages use it: on another checkout, ``tuned.json`` goes into
``fslora_kernels/tuned/`` under the device's name. Where there is no git history, FSLORA_COMMIT says
which commit was run.

Each stage runs in a process of its own, so that one that crashes or hangs the device does not take
the others with it. Without a GPU, or with ``--dry``, every stage runs in a tiny size on the CPU,
so that the script cannot rot; Triton takes part where TRITON_INTERPRET=1 is set.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.timing import device_name, provenance
from fslora_kernels._dispatch import IMPLEMENTATIONS, unavailable

Row = dict[str, Any]
"""One finding: "what", "ok", and whatever was measured; "error" where it is not ok."""

# Name to (module, seconds that it may take, the start of its process included); the stage is the
# module's function of that name. Each also gets what those before it left, the last all of TOTAL_S:
# "layer" measures as many cells as there is time for.
STAGES = {
    "environment": ("benchmarks.gpu_tuning", 25),
    "correctness": ("benchmarks.gpu_operations", 75),
    "operations": ("benchmarks.gpu_operations", 60),
    "fuse": ("benchmarks.gpu_checks", 35),
    "simulate": ("benchmarks.gpu_checks", 45),
    "tuning": ("benchmarks.gpu_tuning", 65),
    "tuned": ("benchmarks.gpu_operations", 30),
    "memory": ("benchmarks.gpu_layer", 80),
    "layer": ("benchmarks.gpu_layer", 65),
    "sanitizer": ("benchmarks.gpu_tools", 50),
    "counters": ("benchmarks.gpu_tools", 30),
}
TOTAL_S = 560  # with the script's own start and end below ten minutes
_GRACE_S = 3  # between asking a process to end and ending it
RESULTS = "results.json"
_WORKERS = 12  # processes that check at once, each compiling what it needs
_MARGIN_S = 10  # a stage stops by itself this much before it is killed


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a stage runs.

    Attributes:
        dry: tiny sizes on the CPU, only to see that the script works.
        out: folder of the results, those of earlier stages included.
        lorafusion: a checkout of LoRAFusion, for a row of it in every cell, or None.
        limit_s: what the stage may take, the start of its process included.
    """

    dry: bool
    out: Path
    lorafusion: Path | None = None
    limit_s: float = math.inf

    @property
    def device(self) -> str:
        """Torch's device type."""
        return "cpu" if self.dry else "cuda"

    @property
    def implementations(self) -> list[str]:
        """Those that can run on the device."""
        return [name for name in IMPLEMENTATIONS if unavailable(name, self.device) is None]


def run_stage(name: str, setting: Setting) -> Row:
    """Run one stage in this process, keeping its rows on disk as they come.

    Returns:
        What the stage's file holds: status "ok" or "failed", the rows, the error.
    """
    module, _ = STAGES[name]
    start = perf_counter()
    if setting.dry:
        torch.set_num_threads(1)  # nothing there is worth waiting for a second one
    result: Row = {
        "stage": name,
        "status": "running",
        "dry": setting.dry,
        **provenance(setting.device),
    }
    result |= {"implementations": setting.implementations, "error": None, "rows": []}
    try:
        stage: Callable[[Setting], Iterator[Row]] = getattr(import_module(module), name)
        for row in stage(setting):
            result["rows"].append(row)
            result["seconds"] = round(perf_counter() - start, 1)
            write(setting.out, result)
            if not setting.dry and result["seconds"] > setting.limit_s - _MARGIN_S:
                result["error"] = f"out of time: stopped after {len(result['rows'])} rows"
                break
            lost = None if row["ok"] else lost_device()
            if lost is not None:
                result["error"] = f"stopped, as nothing after it can be judged: {lost}"
                break
    except Exception as error:  # whatever it is, it is recorded and the other stages go on
        result["error"] = f"{type(error).__name__}: {error}"
        result["traceback"] = traceback.format_exc()
    failed = result["error"] or not all(row["ok"] for row in result["rows"])
    result["status"] = "failed" if failed else "ok"
    result["seconds"] = round(perf_counter() - start, 1)
    write(setting.out, result)
    return result


def lost_device() -> str | None:
    """Say what broke this process's context of the GPU, after which every call fails, or None."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def run_apart(name: str, setting: Setting) -> Row:
    """Run one stage in a process of its own, ended when its time is over."""
    limit_s = setting.limit_s
    command = [sys.executable, "-m", "benchmarks", "gpu", "--here", "--only", name]
    command += ["--out", str(setting.out), "--limit", f"{name}={limit_s}"]
    command += ["--dry"] if setting.dry else []
    command += ["--lorafusion", str(setting.lorafusion)] if setting.lorafusion else []
    root = Path(__file__).resolve().parents[1]
    code = finish(subprocess.Popen(command, cwd=root, start_new_session=True), limit_s)
    problem = f"the process ended with code {code} before it was done"
    if code is None:
        problem = f"killed after {limit_s:g} s"
    result: Row = {"stage": name, "status": "running", "dry": setting.dry, "rows": []}
    result = read(setting.out).get(name, result)
    if result["status"] == "running":
        result |= {"status": "failed", "error": problem}
        write(setting.out, result)
    return result


def finish(process: subprocess.Popen[Any], limit_s: float) -> int | None:
    """Wait for a process that leads a session of its own, and end all that it started.

    It is asked first, so that it can end what it started in other sessions. That also happens when
    the wait is interrupted.

    Args:
        process: what was started.
        limit_s: when it is ended.

    Returns:
        Its exit code; None if it was ended.
    """
    try:
        return process.wait(max(0.0, limit_s))
    except subprocess.TimeoutExpired:
        return None
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):  # nothing of it is left
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_S)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM end this process as an exception does, ``finally`` included."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def spread(
    check: Callable[[Any], list[Row]], tasks: Iterable[Any], setting: Setting
) -> Iterator[Row]:
    """Run a check over tasks: on a GPU in several processes at once, as most of it is compiling.

    Args:
        check: a module's function; takes a task and returns its rows.
        tasks: what it is called with.
        setting: dry runs stay in this process.

    Yields:
        The rows, task by task as they are done.
    """
    if setting.dry:
        for task in tasks:
            yield from check(task)
        return
    pool = ProcessPoolExecutor(_WORKERS, mp_context=get_context("spawn"))
    try:
        for done in as_completed([pool.submit(check, task) for task in tasks]):
            yield from done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read(folder: Path) -> dict[str, Row]:
    """Return the results of the stages so far, by name."""
    path = folder / RESULTS
    found: dict[str, Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def write(folder: Path, result: Row) -> None:
    """Put a stage's result among the others, the file in one piece."""
    _write_all(folder, read(folder) | {result["stage"]: result})


def _write_all(folder: Path, results: Mapping[str, Row]) -> None:
    partial = folder / f"{RESULTS}.part"
    partial.write_text(json.dumps(results) + "\n", encoding="utf-8")
    partial.replace(folder / RESULTS)


def table(results: Sequence[Row]) -> str:
    """Lay out what happened: figures first, then failures, then one line for each stage."""
    lines: list[str] = []
    for result in results:
        shown = [row["line"] for row in result["rows"] if "line" in row]
        lines += [f"\n{result['stage']}", *(f"  {line}" for line in shown)] if shown else []
    for result in results:
        for row in result["rows"]:
            if not row["ok"]:
                lines.append(f"FAILED {result['stage']}: {row['what']}: {row.get('error')}")
        if result.get("error"):
            lines.append(f"FAILED {result['stage']}: {result['error']}")
    lines.append(
        f"\n{'stage':<14}{'status':<10}{'rows':>6}{'failed':>8}{'refused':>9}{'seconds':>9}"
    )
    for result in results:
        rows = result["rows"]
        failed, refused = (
            sum(not row["ok"] for row in rows),
            sum("refused" in row for row in rows),
        )
        lines.append(
            f"{result['stage']:<14}{result['status']:<10}{len(rows):>6}{failed:>8}{refused:>9}"
            f"{result.get('seconds', 0.0):>9.1f}{'   dry' if result['dry'] else ''}"
        )
    return "\n".join(lines).lstrip("\n")


def _dry_notice(*, asked: bool) -> str:
    why = "as asked" if asked else "torch sees no GPU here"
    reasons = {name: unavailable(name, "cpu") for name in IMPLEMENTATIONS}
    left_out = [f"; {name} is left out: {reason}" for name, reason in reasons.items() if reason]
    return (
        f"DRY ({why}): every stage runs in a tiny size on the CPU and its times mean nothing"
        + "".join(left_out)
    )


def main(arguments: Sequence[str]) -> int:
    """Run the stages; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results; default: by device")
    parser.add_argument("--lorafusion", type=Path, help="a checkout of LoRAFusion, to time it too")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--here", action="store_true", help="no process for each stage")
    parser.add_argument(
        "--limit", nargs="+", type=_limit, default=[], metavar="STAGE=SECONDS", help="more for one"
    )
    chosen = parser.parse_args(arguments)
    dry = chosen.dry or not torch.cuda.is_available()
    if dry and chosen.here and not chosen.dry:
        parser.error("torch sees no GPU in this process; for a dry run say so with --dry")
    name = "dry" if dry else re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    out = (chosen.out or Path(__file__).parent / "results" / name).resolve()
    out.mkdir(parents=True, exist_ok=True)
    setting = Setting(dry, out, chosen.lorafusion and chosen.lorafusion.resolve())
    with ended_by_signals():
        if chosen.here and len(chosen.only) == 1:
            limit_s = dict(chosen.limit).get(chosen.only[0], math.inf)
            result = run_stage(chosen.only[0], replace(setting, limit_s=limit_s))
            return int(result["status"] != "ok")
        if dry:
            print(_dry_notice(asked=chosen.dry), flush=True)
        return _run_all(chosen.only, setting, dict(chosen.limit), apart=not (dry or chosen.here))


def _limit(text: str) -> tuple[str, float]:
    """Read STAGE=SECONDS."""
    name, _, seconds = text.partition("=")
    if name not in STAGES:
        raise argparse.ArgumentTypeError(f"{name!r} is no stage: {', '.join(STAGES)}")
    return name, float(seconds)


def _run_all(
    names: Sequence[str], setting: Setting, asked: Mapping[str, float], *, apart: bool
) -> int:
    """Run stages one after the other, and print the table however that ends."""
    start, end = perf_counter(), 0.0
    kept = read(setting.out)
    _write_all(setting.out, {name: result for name, result in kept.items() if name not in names})
    try:
        for name in names:
            print(f"… {name}", flush=True)
            end += asked.get(name, STAGES[name][1])
            if name == names[-1] and len(names) > 1:
                end = max(end, TOTAL_S)
            left_s = end - (perf_counter() - start)
            (run_apart if apart else run_stage)(name, replace(setting, limit_s=round(left_s, 1)))
    finally:
        kept = read(setting.out)
        results = [kept[name] for name in names if name in kept]
        text = table(results)
        if len(results) < len(names):
            text += f"\nwithout a result: {', '.join(name for name in names if name not in kept)}"
        (setting.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n\nresults: {setting.out}", flush=True)
    return int(any(result["status"] != "ok" for result in results))
