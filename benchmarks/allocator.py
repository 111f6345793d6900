"""What it costs to have glibc give freed memory back: peak memory and CPU time, side by side.

One process with glibc's own habits and one for each threshold (MALLOC_MMAP_THRESHOLD_, in KiB:
larger blocks are mapped alone, and unmapped when freed) train in turns, round by round, so that a
busy machine slows them alike. CPU time is the median quotient of the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import process_time

from benchmarks.plan import warm, workloads
from benchmarks.plan_fleets import base_config
from fslora.plan.kept import resident_bytes

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
    process.stdin.write("\n")
    process.stdin.flush()
    answer: list[float] = json.loads(process.stdout.readline())
    return answer


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks allocator", description=__doc__)
    parser.add_argument("--models", default="llama-768,MiniLM,stories260K")
    parser.add_argument("--thresholds", default="0,1024", help="KiB, the first 0")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        child(chosen.child)
        return 0
    thresholds = [int(kib) for kib in chosen.thresholds.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        known = dict(workloads(Path(folder)))
        for name in chosen.models.split(","):
            config = base_config(Path(folder)) if name == "stories260K" else known[name]
            found = compare(json.dumps(asdict(config)), thresholds, chosen.rounds)
            for kib, (times, peak) in zip(thresholds, found, strict=True):
                habit = f"{kib} KiB" if kib else "glibc's own"
                print(f"{name:<12} {habit:<12} CPU x{times:.3f}  peak {peak / 1e6:.1f} MB")
    return 0
