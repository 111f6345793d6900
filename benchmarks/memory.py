"""What a decoder layer with adapters keeps for its backward pass, and how much is alive at most.

One Llama decoder layer with adapters on its seven projections, forward and backward, with and
without dropout: vanilla PEFT against the same layer after ``fslora_kernels.fuse``, the latter also
with ``recompute=True``. Counted, not timed: "saved" is what the graph keeps for the backward pass
(each storage once; parameters left out, the layer's input counted), "held" is what is alive after
the forward pass whoever holds it, its result included. Without dropout the results are checked
against float64; with it, that two masks differ.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

import fslora_kernels
from benchmarks.timing import append_record, check_device, provenance
from fslora.sketch import draw_sketches
from fslora_kernels.memory import AliveBytes, addresses, kept_storages
from fslora_kernels.testing import check_error_budget

ALPHA = 16.0
OURS = {"ours": False, "ours recompute": True}  # whether inputs are made again
AS_IT_COMES = "PEFT f32 at"  # what get_peft_model makes of a model in half precision
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Size:
    """A decoder layer and what goes through it.

    Attributes:
        batch: sequences.
        length: tokens of each.
        hidden: D of most projections.
        intermediate: of the MLP.
        heads: of attention; a quarter as many keys and values.
        rank: R.
        sketch_size: S.
        dtype: name of torch's dtype.
        device: torch's device type.
    """

    batch: int = 2
    length: int = 128
    hidden: int = 256
    intermediate: int = 896
    heads: int = 8
    rank: int = 16
    sketch_size: int = 4
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of one way to run the layer.

    Attributes:
        row: its name.
        dropout: of the adapters.
        saved_bytes: handed to autograd.
        held_bytes: alive after the forward pass.
        peak_bytes: most alive at once, forward and backward; by the allocator on a GPU.
    """

    row: str
    dropout: float
    saved_bytes: int
    held_bytes: int
    peak_bytes: int


class Layer:
    """One decoder layer in every way it is measured, with one input."""

    def __init__(self, size: Size) -> None:
        """Draw weights, factors, index sets and the input."""
        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_attention_heads=size.heads,
            num_key_value_heads=max(1, size.heads // 4),
            attn_implementation="sdpa",
        )
        self.size = size
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._base = LlamaDecoderLayer(config, 0)
        self._base.to(size.device, getattr(torch, size.dtype)).requires_grad_(requires_grad=False)
        generator = torch.Generator().manual_seed(1)
        shape = (size.batch, size.length, size.hidden)
        self._x, self.dy = (torch.randn(shape, generator=generator) for _ in range(2))
        positions = torch.arange(size.length)[None]
        self._positions = LlamaRotaryEmbedding(config)(self._x, positions)
        self._factors = {
            name: (
                torch.randn(size.rank, layer.in_features, generator=generator)
                * layer.in_features**-0.5,
                torch.randn(layer.out_features, size.rank, generator=generator) * 0.1,
            )
            for name, layer in self._base.named_modules()
            if name.endswith(PROJECTIONS)
        }
        drawn = draw_sketches(0, list(self._factors), size.rank, size.sketch_size)
        every = torch.arange(size.rank)
        self._index = {
            name: every if sketch.index is None else sketch.index for name, sketch in drawn.items()
        }

    def base(self) -> nn.Module:
        """Return the layer without adapters."""
        return copy.deepcopy(self._base).train()

    def peft(self, dropout: float, *, full: bool = False, as_it_comes: bool = False) -> nn.Module:
        """Return the layer in vanilla PEFT at rank R, or at rank S with the sketched factors.

        As it comes, PEFT keeps the factors of a layer in half precision in float32; else they are
        of the layer's own dtype.
        """
        rank = self.size.rank if full else self.size.sketch_size
        config = LoraConfig(
            r=rank, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=list(PROJECTIONS)
        )
        model = get_peft_model(
            copy.deepcopy(self._base), config, autocast_adapter_dtype=as_it_comes
        )
        layer = model.base_model.model
        if not as_it_comes:
            layer.to(self._base.self_attn.q_proj.weight)
        with torch.no_grad():
            for name, (lora_a, lora_b) in self._factors.items():
                rows = slice(None) if full else self._index[name]
                adapter = layer.get_submodule(name)
                adapter.lora_A["default"].weight.copy_(lora_a[rows])
                adapter.lora_B["default"].weight.copy_(lora_b[:, rows])
        return layer.train()

    def ours(self, dropout: float, *, full: bool = False, recompute: bool = False) -> nn.Module:
        """Return the same layer fused."""
        layer = self.peft(dropout, full=full)
        fslora_kernels.fuse(layer, recompute=recompute)
        return layer

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Run a layer."""
        cos, sin = (part.to(x) for part in self._positions)
        result = layer(x, position_embeddings=(cos, sin))
        return result[0] if isinstance(result, tuple) else result

    def input(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return x, a leaf."""
        dtype = dtype or getattr(torch, self.size.dtype)
        return self._x.to(self.size.device, dtype).requires_grad_()

    def results(self, layer: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return y and the gradients of x and, in one vector, of all factors."""
        x = self.input(dtype)
        y = self.forward(layer, x)
        factors = [p for p in layer.parameters() if p.requires_grad]
        dx, *rest = torch.autograd.grad(y, (x, *factors), self.dy.to(y))
        found = {"y": y.detach(), "dx": dx}
        return found | ({"factors": torch.cat([g.flatten() for g in rest])} if rest else {})


def measure(layer: Layer, module: nn.Module, row: str, dropout: float) -> Held:
    """Count what one forward and backward pass keeps."""
    x, dy = layer.input(), layer.dy.to(layer.size.device, getattr(torch, layer.size.dtype))
    known = addresses([*module.parameters(), *module.buffers(), dy])
    saved = kept_storages(layer.forward(module, x), known)
    with AliveBytes({*known, *addresses([x])}) as alive:
        y = layer.forward(module, x)
        held = alive.now
        y.backward(dy)
    peak = alive.peak
    if layer.size.device == "cuda":
        del y
        module.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer.forward(module, x).backward(dy)
        peak = torch.cuda.max_memory_allocated() - before
    return Held(row, dropout, sum(saved.values()), held, peak)


def errors(layer: Layer, dropout: float) -> dict[str, str]:
    """Return what is wrong with our rows, by name."""
    wrong = {}
    for name, recompute in OURS.items():
        for rank, full in (("R", True), ("S", False)):
            try:
                _check(layer, dropout, full=full, recompute=recompute)
            except Exception as error:  # a row that fails is shown as red
                wrong[f"{name} at {rank}"] = f"{type(error).__name__}: {error}"
    return wrong


def _check(layer: Layer, dropout: float, *, full: bool, recompute: bool) -> None:
    vanilla = layer.peft(0.0, full=full)
    eager = layer.results(vanilla)
    exact = layer.results(vanilla.double(), torch.float64)
    ours = layer.ours(0.0, full=full, recompute=recompute)
    for name, value in layer.results(ours).items():
        check_error_budget(value, eager[name], exact[name], name=name)
    dropped = layer.ours(dropout, full=full, recompute=recompute)
    first, second = (layer.results(dropped)["y"] for _ in range(2))
    if dropout and torch.equal(first, second):
        raise AssertionError("dropout drops nothing: two masks give one result")


def rows(layer: Layer, dropouts: Sequence[float]) -> Iterator[Held]:
    """Measure every way at every dropout, one by one; the bare layer first, ours after PEFT."""
    yield measure(layer, layer.base(), "base", 0.0)
    for dropout in dropouts:
        if layer.size.dtype != "float32":
            for full, rank in ((True, "R"), (False, "S")):
                module = layer.peft(dropout, full=full, as_it_comes=True)
                yield measure(layer, module, f"{AS_IT_COMES} {rank}", dropout)
        for full, rank in ((True, "R"), (False, "S")):
            yield measure(layer, layer.peft(dropout, full=full), f"PEFT at {rank}", dropout)
            for name, recompute in OURS.items():
                module = layer.ours(dropout, full=full, recompute=recompute)
                yield measure(layer, module, f"{name} at {rank}", dropout)


def peer_of(row: str) -> str:
    """The row of PEFT that one of ours is held against; any other row's own name."""
    name, _, rank = row.rpartition(" at ")
    return f"PEFT at {rank}" if name in OURS else row


def table(found: Sequence[Held], wrong: dict[str, str]) -> str:
    """Lay the rows out, each with its share of PEFT's at the same rank and dropout."""
    base = found[0]
    lines = [
        f"{'row':<20}{'dropout':>7}{'saved kB':>17}{'beyond base kB':>23}{'held kB':>17}"
        f"{'peak kB':>17}"
    ]
    peers = {(row.row, row.dropout): row for row in found}
    for row in found:
        if row.row in wrong:
            lines.append(f"{row.row:<20}{row.dropout:>7g}   red: {wrong[row.row]}")
            continue
        peer = peers.get((peer_of(row.row), row.dropout), row)
        cells = [
            (row.saved_bytes, peer.saved_bytes, 9),
            (row.saved_bytes - base.saved_bytes, peer.saved_bytes - base.saved_bytes, 15),
            (row.held_bytes, peer.held_bytes, 9),
            (row.peak_bytes, peer.peak_bytes, 9),
        ]
        shares = "".join(
            f"{mine / 1e3:>{width}.0f} {f'({mine / theirs:.2f})' if theirs else '':<7}"
            for mine, theirs, width in cells
        )
        lines.append(f"{row.row:<20}{row.dropout:>7g}{shares}")
    for (name, dropout), mine in peers.items():
        rival = peers.get((peer_of(name).replace("PEFT at", AS_IT_COMES), dropout))
        if peer_of(name) != name and rival is not None and name not in wrong:
            saved, peak = mine.saved_bytes / rival.saved_bytes, mine.peak_bytes / rival.peak_bytes
            lines.append(
                f"{name}, dropout {dropout:g}, over PEFT as it comes (float32 factors): "
                f"{saved:.2f} of what is saved, {peak:.2f} of the peak"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; return 1 if a row is wrong."""
    default = Size()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, default=default.batch, help="sequences")
    parser.add_argument("--length", type=int, default=default.length, help="tokens of each")
    parser.add_argument("--hidden", type=int, default=default.hidden)
    parser.add_argument("--intermediate", type=int, default=default.intermediate)
    parser.add_argument("--heads", type=int, default=default.heads)
    parser.add_argument("--rank", type=int, default=default.rank, help="R")
    parser.add_argument("--sketch-size", type=int, default=default.sketch_size, help="S")
    parser.add_argument("--dtype", default=default.dtype, choices=("float32", "bfloat16"))
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    chosen = vars(parser.parse_args(arguments))
    out, dropout = chosen.pop("out"), chosen.pop("dropout")
    size = Size(**chosen)
    check_device(size.device)
    layer = Layer(size)
    wrong = errors(layer, dropout)
    found = list(rows(layer, (0.0, dropout)))
    print(
        f"one decoder layer, {size.batch}×{size.length} tokens, hidden {size.hidden}, "
        f"R={size.rank}, S={size.sketch_size}, {size.dtype}; in brackets: over PEFT's"
    )
    print(table(found, wrong))
    for row in found if out else ():
        values = {"error": wrong[row.row]} if row.row in wrong else asdict(row)
        fields = {
            "benchmark": "memory",
            **provenance(size.device),
            "size": asdict(size),
            "row": row.row,
        }
        append_record(out, {**fields, "dropout": row.dropout, **values})
    return int(bool(wrong))
