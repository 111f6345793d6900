"""The planner's costs of a client's round: predicted, counted at each ratio, and measured.

Predicted is what ``fslora plan`` goes by: straight lines through two counted rounds. Against it
stand operations and bytes counted at each ratio; the peak of resident memory of fresh processes
that train, over what each held before it loaded the model (everything imported and warm by a tiny
model of the same kind); and CPU seconds of their rounds, predicted from the operations.

Two figures are a machine's own and are measured in as many processes more at S/R = 1/4, as
``fslora probe`` does: operations a second, and the bytes that the allocator keeps beyond what is
alive. The allocator does not do the same twice: all are medians over the processes.
``--give-back`` has the processes give memory back to the system as soon as it is freed
(MALLOC_MMAP_THRESHOLD_, which glibc otherwise raises as it goes).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import process_time

from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification, LlamaForCausalLM

from benchmarks.flags import at_least
from benchmarks.timing import append_record, provenance
from benchmarks.workload import LLAMA_768, llama_768, shared_model
from fslora.client import LocalTrainer, download_bytes, upload_bytes
from fslora.clock import step_counter
from fslora.config import SimulateConfig
from fslora.errors import StoppedRunError
from fslora.models import model_path, take_state
from fslora.plan.costs import count_costs
from fslora.plan.kept import ROUNDS, kept_bytes, resident_bytes
from fslora.prepare import Run, make_strategy, prepare
from fslora.protocol import ClientTask

SIZES = (1, 2, 4, 8, 16)
_PROBED = 4
_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


@dataclass(frozen=True, slots=True)
class CostRow:
    """One model at one sketch size; predicted and found.

    Attributes:
        model: name.
        size: S of R = 16.
        memory: bytes, base model included: predicted, the median of ``peaks``.
        peaks: of each process over its baseline.
        kept: what the allocator keeps, in each process that was probed; the predicted bytes have
            their median.
        flops: of a round: predicted, counted.
        down_bytes: predicted, of the real task.
        up_bytes: predicted, of the real task.
        seconds: CPU seconds of a round: predicted, measured.
    """

    model: str
    size: int
    memory: tuple[float, float]
    peaks: tuple[float, ...]
    kept: tuple[float, ...]
    flops: tuple[float, float]
    down_bytes: tuple[float, float]
    up_bytes: tuple[float, float]
    seconds: tuple[float, float]

    @property
    def exact(self) -> bool:
        """Whether the predicted bytes are those of the task."""
        return self.down_bytes[0] == self.down_bytes[1] and self.up_bytes[0] == self.up_bytes[1]


def task_at(run: Run, size: int) -> tuple[LocalTrainer, ClientTask]:
    """Build one client's trainer and task at a sketch size."""
    name = run.data.names[0]
    strategy = make_strategy(run.config, {name: size / run.config.rank})
    state = strategy.init(*take_state(run.model), run.config.seed)
    (task,) = strategy.assign(state, [name])
    trainer = LocalTrainer(run.model, run.task, {name: run.data.clients[0]})
    return trainer, task


def child(settings: str, size: int) -> dict[str, float]:
    """In a fresh process: train at one size; its peak over its baseline, and its CPU seconds."""
    trainer, task, baseline = warm(settings, size)
    seconds = []
    for _ in range(ROUNDS):  # as many as the probe, whose peak is held against this
        start = process_time()
        trainer(task)
        seconds.append(process_time() - start)
    return {"memory": resident_bytes("VmHWM") - baseline, "seconds": median(seconds[1:])}


def probed(settings: str, size: int) -> dict[str, float]:
    """In a fresh process: what its allocator keeps, and CPU seconds of a round."""
    trainer, task, _ = warm(settings, size)
    kept = kept_bytes(trainer, task)
    seconds = []
    for _ in range(3):
        start = process_time()
        trainer(task)
        seconds.append(process_time() - start)
    return {"kept": kept, "seconds": median(seconds)}


def warm(settings: str, size: int) -> tuple[LocalTrainer, ClientTask, int]:
    """Train a tiny model if there is one, note what the process holds, and load the model."""
    config = SimulateConfig(**json.loads(settings))
    tiny = Path(config.model).with_name(f"{Path(config.model).name}-tiny")
    if tiny.is_dir():
        trainer, task = task_at(prepare(replace(config, model=str(tiny))), size)
        trainer(task)
        del trainer, task
    gc.collect()
    # What the start has freed is resident in one process of four, by 80 MB, and soon given back.
    ctypes.CDLL(None).malloc_trim(0)
    baseline = resident_bytes("VmRSS")
    return *task_at(prepare(config), size), baseline


def measure(config: SimulateConfig, name: str, *, processes: int, give_back: bool) -> list[CostRow]:
    """Predict, count and measure one model at every size, each in so many fresh processes."""
    run = prepare(config)
    costs = count_costs(run)
    extra = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if give_back else {}

    def fresh(size: int, *flags: str) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks", "plan", *flags]
        command += ["--child", json.dumps(asdict(config)), "--size", str(size)]
        environment = {**os.environ, **extra}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise StoppedRunError(f"the process for S = {size} of {name} failed, and said: {said}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return found

    def several(size: int, *flags: str) -> dict[str, tuple[float, ...]]:
        found = [fresh(size, *flags) for _ in range(processes)]
        return {key: tuple(one[key] for one in found) for key in found[0]}

    machine = several(_PROBED, "--probe")
    rows = []
    for size in SIZES:
        found = several(size)
        trainer, task = task_at(run, size)
        counted = config.local_steps * step_counter(trainer, run.data.evaluation)(task)
        rows.append(
            CostRow(
                model=name,
                size=size,
                memory=(
                    costs.memory_bytes(size) + median(machine["kept"]),
                    median(found["memory"]),
                ),
                peaks=found["memory"],
                kept=machine["kept"],
                flops=(costs.flops(size), counted),
                down_bytes=(costs.down_bytes(size), sum(download_bytes(task))),
                up_bytes=(costs.up_bytes(size), sum(upload_bytes(task))),
                seconds=(
                    costs.flops(size) / costs.flops(_PROBED) * median(machine["seconds"]),
                    median(found["seconds"]),
                ),
            )
        )
    return rows


def workloads(folder: Path) -> dict[str, SimulateConfig]:
    """Put models and texts into a folder: the Llama, and MiniLM where it is at hand."""
    sentence = "the cat sat on the mat and the dog ran after a red ball while rain fell"
    words = sentence.split()
    rows = [
        {"text": " ".join(words[(i * k) % len(words)] for k in range(200)), "label": "ab"[i % 2]}
        for i in range(1, 81)
    ]
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = SimulateConfig(
        model="docs-base",
        data=str(texts),
        clients=2,
        per_round=2,
        local_steps=4,
        batch_size=8,
        max_length=128,
        threads=1,
        device="cpu",
    )
    llama = folder / LLAMA_768
    llama_768(4).save_pretrained(llama)
    AutoTokenizer.from_pretrained(model_path("docs-base")).save_pretrained(llama)
    _save_tiny(llama, LlamaForCausalLM, num_attention_heads=2, num_key_value_heads=2)
    found = {LLAMA_768: replace(common, model=str(llama))}
    real = shared_model("all-MiniLM-L6-v2-fp16")
    if real is not None:
        minilm = folder / "minilm"
        minilm.symlink_to(real)
        _save_tiny(minilm, BertForSequenceClassification, num_attention_heads=2)
        found["MiniLM"] = replace(common, model=str(minilm), task="classification")
    return found


def chosen_of(known: Mapping[str, SimulateConfig], names: str | None) -> dict[str, SimulateConfig]:
    """Return the workloads of some names, comma-separated; None takes all.

    Raises:
        ValueError: one is unknown, or its data are not at hand.
    """
    wanted = list(known) if names is None else names.split(",")
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(
            f"there is no {missing[0]!r} here, only {', '.join(known)}; what is not built in is "
            "looked for in the shared folder, which FSLORA_SHARED names"
        )
    return {name: known[name] for name in wanted}


def _save_tiny(folder: Path, kind: type, **heads: int) -> None:
    """Save a tiny random model of the same kind beside one, with its tokenizer."""
    config = AutoConfig.from_pretrained(folder, **_TINY, **heads)
    tiny = folder.with_name(f"{folder.name}-tiny")
    kind(config).save_pretrained(tiny)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tiny)


def table(rows: Sequence[CostRow]) -> str:
    """Lay rows out, each figure with what it was predicted to be over what was found."""
    lines = [
        f"{'model':<10} {'S':>3}{'memory MB':>12}{'pred/meas':>10}{'of each':>16}{'Gflop':>9}"
        f"{'pred/count':>11}"
        f"{'bytes':>12}{'CPU s':>9}{'pred/meas':>10}"
    ]
    for row in rows:
        lines.append(
            f"{row.model:<10} {row.size:>3}{row.memory[1] / 1e6:>12.1f}"
            f"{row.memory[0] / row.memory[1]:>10.3f}"
            f"{f'{row.memory[0] / max(row.peaks):.3f}–{row.memory[0] / min(row.peaks):.3f}':>16}"
            f"{row.flops[1] / 1e9:>9.2f}"
            f"{row.flops[0] / row.flops[1]:>11.5f}{'exact' if row.exact else 'WRONG':>12}"
            f"{row.seconds[1]:>9.3f}{row.seconds[0] / row.seconds[1]:>10.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return 1 if bytes are predicted wrongly."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan", description=__doc__)
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    parser.add_argument("--models", help=f"of {LLAMA_768},MiniLM; default: all that are at hand")
    parser.add_argument(
        "--processes", type=at_least(1), default=3, help="fresh ones at each size; as many probe"
    )
    parser.add_argument("--give-back", action="store_true", help="freed memory to the system")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        print(json.dumps((probed if chosen.probe else child)(chosen.child, chosen.size)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for name, config in chosen_of(workloads(Path(folder)), chosen.models).items()
            for row in measure(config, name, processes=chosen.processes, give_back=chosen.give_back)
        ]
    print(table(rows))
    if chosen.out:
        for row in rows:
            habit = {"give_back": chosen.give_back}
            append_record(
                chosen.out, {"benchmark": "plan", **habit, **provenance("cpu"), **asdict(row)}
            )
    return int(not all(row.exact for row in rows))
