"""One training step of a whole small model: PEFT at ranks R and S, and ours at S.

Forward, backward and AdamW, in one thread and CPU time (or by a GPU's own events), the sides taking
turns; and the most memory that one step holds beyond the model, instrumented. Ours and PEFT at S
start from the same selected factors and must give the same loss and gradients, measured against
float64, before anything is timed. "base" is the bare model's forward and backward, fed embeddings
that ask for gradients, so that they flow through every layer.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

import fslora_kernels
from benchmarks.cost import language_batch
from benchmarks.flags import at_least
from benchmarks.shapes import ratio_name
from benchmarks.timing import (
    Interval,
    Turns,
    append_record,
    bootstrap,
    check_device,
    clock,
    provenance,
    take_turns,
)
from benchmarks.workload import LLAMA_768, bare, shared_model, with_adapter
from fslora.client import heads
from fslora.protocol import Sketch
from fslora.sketch import draw_sketches
from fslora_kernels.memory import AliveBytes, addresses
from fslora_kernels.sampling import sketch_size
from fslora_kernels.testing import check_error_budget

ALPHA = 16.0
RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
RECOMPUTE = "recompute"
DELTA_FIRST = "delta first"
_COLUMNS = ("× base", "× PEFT at R", "ours ÷")


@dataclass(frozen=True, slots=True)
class Workload:
    """A model and its batch.

    Attributes:
        model: folder, hub id, or ``docs-base``.
        batch_size: examples.
        length: tokens of each.
        classes: of a classifier; 0 for a language model.
        layers: keep only the first so many; 0 keeps all.
        dropout: of the adapter.
        recompute: whether there is a side of ours that makes inputs again in the backward pass.
        evaluate: time evaluations instead, beside a side of ours that is delta first.
    """

    model: str
    batch_size: int = 8
    length: int = 128
    classes: int = 0
    layers: int = 0
    dropout: float = 0.0
    recompute: bool = False
    evaluate: bool = False

    def __str__(self) -> str:
        """Name it for the table."""
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        return f"{Path(self.model).name}, {self.batch_size}×{self.length}{dropout}"

    def base(self) -> nn.Module:
        """Load the bare, frozen model."""
        return bare(self.model, classes=self.classes, layers=self.layers)

    def adapted(self, rank: int) -> PeftModel:
        """Load the model with a new adapter."""
        return with_adapter(
            self.base(), rank, alpha=ALPHA, classes=self.classes, dropout=self.dropout
        )

    def batch(self, model: nn.Module) -> dict[str, Tensor]:
        """Draw the batch."""
        batch = language_batch(model, self.batch_size, self.length)
        if self.classes:
            batch["labels"] = torch.arange(self.batch_size) % self.classes
        return batch


@dataclass(frozen=True, slots=True)
class Side:
    """A model and what trains in it.

    Attributes:
        model: called with the batch.
        factors: A and B of every module, in one order for all sides.
        ranks_first: B is ``[S, E]``.
        others: what trains beside them, a classifier's head.
    """

    model: nn.Module
    factors: list[Tensor]
    ranks_first: bool
    others: list[Tensor]

    def gradients(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss, and the gradients of all A and of all B in one vector each."""
        loss = self.model(**batch).loss
        gradients = torch.autograd.grad(loss, self.factors)
        of_b = [g if self.ranks_first else g.t() for g in gradients[1::2]]
        return {
            "loss": loss.detach(),
            "dA": torch.cat([g.flatten() for g in gradients[::2]]),
            "dB": torch.cat([g.flatten() for g in of_b]),
        }

    def peak_bytes(self, batch: dict[str, Tensor]) -> int:
        """Return the most that forward and backward hold at once beyond the model and its batch."""
        known = [*self.model.parameters(), *self.model.buffers(), *self.factors, *batch.values()]
        with AliveBytes(addresses(known)) as alive:
            self.model(**batch).loss.backward()
        for leaf in (*self.factors, *self.others):
            leaf.grad = None
        return alive.peak

    def step(self, batch: dict[str, Tensor]) -> Callable[[], None]:
        """Return a training step."""
        optimizer = torch.optim.AdamW([*self.factors, *self.others], lr=1e-5)

        def run() -> None:
            optimizer.zero_grad()
            self.model(**batch).loss.backward()
            optimizer.step()

        return run


def evaluation(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return a forward pass without gradients; the model is in eval mode from now on."""
    model.eval()

    @torch.no_grad()
    def run() -> None:
        model(**batch)

    return run


def _peft_side(model: nn.Module) -> Side:
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and len(m.lora_A)]
    factors = [f["default"].weight for m in layers for f in (m.lora_A, m.lora_B)]
    return Side(model, factors, ranks_first=False, others=list(heads(model).values()))


def _our_side(fused: nn.Module, drawn: Mapping[str, Sketch]) -> Side:
    leaves = fslora_kernels.extract(fused, {name: s.index for name, s in drawn.items()})
    fslora_kernels.bind(fused, leaves)
    factors = [factor for pair in leaves.values() for factor in pair]
    return Side(fused, factors, ranks_first=True, others=list(heads(fused).values()))


def make_sides(workload: Workload, rank: int, size: int, device: str) -> dict[str, Side]:
    """Build PEFT at R and S, and ours, from the same factors."""
    whole = workload.adapted(rank)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    fused = copy.deepcopy(whole)
    fslora_kernels.fuse(fused)
    names = fslora_kernels.modules(fused)
    drawn = draw_sketches(0, names, rank, size)
    leaves = fslora_kernels.extract(fused, {name: s.index for name, s in drawn.items()})
    small = workload.adapted(size)
    small.load_state_dict(
        {k: v for k, v in whole.state_dict().items() if ".lora_" not in k}, strict=False
    )
    with torch.no_grad():
        for name, pair in leaves.items():
            layer = small.get_submodule(name)
            layer.lora_A["default"].weight.copy_(pair.lora_a)
            layer.lora_B["default"].weight.copy_(pair.lora_b.t())
    for model in (fused, whole, small):
        model.to(device)
    sides = {"PEFT at R": _peft_side(whole), "PEFT at S": _peft_side(small)}
    if workload.recompute:
        again = copy.deepcopy(fused)
        fslora_kernels.fuse(again, recompute=True)
        sides[RECOMPUTE] = _our_side(again, drawn)
    if workload.evaluate:
        other = copy.deepcopy(fused)
        fslora_kernels.fuse(other, "torch")
        sides[DELTA_FIRST] = _our_side(other, drawn)
    return {"ours": _our_side(fused, drawn), **sides}


def error(sides: dict[str, Side], batch: dict[str, Tensor]) -> str | None:
    """Say how ours differs from PEFT at S, or None. Dropout of the model itself is off here."""
    peer = sides["PEFT at S"]
    ours = [side for name, side in sides.items() if not name.startswith("PEFT")]
    training = peer.model.training
    try:
        exact_side = _peft_side(copy.deepcopy(peer.model).double().eval())
        for side in (*ours, peer):
            side.model.eval()
        exact, eager, *found = (side.gradients(batch) for side in (exact_side, peer, *ours))
        for of_side in found:
            for name, value in of_side.items():
                check_error_budget(value, eager[name], exact[name], name=name)
    except Exception as problem:  # shown as red, nothing is timed
        return f"{type(problem).__name__}: {problem}"
    finally:
        for side in (*ours, peer):
            side.model.train(training)
    return None


def time_step(
    workload: Workload, rank: int, size: int, device: str, *, seconds: float, rounds: int
) -> tuple[Turns, dict[str, int]] | str:
    """Time the sides in turns, and follow what they hold.

    Returns:
        The times and each side's peak in bytes, or what is wrong.
    """
    sides = make_sides(workload, rank, size, device)
    base = workload.base().to(device)
    batch = {name: tensor.to(device) for name, tensor in workload.batch(base).items()}
    if problem := error(sides, batch):
        return problem
    if workload.evaluate:
        runs = {name: evaluation(side.model, batch) for name, side in sides.items()}
        peers = {"base": evaluation(base, batch), **runs}
        ours = peers.pop("ours")
        return take_turns(ours, peers, clock(device), seconds=seconds, rounds=rounds), {}
    rest = {name: tensor for name, tensor in batch.items() if name != "input_ids"}

    def base_step() -> None:
        embedded = base.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        base(inputs_embeds=embedded, **rest).loss.backward()

    peaks = {name: side.peak_bytes(batch) for name, side in sides.items()}
    steps = {name: side.step(batch) for name, side in sides.items()}
    ours = steps.pop("ours")
    peers = {"base": base_step, **steps}
    return take_turns(ours, peers, clock(device), seconds=seconds, rounds=rounds), peaks


def ratios_of(turns: Turns) -> dict[str, dict[str, Interval]]:
    """Return each row's ratios by column."""
    base_s, peft_s = turns.peer_s["base"], turns.peer_s["PEFT at R"]
    found = {
        name: {
            "× base": bootstrap([a / b for a, b in zip(times, base_s, strict=True)]),
            "× PEFT at R": bootstrap([a / b for a, b in zip(times, peft_s, strict=True)]),
            "ours ÷": turns.pairs(name).ratio,
        }
        for name, times in turns.peer_s.items()
    }
    ours = {"× base": turns.pairs("base").ratio, "× PEFT at R": turns.pairs("PEFT at R").ratio}
    return {"ours": ours, **found}


def table(turns: Turns, peaks: dict[str, int]) -> str:
    """Lay one workload out."""
    titles = "".join(f"{title:<22}" for title in _COLUMNS)
    lines = [f"  {'row':<12}{'ms':>9}  {titles}{'peak MiB':>9}"]
    for name, ratios in ratios_of(turns).items():
        times = turns.ours_s if name == "ours" else turns.peer_s[name]
        cells = "".join(f"{ratios.get(title, '–')!s:<22}" for title in _COLUMNS)
        peak = f"{peaks[name] / 2**20:.1f}" if name in peaks else ""
        lines.append(f"  {name:<12}{1e3 * statistics.median(times):>9.2f}  {cells}{peak:>9}")
    lines.append(f"  {turns.rounds} rounds, A/A of ours {turns.spread}")
    return "\n".join(lines)


def _workloads(chosen: argparse.Namespace) -> Iterator[Workload]:
    names = ("batch_size", "length", "dropout", "recompute", "evaluate")
    size = {name: vars(chosen)[name] for name in names}
    if chosen.model:
        yield Workload(chosen.model, classes=chosen.classes, layers=chosen.layers, **size)
        return
    if minilm := shared_model("all-MiniLM-L6-v2-fp16"):
        yield Workload(minilm, classes=2, **size)
    yield Workload(LLAMA_768, **size)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return 1 if ours computes something else than PEFT."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Without --model: a MiniLM classifier where it is at hand, and {LLAMA_768}, a "
        "Llama of four layers of 768 features with random weights.",
    )
    parser.add_argument("--model", help=f"folder, hub id, docs-base or {LLAMA_768}")
    parser.add_argument("--classes", type=int, default=0, help="of a classifier; 0: language model")
    parser.add_argument("--layers", type=int, default=0, help="keep only the first layers; 0: all")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of an example")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapter")
    parser.add_argument("--recompute", action="store_true", help="a row of fuse(recompute=True)")
    parser.add_argument(
        "--evaluate", action="store_true", help="time evaluations, not steps; a row of delta first"
    )
    parser.add_argument("--rank", type=int, default=64, help="R")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="S/R, as decimals")
    parser.add_argument("--seconds", type=float, default=20.0, help="timing of each ratio")
    parser.add_argument("--repeats", type=at_least(0), default=0, help="rounds, not by seconds")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--out", type=Path, help="append the results to this JSONL file")
    chosen = parser.parse_args(arguments)
    if not chosen.model and (chosen.classes or chosen.layers):
        parser.error("--classes and --layers are of the model that --model names")
    check_device(chosen.device)
    torch.set_num_threads(1)
    red = False
    for workload in _workloads(chosen):
        for ratio in chosen.ratios:
            size = sketch_size(chosen.rank, ratio)
            title = f"{workload}, R={chosen.rank}, S={size} ({ratio_name(size / chosen.rank)})"
            found = time_step(
                workload,
                chosen.rank,
                size,
                chosen.device,
                seconds=chosen.seconds,
                rounds=chosen.repeats,
            )
            fields = {
                "benchmark": "model",
                **provenance(chosen.device),
                "workload": asdict(workload),
            }
            fields |= {"rank": chosen.rank, "sketch_size": size}
            if isinstance(found, str):
                red = True
                print(f"{title}\n  red: {found}", flush=True)
                fields["error"] = found
            else:
                turns, peaks = found
                print(f"{title}\n{table(turns, peaks)}", flush=True)
                fields |= {"turns": asdict(turns), "spread": asdict(turns.spread)}
                fields["peak_bytes"] = peaks
                fields["ratios"] = {
                    row: {title: asdict(interval) for title, interval in of_row.items()}
                    for row, of_row in ratios_of(turns).items()
                }
            if chosen.out:
                append_record(chosen.out, fields)
    return int(red)
