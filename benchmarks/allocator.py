"""What it costs to have glibc give freed memory back: peak memory and CPU time, side by side.

One process with glibc's own habits and one for each threshold (MALLOC_MMAP_THRESHOLD_, in KiB:
larger blocks are mapped alone, and unmapped when freed) train in turns, round by round, so that a
busy machine slows them alike. CPU time is the median quotient of the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import process_time

from benchmarks.flags import at_least
from benchmarks.plan import chosen_of, warm, workloads
from benchmarks.plan_fleets import base_config
from benchmarks.workload import LLAMA_768
from fslora.errors import StoppedRunError
from fslora.plan.kept import resident_bytes

STORIES = "stories260K"
_SIZE = 4  # S of R = 16


def child(settings: str) -> None:
    """Train a round for every line that is read; answer its CPU seconds and the peak so far."""
    trainer, task, baseline = warm(settings, _SIZE)
    for _ in sys.stdin:
        start = process_time()
        trainer(task)
        seconds = process_time() - start
        print(json.dumps([seconds, resident_bytes("VmHWM") - baseline]), flush=True)


def compare(settings: str, thresholds: Sequence[int], rounds: int) -> list[tuple[float, float]]:
    """Return CPU time over that with glibc's own habits, and the peak in bytes, for each.

    Args:
        settings: of the run, as JSON.
        thresholds: KiB; 0 leaves glibc its own.
        rounds: turns of each, after one that is not counted.
    """
    command = [sys.executable, "-Wignore", "-m", "benchmarks", "allocator", "--child", settings]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=own | ({"MALLOC_MMAP_THRESHOLD_": str(kib << 10)} if kib else {}),
        )
        for kib in thresholds
    ]
    answers: list[list[list[float]]] = [[] for _ in processes]
    for turn in range(rounds + 1):
        order = range(len(processes)) if turn % 2 else reversed(range(len(processes)))
        for number in order:
            answers[number].append(_ask(processes[number]))
    for process in processes:
        process.communicate()
    return [
        (
            median(a[0] / b[0] for a, b in zip(each[1:], answers[0][1:], strict=True)),
            each[-1][1],
        )
        for each in answers
    ]


def _ask(process: subprocess.Popen[str]) -> list[float]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the child has no pipes")
    with suppress(BrokenPipeError):  # it has ended
        process.stdin.write("\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise StoppedRunError(
            f"a process that trains ended with code {process.wait()}; `python -m benchmarks plan` "
            "says more of what is wrong there"
        )
    found: list[float] = json.loads(answer)
    return found


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks allocator", description=__doc__)
    parser.add_argument(
        "--models", help=f"of {LLAMA_768},MiniLM,{STORIES}; default: all that are at hand"
    )
    parser.add_argument("--thresholds", default="0,1024", help="KiB, the first 0: glibc's own")
    parser.add_argument("--rounds", type=at_least(1), default=12)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        child(chosen.child)
        return 0
    if not re.fullmatch(r"0(,\d+)*", chosen.thresholds):
        parser.error(f"--thresholds are whole numbers, the first 0, not {chosen.thresholds!r}")
    thresholds = [int(kib) for kib in chosen.thresholds.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        known = workloads(Path(folder))
        with suppress(FileNotFoundError):
            known[STORIES] = base_config(Path(folder))
        for name, config in chosen_of(known, chosen.models).items():
            found = compare(json.dumps(asdict(config)), thresholds, chosen.rounds)
            for kib, (times, peak) in zip(thresholds, found, strict=True):
                habit = f"{kib} KiB" if kib else "glibc's own"
                print(f"{name:<12} {habit:<12} CPU x{times:.3f}  peak {peak / 1e6:.1f} MB")
    return 0
