"""`fslora probe`: what this machine sustains in real local steps, and what memory it has left."""

from __future__ import annotations

import statistics
import tomllib
from dataclasses import asdict, replace
from math import log
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from fslora.client import LocalTrainer
from fslora.clock import step_counter
from fslora.data.tasks import Examples
from fslora.devices import Device
from fslora.models import take_state
from fslora.plan.costs import longest_of
from fslora.plan.kept import kept_bytes, read_in
from fslora.plan.settings import NO_CLOCK, ProbeConfig
from fslora.prepare import Run, make_strategy, prepare
from fslora.protocol import ClientTask
from fslora.report.units import format_bytes

_LEAST_ROUNDS = 3
_STEPS = 4


def probe(config: ProbeConfig, console: Console) -> Device:
    """Measure this machine, show it, and append it to a file of devices.

    Raises:
        ValueError: the run cannot work, or the file has a device of this name already.
    """
    path = Path(config.table).expanduser()
    if path.suffix != ".toml":
        raise ValueError(f"--table {path}: --devices reads files whose names end in .toml")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()  # known before anything is measured
    except OSError as error:
        raise ValueError(
            f"--table {path}: {error.strerror}; name a file that can be written"
        ) from None
    if config.name in _names(path):
        raise ValueError(f"{path} has a device {config.name} already; give another --name")
    run = prepare(replace(config.run, **NO_CLOCK))
    ratio, mapped = config.run.ratio_values[0], read_in(run.model)
    # The model is loaded already; what it takes is the device's to give, and not free any more
    # unless its file is mapped.
    weights = sum(tensor.nbytes for tensor in run.model.parameters()) - mapped
    memory = free_bytes(next(run.model.parameters()).device) + weights
    longest = longest_of(run.data.evaluation, config.run.batch_size)
    kept = kept_bytes(*training(run, ratio, longest))
    seconds, flops = time_rounds(run, ratio, config.seconds)
    device = Device(
        name=config.name,
        share=config.share,
        flops_per_second=flops / statistics.median(seconds),
        memory_bytes=max(1.0, memory - kept),
        down_bits_per_second=1e6 * config.down_mbit,
        up_bits_per_second=1e6 * config.up_mbit,
        rtt_seconds=1e-3 * config.rtt_ms,
        jitter=statistics.pstdev(map(log, seconds)),
        watts=config.watts,
    )
    with path.open("a", encoding="utf-8") as file:
        file.write(table_of(device))
    console.print(
        f"{config.name}: {device.flops_per_second / 1e9:.2f} Gflop/s in {len(seconds)} times "
        f"{_STEPS} local steps, {format_bytes(device.memory_bytes)} of memory for tensors, beside "
        f"{format_bytes(kept)} that the allocator keeps; in {path}",
        markup=False,
        soft_wrap=True,
    )
    return device


def time_rounds(run: Run, ratio: float, least_seconds: float) -> tuple[list[float], float]:
    """Time short rounds of a client at one ratio.

    Args:
        run: prepared without devices.
        ratio: S/R.
        least_seconds: of all rounds together; there are at least three.

    Returns:
        Seconds of each round, after one that is not counted, and the operations of one.
    """
    trainer, task = training(run, ratio, max(run.data.clients, key=len))
    batches = _STEPS * run.config.accumulation
    flops = batches * step_counter(trainer, run.data.evaluation)(task)
    return _timed(trainer, task, least_seconds), flops


def training(run: Run, ratio: float, examples: Examples) -> tuple[LocalTrainer, ClientTask]:
    """Build one client's trainer, and a task of a few local steps at a ratio."""
    strategy = make_strategy(run.config, {"probed": ratio})
    state = strategy.init(*take_state(run.model), run.config.seed)
    (task,) = strategy.assign(state, ["probed"])
    task = replace(task, local=replace(task.local, steps=_STEPS))
    return LocalTrainer(run.model, run.task, {"probed": examples}), task


def _timed(trainer: LocalTrainer, task: ClientTask, least_seconds: float) -> list[float]:
    seconds: list[float] = []
    trainer(task)
    while len(seconds) < _LEAST_ROUNDS or sum(seconds) < least_seconds:
        start = perf_counter()
        trainer(task)  # its answer is on the CPU: a GPU has been waited for
        seconds.append(perf_counter() - start)
    return seconds


def free_bytes(device: torch.device) -> float:
    """Return the memory that a process here could still get."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(psutil.virtual_memory().available)


def table_of(device: Device) -> str:
    """A device as a [[device]] table, without a ratio that it has not; a last line may be open."""
    import tomli_w

    values = {name: value for name, value in asdict(device).items() if value or name != "ratio"}
    return f"\n[[device]]\n{tomli_w.dumps(values)}"


def _names(path: Path) -> list[str]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("device", [])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--table {path} is not valid TOML: {error}") from None
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"--table {path}: write one [[device]] table for each class of devices")
    return [str(table.get("name")) for table in tables]
