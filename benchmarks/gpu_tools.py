"""Two stages of ``benchmarks.gpu``: compute-sanitizer on tiny shapes, and hardware counters.

A tool that is missing, or may not look at this device, is a refusal with what it said, no failure;
one that did not finish is a failure. The launches run once without the sanitizer before, so that
it does not wait for the compiler.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from time import perf_counter

from benchmarks import gpu_launches
from benchmarks.gpu import Row, Setting, finish
from fslora_kernels._dispatch import unavailable
from fslora_kernels.ops.sketched_linear import cost

ROOT = Path(__file__).resolve().parents[1]
LAUNCHES = (sys.executable, "-m", "benchmarks.gpu_launches")
FOUND_ERRORS = 86  # exit code that the sanitizer is told to use for them
_RESERVE_S = 12
_LONGEST_S = 3600.0  # where nobody set a limit
# Where NVIDIA's installers put them, if they are not on the path.
_FOLDERS = (
    "/usr/local/cuda*/bin",
    "/usr/local/cuda*/compute-sanitizer",
    "/opt/nvidia/nsight-compute/*",
)
# Torch probes pointers with calls that are meant to fail: only accesses to memory are of interest.
CHECKS = {"memcheck": ("--report-api-errors", "no"), "racecheck": ()}


def find_tool(name: str) -> str | None:
    """Return the path of a tool: on the path, in NVIDIA's folders, or in a Python package."""
    on_path = shutil.which(name)
    if on_path is not None:
        return on_path
    installed = (path for folder in _FOLDERS for path in Path("/").glob(f"{folder[1:]}/{name}"))
    specs = [spec for spec in map(find_spec, ("nvidia", "triton")) if spec is not None]
    folders = [Path(f) for spec in specs for f in spec.submodule_search_locations or ()]
    packed = (path for folder in folders for path in folder.rglob(name))
    found = (p for p in chain(installed, packed) if p.is_file() and os.access(p, os.X_OK))
    return next((str(path) for path in found), None)


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended.

    Attributes:
        code: its exit code; None if it was killed.
        text: what it printed.
    """

    code: int | None
    text: str

    @property
    def words(self) -> str:
        """The last of what it said, the tool's own lines if there are any."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        own = [line for line in lines if line.startswith("==")]
        ended = "killed when its time was over" if self.code is None else f"exit code {self.code}"
        return f"{ended}: {' | '.join((own or lines)[-6:])[-1500:]}"


def run(command: Sequence[str], seconds: float) -> Ran:
    """Run a command from the repository's root.

    Torch's allocator is told to give every tensor memory of its own, so that a read beside a tensor
    is a read outside of an allocation.
    """
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = finish(process, min(seconds, _LONGEST_S))
        out.seek(0)
        return Ran(code, out.read())


def _unusable(tool: str, setting: Setting) -> tuple[str | None, str]:
    """Return a tool's path, or None and why there is nothing to run it on."""
    reason = unavailable("triton", setting.device)
    if reason is None and setting.dry:
        reason = "the kernels run in Triton's interpreter, where the tool sees nothing"
    path = None if reason else find_tool(tool)
    return path, reason or f"{tool} is neither on the path nor in a package"


# -- sanitizer -------------------------------------------------------------------------------------


def sanitizer(setting: Setting) -> Iterator[Row]:
    """Run every kernel once under memcheck, then under racecheck as far as the time goes."""
    end = perf_counter() + _seconds(setting)
    path, reason = _unusable("compute-sanitizer", setting)
    if setting.dry and unavailable("triton", setting.device) is None:
        gpu_launches.main(["tiny"])
    if path is not None:
        yield _alone(end)
    for check, own_flags in CHECKS.items():
        if path is None:
            yield {"what": check, "ok": True, "refused": reason, "line": f"{check}: {reason}"}
            continue
        flags = ("--tool", check, *own_flags, "--target-processes", "application-only")
        flags += ("--error-exitcode", str(FOUND_ERRORS))
        yield judged(check, run((path, *flags, *LAUNCHES, "tiny"), end - perf_counter()))


def _seconds(setting: Setting) -> float:
    """What a stage may use; a dry run starts no tool."""
    return setting.limit_s - _RESERVE_S


def _alone(end: float) -> Row:
    """Run the tiny launches without a tool, which compiles what they need."""
    ran = run((*LAUNCHES, "tiny"), end - perf_counter())
    row: Row = {"what": "launches alone", "ok": ran.code == 0}
    return row if row["ok"] else row | {"error": ran.words}


def judged(check: str, ran: Ran) -> Row:
    """Tell a clean run, a finding, and a tool that could not look."""
    row: Row = {"what": check, "ok": True}
    if ran.code == 0 and gpu_launches.DONE in ran.text and "SUMMARY" in ran.text:
        summary = next(line for line in ran.text.splitlines() if "SUMMARY" in line)
        return row | {"line": f"{check}: {summary.strip('= ')}"}
    if ran.code is None:
        return row | {"ok": False, "error": f"did not finish: {ran.words}"}
    if ran.code == FOUND_ERRORS:
        return row | {"ok": False, "error": ran.words, "text": ran.text[:20_000]}
    return row | {"refused": ran.words, "line": f"{check} could not look: {ran.words}"}


# -- counters --------------------------------------------------------------------------------------

METRICS = {"dram__bytes_read.sum": "read", "dram__bytes_write.sum": "written"}


def counters(setting: Setting) -> Iterator[Row]:
    """Read how many bytes each kernel of one layer moves to and from the device's memory."""
    end = perf_counter() + _seconds(setting)
    path, reason = _unusable("ncu", setting)
    if path is None:
        yield {"what": "DRAM bytes", "ok": True, "refused": reason, "line": reason}
        return
    flags = ("--target-processes", "application-only", "--csv", "--print-units", "base")
    flags += ("--clock-control", "none")
    flags += ("--metrics", ",".join(METRICS))
    flags += ("--kernel-name", "regex:apply|wgrad|reduce_kernel")
    ran = run((path, *flags, *LAUNCHES, "large"), end - perf_counter())
    moved = launches_of(ran.text)
    if ran.code is None:
        yield {"what": "DRAM bytes", "ok": False, "error": f"did not finish: {ran.words}"}
    elif not moved:
        yield {"what": "DRAM bytes", "ok": True, "refused": ran.words, "line": ran.words}
    if ran.code is None or not moved:
        return
    for name, found in moved:
        row: Row = {"what": name, "ok": True, "mb": found}
        yield row | {"line": f"{name}: " + ", ".join(f"{w} {mb:.1f} MB" for w, mb in found.items())}
    case = gpu_launches.LARGE
    size = (case.tokens, case.in_features, case.out_features, case.rank)
    least = sum(cost(*size, backward=b, itemsize_bytes=2).lora_bytes for b in (False, True)) / 1e6
    total = sum(sum(found.values()) for _, found in moved)
    line = (
        f"together {total:.0f} MB, {total / least:.2f} × the least (writes may stay in the cache)"
    )
    yield {"what": "sum", "ok": True, "mb": total, "least_mb": least, "line": line}


def launches_of(text: str) -> list[tuple[str, dict[str, float]]]:
    """Read ncu's table: name and megabytes of each launch, in their order."""
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for entry in csv.DictReader(lines[first:]):
        metric = METRICS.get(entry["Metric Name"] or "")
        if metric is not None and entry["Metric Unit"] == "byte":
            launch = found.setdefault(entry["ID"], (entry["Kernel Name"], {}))
            launch[1][metric] = float(entry["Metric Value"].replace(",", "")) / 1e6
    return list(found.values())
