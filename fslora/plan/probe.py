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
from fslora.devices import Device
from fslora.models import take_state
from fslora.plan.settings import ProbeConfig
from fslora.prepare import Run, make_strategy, prepare
from fslora.protocol import ClientTask

_LEAST_ROUNDS = 3
_STEPS = 4


def probe(config: ProbeConfig, console: Console) -> Device:
    """Measure this machine, show it, and append it to a file of devices.

    Raises:
        ValueError: the run cannot work, or the file has a device of this name already.
    """
    path = Path(config.table)
    if path.is_dir():
        raise ValueError(f"--table {path} is a folder; name a file")
    if path.is_file() and config.name in _names(path):
        raise ValueError(f"{path} has a device {config.name} already; give another --name")
    run = prepare(replace(config.run, devices="", deadline=0.0, over_select=1.0, faults=""))
    memory = free_bytes(next(run.model.parameters()).device)
    seconds, flops = time_rounds(run, config.run.ratio_values[0], config.seconds)
    # The model is loaded already; what it takes is the device's to give.
    weights = sum(tensor.nbytes for tensor in run.model.parameters())
    device = Device(
        name=config.name,
        share=config.share,
        flops_per_second=flops / statistics.median(seconds),
        memory_bytes=memory + weights,
        down_bits_per_second=1e6 * config.down_mbit,
        up_bits_per_second=1e6 * config.up_mbit,
        rtt_seconds=1e-3 * config.rtt_ms,
        jitter=statistics.pstdev(map(log, seconds)),
        watts=config.watts,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(table_of(device))
    console.print(
        f"{config.name}: {device.flops_per_second / 1e9:.2f} Gflop/s in {len(seconds)} times "
        f"{_STEPS} local steps, {device.memory_bytes / 1e9:.2f} GB of memory free; in {path}",
        markup=False,
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
    name = max(run.data.names, key=lambda n: len(run.data.clients[run.data.names.index(n)]))
    examples = run.data.clients[run.data.names.index(name)]
    trainer = LocalTrainer(run.model, run.task, {name: examples})
    strategy = make_strategy(run.config, {name: ratio})
    state = strategy.init(*take_state(run.model), run.config.seed)
    (task,) = strategy.assign(state, [name])
    task = replace(task, local=replace(task.local, steps=_STEPS))
    batches = _STEPS * run.config.accumulation
    flops = batches * step_counter(trainer, run.data.evaluation)(task)
    return _timed(trainer, task, least_seconds), flops


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
    """A device as a [[device]] table, without a ratio that it has not."""
    import tomli_w

    values = {name: value for name, value in asdict(device).items() if value or name != "ratio"}
    return f"[[device]]\n{tomli_w.dumps(values)}\n"


def _names(path: Path) -> list[str]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("device", [])
    except ValueError as error:
        raise ValueError(f"--table {path} is not valid TOML: {error}") from None
    return [str(table.get("name")) for table in tables]
