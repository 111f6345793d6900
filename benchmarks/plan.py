"""The planner's costs of a client's round: predicted, counted at each ratio, and measured.

Predicted is what ``fslora plan`` goes by: straight lines through two counted rounds. Against it
stand operations and bytes counted at each ratio; the peak of resident memory of a fresh process
that trains, over what it held before it loaded the model (everything imported and warm by a tiny
model of the same kind); and CPU seconds of its rounds, predicted from the operations at the rate
that the process shows at S/R = 1/4.

The process gives memory back to the system as soon as it is freed (MALLOC_MMAP_THRESHOLD_, which
glibc otherwise raises as it goes): predicted is what is alive, not what an allocator keeps.
``--keep`` measures with glibc's own habit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import process_time

from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification, LlamaForCausalLM

from benchmarks.timing import append_record, provenance
from benchmarks.workload import LLAMA_768, llama_768, shared_model
from fslora.client import LocalTrainer, download_bytes, upload_bytes
from fslora.clock import step_counter
from fslora.config import SimulateConfig
from fslora.models import model_path, take_state
from fslora.plan.costs import count_costs
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
        memory: bytes, base model included: predicted, peak of the process over its baseline.
        flops: of a round: predicted, counted.
        down_bytes: predicted, of the real task.
        up_bytes: predicted, of the real task.
        seconds: CPU seconds of a round: predicted, measured.
    """

    model: str
    size: int
    memory: tuple[float, float]
    flops: tuple[float, float]
    down_bytes: tuple[float, float]
    up_bytes: tuple[float, float]
    seconds: tuple[float, float]


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
    config = SimulateConfig(**json.loads(settings))
    tiny = str(Path(config.model).with_name(f"{Path(config.model).name}-tiny"))
    trainer, task = task_at(prepare(replace(config, model=tiny)), size)
    trainer(task)
    del trainer, task
    baseline = _status("VmRSS")
    trainer, task = task_at(prepare(config), size)
    seconds = []
    for _ in range(3):
        start = process_time()
        trainer(task)
        seconds.append(process_time() - start)
    return {"memory": _status("VmHWM") - baseline, "seconds": median(seconds[1:])}


def _status(field: str) -> float:
    """Bytes of a line of this process's status; Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(config: SimulateConfig, name: str, *, keep: bool) -> list[CostRow]:
    """Predict, count and measure one model at every size; ``keep``: as glibc keeps memory."""
    run = prepare(config)
    costs = count_costs(run)
    command = [sys.executable, "-m", "benchmarks", "plan", "--child"]
    found = {}
    environment = {**os.environ, **({} if keep else {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)})}
    for size in SIZES:
        one = [*command, json.dumps(asdict(config)), "--size", str(size)]
        done = subprocess.run(one, check=True, capture_output=True, text=True, env=environment)
        found[size] = json.loads(done.stdout.splitlines()[-1])
    rate = costs.flops(_PROBED) / found[_PROBED]["seconds"]
    rows = []
    for size in SIZES:
        trainer, task = task_at(run, size)
        counted = config.local_steps * step_counter(trainer, run.data.evaluation)(task)
        rows.append(
            CostRow(
                model=name,
                size=size,
                memory=(costs.memory_bytes(size), found[size]["memory"]),
                flops=(costs.flops(size), counted),
                down_bytes=(costs.down_bytes(size), sum(download_bytes(task))),
                up_bytes=(costs.up_bytes(size), sum(upload_bytes(task))),
                seconds=(costs.flops(size) / rate, found[size]["seconds"]),
            )
        )
    return rows


def workloads(folder: Path) -> list[tuple[str, SimulateConfig]]:
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
        local_steps=2,
        batch_size=8,
        max_length=128,
        threads=1,
        device="cpu",
    )
    llama = folder / LLAMA_768
    llama_768(4).save_pretrained(llama)
    AutoTokenizer.from_pretrained(model_path("docs-base")).save_pretrained(llama)
    _save_tiny(llama, LlamaForCausalLM, num_attention_heads=2, num_key_value_heads=2)
    found = [(LLAMA_768, replace(common, model=str(llama)))]
    real = shared_model("all-MiniLM-L6-v2-fp16")
    if real is not None:
        minilm = folder / "minilm"
        minilm.symlink_to(real)
        _save_tiny(minilm, BertForSequenceClassification, num_attention_heads=2)
        config = replace(common, model=str(minilm), task="classification")
        found.append(("MiniLM", config))
    return found


def _save_tiny(folder: Path, kind: type, **heads: int) -> None:
    """Save a tiny random model of the same kind beside one, with its tokenizer."""
    config = AutoConfig.from_pretrained(folder, **_TINY, **heads)
    tiny = folder.with_name(f"{folder.name}-tiny")
    kind(config).save_pretrained(tiny)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tiny)


def table(rows: Sequence[CostRow]) -> str:
    """Lay rows out, each figure with what it was predicted to be over what was found."""
    lines = [
        f"{'model':<10} {'S':>3}{'memory MB':>12}{'pred/meas':>10}{'Gflop':>9}{'pred/count':>11}"
        f"{'bytes':>12}{'CPU s':>9}{'pred/meas':>10}"
    ]
    for row in rows:
        moved = row.down_bytes[0] == row.down_bytes[1] and row.up_bytes[0] == row.up_bytes[1]
        lines.append(
            f"{row.model:<10} {row.size:>3}{row.memory[1] / 1e6:>12.1f}"
            f"{row.memory[0] / row.memory[1]:>10.3f}{row.flops[1] / 1e9:>9.2f}"
            f"{row.flops[0] / row.flops[1]:>11.5f}{'exact' if moved else 'WRONG':>12}"
            f"{row.seconds[1]:>9.3f}{row.seconds[0] / row.seconds[1]:>10.3f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plan", description=__doc__)
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    parser.add_argument("--keep", action="store_true", help="with glibc's own memory habits")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        print(json.dumps(child(chosen.child, chosen.size)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for name, config in workloads(Path(folder))
            for row in measure(config, name, keep=chosen.keep)
        ]
    print(table(rows))
    if chosen.out:
        for row in rows:
            record = {"benchmark": "plan", "keep": chosen.keep, **provenance(), **asdict(row)}
            append_record(chosen.out, record)
    return 0
