"""Two stages of ``benchmarks.gpu``: what the machine is and can do, and its best tiles."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

import torch

from benchmarks.gpu import Row, Setting
from benchmarks.roofline import ceilings
from benchmarks.timing import clock, device_name
from fslora_kernels import tuning as tables
from fslora_kernels._dispatch import unavailable

# -- environment -----------------------------------------------------------------------------------


def environment(setting: Setting) -> Iterator[Row]:
    """Say what the machine is and measure its two ceilings on random data."""
    row: Row = {"what": "machine", "ok": True, "cuda": torch.version.cuda}
    if not setting.dry:
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
        }
    named = (f"{name} {value}" for name, value in row.items() if name not in ("what", "ok"))
    row["line"] = ", ".join(named)
    yield row
    measure = clock(setting.device)
    for dtype in (torch.float32, torch.bfloat16):
        found = ceilings(setting.device, dtype, measure, shrink=16 if setting.dry else 1)
        name = str(dtype).removeprefix("torch.")
        row = {"what": f"ceilings, {name}", "ok": True}
        row |= {"flops_per_s": found.flops_per_s, "bytes_per_s": found.bytes_per_s}
        yield row | {"line": f"{name} product and copy: {found}"}


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    return (done.stdout.strip().splitlines() or ["unknown"])[0]


# -- tuning ----------------------------------------------------------------------------------------

DRY_SHAPE = (24, 32, 16)
# Milliseconds of each measurement. Two hundred of them have to fit, beside fifty compilations.
WARMUP_MS, MEASURED_MS = 5, 25


def tuning(setting: Setting) -> Iterator[Row]:
    """Find the best tiles; the table grows with every row, so that a cut keeps what it found.

    It is written into the folder of the results and, from a GPU, among the shipped tables, where
    the launches of the following stages read it.
    """
    reason = unavailable("triton", setting.device)
    if reason is not None:
        yield {"what": "tiles", "ok": True, "refused": reason}
        return
    from fslora_kernels._launch import target_of

    device, name = torch.device(setting.device), device_name(setting.device)
    shipped = tables.SHIPPED / tables.file_name(name)
    paths = [setting.out / "tuned.json", *(() if setting.dry else [shipped])]
    measure, shapes, dtype = _measurement(setting)
    found: list[tables.Measured] = []
    for measured in tables.tune(device, measure=measure, shapes=shapes, dtype=dtype):
        found.append(measured)
        for path in paths:
            tables.save(path, name, target_of(device)[0], found)
        share = measured.over_default
        yield {
            "what": f"{measured.kernel} {measured.arithmetic} {measured.ranks}",
            "ok": True,
            "over_default": share,
            "line": f"{measured.kernel:<6} {measured.ranks:>4} ranks: {share:.3f} × the default's "
            f"time, best of {measured.tried}: {measured.tiles}",
        }
    used = tables.table_path(name)
    row = {"what": "table", "ok": setting.dry or used == shipped}
    if not row["ok"]:
        row["error"] = f"launches use {used}, which hides the table just measured; move it away"
    yield row


def _measurement(
    setting: Setting,
) -> tuple[Callable[[Callable[[], object]], float], tuple[tuple[int, int, int], ...], torch.dtype]:
    """Return the clock, the shapes and the dtype to tune with."""
    if setting.dry:  # Triton's interpreter has no bf16 products
        return _seconds, (DRY_SHAPE,), torch.float32
    from triton.testing import do_bench

    measure = partial(do_bench, warmup=WARMUP_MS, rep=MEASURED_MS, return_mode="median")
    return measure, tables.SHAPES, torch.bfloat16


def _seconds(function: Callable[[], object]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start
