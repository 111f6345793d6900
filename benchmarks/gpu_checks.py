"""Two stages of ``benchmarks.gpu``: the fused model, the simulated rounds."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fslora_kernels
from benchmarks.gpu import Row, Setting
from benchmarks.workload import bare, shared_model, with_adapter
from fslora.config import SimulateConfig
from fslora.models import model_path
from fslora.simulate import simulate as run_simulation
from fslora.sketch import draw_sketches
from fslora_kernels.testing import check_error_budget

ROUND_TOLERANCE = 1e-4  # of a loss, after up to three rounds of float32 training


# -- fuse ------------------------------------------------------------------------------------------


def checked_model() -> str | None:
    """Return the model that is at hand: the package's own base first, its sizes suit a GPU."""
    if Path(model_path("docs-base")).is_dir():
        return "docs-base"
    return shared_model("stories260K-hf")


def _llama(setting: Setting) -> nn.Module:
    """Return the model, or one of random weights where none is at hand."""
    model = checked_model()
    if model is not None:
        return bare(model, layers=1 if setting.dry else 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=1 if setting.dry else 4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return LlamaForCausalLM(config).requires_grad_(requires_grad=False)


def fuse(setting: Setting) -> Iterator[Row]:
    """Compare logits and gradients of a fused model with vanilla PEFT's, both against float64."""
    rank = 16
    vanilla = with_adapter(_llama(setting), rank).eval().to(setting.device)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in vanilla.named_parameters():
            if ".lora_" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.copy_(values)
    batch, length = (2, 8) if setting.dry else (8, 256)
    vocabulary = vanilla.get_base_model().config.vocab_size
    ids = torch.randint(3, vocabulary, (batch, length), generator=generator).to(setting.device)
    for implementation in setting.implementations:
        fused = copy.deepcopy(vanilla)
        report = fslora_kernels.fuse(fused, implementation)
        row: Row = {"what": f"{implementation} fuses", "ok": not report.left}
        yield row | {"error": str(report)} if report.left else row
        # Triton's interpreter has no bf16 products.
        dtypes = [torch.float32] if setting.dry else [torch.float32, torch.bfloat16]
        for dtype in dtypes:
            for size in (None, 4):
                yield _check_model(vanilla, fused, ids, dtype, size)


def _check_model(
    vanilla: nn.Module, fused: nn.Module, ids: Tensor, dtype: torch.dtype, size: int | None
) -> Row:
    """Check one dtype: whole (size None), or compact factors of ``size`` ranks.

    The oracle of a sketch is vanilla PEFT with the other ranks masked and the scaling corrected.
    """
    implementation = next(iter(_fused(fused).values())).implementation
    what = f"{implementation} {str(dtype).removeprefix('torch.')} S={size or 'R'}"
    names = fslora_kernels.modules(fused)
    try:
        oracle = copy.deepcopy(vanilla)
        rank = next(iter(_fused(fused).values())).r["default"]
        sketches = draw_sketches(7, names, rank, size or rank)
        indices = {name: sketch.index for name, sketch in sketches.items()}
        for name in names:
            _mask(oracle.get_submodule(name), indices[name])
        exact = _results(oracle.double(), ids, indices)
        eager = _results(oracle.to(dtype), ids, indices)
        model = copy.deepcopy(fused).to(dtype)
        leaves = fslora_kernels.extract(model, indices)
        if size is not None:
            fslora_kernels.bind(model, leaves)
        actual = _results(model, ids, {}, leaves if size is not None else None)
        for name, value in actual.items():
            check_error_budget(value, eager[name], exact[name], name=name)
    except Exception as error:  # recorded, and the other checks go on
        return {"what": what, "ok": False, "error": f"{type(error).__name__}: {error}"}
    return {"what": what, "ok": True}


def _fused(model: nn.Module) -> dict[str, Any]:
    return {name: model.get_submodule(name) for name in fslora_kernels.modules(model)}


@torch.no_grad()
def _mask(layer: Any, index: Tensor | None) -> None:  # noqa: ANN401
    if index is None:
        return
    others = torch.ones(layer.r["default"], dtype=torch.bool)
    others[index] = False
    layer.lora_A["default"].weight[others] = 0.0
    layer.lora_B["default"].weight[:, others] = 0.0
    layer.scaling["default"] *= layer.r["default"] / index.shape[0]


def _results(
    model: nn.Module,
    ids: Tensor,
    indices: dict[str, Tensor | None],
    leaves: fslora_kernels.Adapters | None = None,
) -> dict[str, Tensor]:
    """Return logits, and the gradients of the selected ranks, all modules' in one vector each."""
    logits = model(input_ids=ids).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64, device=ids.device)
    model.zero_grad()
    (logits * weights.to(logits.dtype).reshape(logits.shape)).sum().backward()
    gradients_a, gradients_b = [], []
    for name in leaves or indices or fslora_kernels.modules(model):
        if leaves is not None:
            gradient_a, gradient_b = (tensor.grad for tensor in leaves[name])
        else:
            layer = model.get_submodule(name)
            index = indices.get(name)
            rows = slice(None) if index is None else index.to(ids.device)
            gradient_a = layer.lora_A["default"].weight.grad[rows]
            gradient_b = layer.lora_B["default"].weight.grad.t()[rows]
        gradients_a.append(gradient_a.flatten())
        gradients_b.append(gradient_b.flatten())
    return {
        "logits": logits.detach(),
        "gradient of A": torch.cat(gradients_a),
        "gradient of B": torch.cat(gradients_b),
    }


# -- simulate --------------------------------------------------------------------------------------


def _rounds(setting: Setting, implementation: str, folder: Path) -> list[dict[str, Any]]:
    """Run three rounds and return their records."""
    model = checked_model()
    if model is None:
        raise FileNotFoundError(
            "no model is at hand: neither docs-base in the package nor stories260K-hf in shared; "
            "point FSLORA_SHARED at the shared folder"
        )
    size = {"clients": 3, "per_round": 2, "local_steps": 1, "batch_size": 2, "max_length": 16}
    if not setting.dry:
        size = {"clients": 20, "per_round": 10, "local_steps": 10, "batch_size": 8}
    config = SimulateConfig(
        model=model,
        data="python-docs",
        rounds=3,
        lr=5e-3,
        layers=1 if setting.dry else 0,
        target_modules="q_proj,down_proj" if setting.dry else "all-linear",
        eval_examples=4 if setting.dry else 192,
        device=setting.device,
        implementation=implementation,
        out=str(folder / implementation),
        **size,
    )
    run_simulation(config)
    text = (folder / implementation / "rounds.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def simulate(setting: Setting) -> Iterator[Row]:
    """Run the same rounds with every implementation; their losses must agree with torch's.

    Torch's run twice, which says how far apart equal ones are on this device.
    """
    with tempfile.TemporaryDirectory() as folder:
        again = _rounds(setting, "torch", Path(folder, "again"))
        records = {name: _rounds(setting, name, Path(folder)) for name in setting.implementations}
    noise = _apart(again, records["torch"])
    allowed = max(ROUND_TOLERANCE, 2 * noise)
    for name, own in records.items():
        losses = [record["eval_loss"] for record in own]
        seconds = [record["wall_seconds"] for record in own[1:]]
        apart = _apart(own, records["torch"])
        row: Row = {"what": f"three rounds, {name}", "ok": apart <= allowed}
        row |= {"eval_loss": losses, "round_seconds": seconds, "apart": apart, "torch_apart": noise}
        if not row["ok"]:
            row["error"] = f"losses are {apart:.1e} from torch's (allowed {allowed:.0e})"
        row["line"] = (
            f"{name}: evaluation loss {losses[0]:.4f} → {losses[-1]:.4f}, rounds of "
            f"{', '.join(f'{s:.2f}' for s in seconds)} s, losses within {apart:.0e} of torch's "
            f"(torch's two runs: {noise:.0e})"
        )
        yield row


def _apart(own: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Return the largest relative distance of two runs' losses; infinite if one is not finite."""
    return max(
        abs(mine[what] / theirs[what] - 1.0) if math.isfinite(mine[what]) else math.inf
        for mine, theirs in zip(own, others, strict=True)
        for what in ("train_loss", "eval_loss", "eval_loss_sketched")
        if theirs[what] is not None
    )
