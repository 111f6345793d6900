"""What a sketch ratio saves a client, and what it does not: counted, not timed.

One local step (forward, backward, AdamW) in compact mode at each ratio. Operations are counted as
torch runs them; bytes are those of the objects that exist. The adapter's operations are the step's
minus those of the bare base model, which is loaded and counted on its own. Both are fed embeddings
that ask for gradients, so that the gradient flows through every layer in both. (A real step spares
the first layer's; its adapter's own operations are the same.)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

import fslora_kernels
from benchmarks.timing import append_record, provenance
from benchmarks.workload import bare, default_model, shared_model, with_adapter
from fslora.client import heads
from fslora.sketch import draw_sketches
from fslora_kernels.flops import count_flops
from fslora_kernels.memory import AliveBytes, addresses, saved_storages
from fslora_kernels.sampling import sketch_size

RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True, slots=True)
class CostRow:
    """One local step at one ratio.

    Attributes:
        ratio: S/R.
        sketch_size: S.
        lora_flops: of the adapter, forward and backward.
        total_flops: of the whole step.
        head_flops: of the gradients of the heads that are trained whole.
        adapter_bytes: of the client's leaves.
        gradient_bytes: of the leaves' gradients.
        optimizer_bytes: of the leaves' two AdamW moments.
        head_bytes: of the heads, their gradients and moments.
        saved_bytes: kept by the forward pass for the backward, parameters not counted.
        peak_bytes: most bytes alive at once of all that the step made.
    """

    ratio: float
    sketch_size: int
    lora_flops: int
    total_flops: int
    head_flops: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    head_bytes: int
    saved_bytes: int
    peak_bytes: int


def measure_cost(
    base: Callable[[], nn.Module],
    batch: dict[str, Tensor],
    *,
    rank: int = 16,
    classes: int = 0,
    ratios: Sequence[float] = RATIOS,
) -> list[CostRow]:
    """Count one local step at each ratio.

    Args:
        base: loads the bare, frozen base model.
        batch: ``input_ids``, ``labels`` and what else the model reads.
        rank: R.
        classes: of a classifier, whose head is trained; 0 for a language model.
        ratios: sketch ratios S/R.

    Returns:
        One row for each ratio, in their order.
    """
    model = with_adapter(base(), rank, classes=classes)
    fslora_kernels.fuse(model)
    own = ("base_model.model.", ""), ("modules_to_save.default.", "")
    trained = [name.replace(*own[0]).replace(*own[1]) for name in heads(model)]
    frozen_flops = _flops(base(), batch)
    plain = base()
    for name in trained:
        plain.get_parameter(name).requires_grad_()
    base_flops = _flops(plain, batch)
    names = fslora_kernels.modules(model)
    rows = []
    for ratio in ratios:
        size = sketch_size(rank, ratio)
        sketches = draw_sketches(0, names, rank, size)
        leaves = fslora_kernels.extract(model, {name: s.index for name, s in sketches.items()})
        fslora_kernels.bind(model, leaves)
        total_flops = _flops(model, batch)
        tensors = [tensor for pair in leaves.values() for tensor in pair]
        rows.append(
            CostRow(
                ratio=size / rank,
                sketch_size=size,
                lora_flops=total_flops - base_flops,
                total_flops=total_flops,
                head_flops=base_flops - frozen_flops,
                **_step_bytes(model, batch, tensors),
            )
        )
    fslora_kernels.unbind(model)
    return rows


def _flops(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Count forward and backward of one batch that is fed as embeddings asking for gradients."""
    tokens = batch["input_ids"]
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    with count_flops() as count:
        model(inputs_embeds=embedded, **rest).loss.backward()
    model.zero_grad()
    return count.total


def _step_bytes(model: nn.Module, batch: dict[str, Tensor], leaves: list[Tensor]) -> dict[str, int]:
    """Run one real local step and count the bytes of what it leaves behind."""
    whole = list(heads(model).values())
    for tensor in [*leaves, *whole]:
        tensor.grad = None
    optimizer = torch.optim.AdamW([*leaves, *whole], fused=True)
    known = addresses([*model.parameters(), *model.buffers(), *leaves])
    with AliveBytes(known) as alive:
        with saved_storages(known) as saved:
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    moments = {
        tensor: sum(t.nbytes for t in optimizer.state[tensor].values() if t.shape == tensor.shape)
        for tensor in [*leaves, *whole]
    }
    return {
        "adapter_bytes": sum(tensor.nbytes for tensor in leaves),
        "gradient_bytes": sum(_gradient_bytes(tensor) for tensor in leaves),
        "optimizer_bytes": sum(moments[tensor] for tensor in leaves),
        "head_bytes": sum(t.nbytes + _gradient_bytes(t) + moments[t] for t in whole),
        "saved_bytes": sum(saved.values()),
        "peak_bytes": alive.peak,
    }


def _gradient_bytes(leaf: Tensor) -> int:
    return 0 if leaf.grad is None else leaf.grad.nbytes


def language_batch(model: nn.Module, batch_size: int, length: int) -> dict[str, Tensor]:
    """Draw random tokens [batch_size, length]; what they say changes no count."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def table(rows: Sequence[CostRow]) -> str:
    """Lay rows out with each figure's share of the last row's."""
    full = rows[-1]
    columns = (
        ("LoRA Mflop", "lora_flops", 1e6),
        ("total Mflop", "total_flops", 1e6),
        ("adapter kB", "adapter_bytes", 1e3),
        ("gradient kB", "gradient_bytes", 1e3),
        ("AdamW kB", "optimizer_bytes", 1e3),
        ("saved kB", "saved_bytes", 1e3),
        ("peak kB", "peak_bytes", 1e3),
    )
    lines = [f"{'S/R':>6} {'S':>3}" + "".join(f"{title:>20}" for title, *_ in columns)]
    for row in rows:
        cells = (
            f"{getattr(row, name) / unit:11.1f} {getattr(row, name) / getattr(full, name):8.2%}"
            for _, name, unit in columns
        )
        ratio = str(Fraction(row.ratio).limit_denominator(64))
        lines.append(f"{ratio:>6} {row.sketch_size:>3}" + "".join(cells))
    return "\n".join(lines)


def what_stays(rows: Sequence[CostRow]) -> str:
    """Say what does not shrink with the ratio, and why."""
    least, full = rows[0], rows[-1]
    head = ""
    if full.head_bytes:
        head = (
            f"; the head, {full.head_bytes / 1e3:.1f} kB with its gradient and moments and "
            f"{full.head_flops / 1e6:.3f} Mflop for its gradient, which every client trains whole"
        )
    return (
        f"Does not shrink: the base model's products ({1 - full.lora_flops / full.total_flops:.0%} "
        "of the full-rank step), which every client runs whole; the saved activations (at the "
        f"smallest ratio still {least.saved_bytes / full.saved_bytes:.0%}), because the gradient "
        "of A needs each layer's whole input and only the S hidden ranks of it follow the ratio, "
        f"and with them the peak ({least.peak_bytes / full.peak_bytes:.0%}){head}."
    )


def _workloads(chosen: argparse.Namespace) -> Iterator[tuple[str, int, int]]:
    """Yield model, classes, layers."""
    yield chosen.model, chosen.classes, chosen.layers
    minilm = shared_model("all-MiniLM-L6-v2-fp16")
    if minilm and chosen.model == default_model():
        yield minilm, 2, 0


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cost", description=__doc__)
    parser.add_argument("--model", default=default_model(), help="folder, hub id, or docs-base")
    parser.add_argument("--classes", type=int, default=0, help="of a classifier; 0: language model")
    parser.add_argument("--layers", type=int, default=0, help="keep only the first layers; 0: all")
    parser.add_argument("--rank", type=int, default=16, help="R")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    chosen = parser.parse_args(arguments)
    for model, classes, layers in _workloads(chosen):

        def base(model: str = model, classes: int = classes, layers: int = layers) -> nn.Module:
            return bare(model, classes=classes, layers=layers)

        batch = language_batch(base(), chosen.batch_size, chosen.length)
        if classes:
            batch["labels"] = torch.arange(chosen.batch_size) % classes
        rows = measure_cost(base, batch, rank=chosen.rank, classes=classes)
        name = Path(model).name
        print(f"{name}, R={chosen.rank}, one local step of {chosen.batch_size}×{chosen.length}")
        print(table(rows))
        print(f"{what_stays(rows)}\n")
        if chosen.out:
            for row in rows:
                record = {"benchmark": "cost", "model": name, **provenance("cpu"), **asdict(row)}
                append_record(chosen.out, record)
    return 0
