"""The model of a run as an adapter that plain PEFT loads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from fslora.models import put_state
from fslora.protocol import Adapters, ServerState

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # of PEFT's module names, before the base model's own


def save_adapter(model: PeftModel, state: ServerState, folder: Path) -> None:
    """Write a state as PEFT's own checkpoint.

    What a strategy has added to the base weights becomes more ranks of each layer, so that
    ``PeftModel.from_pretrained`` on the untouched base gives the model that was evaluated.

    Args:
        model: the run's model, which takes over the state.
        state: what to write.
        folder: where to.
    """
    put_state(model, state.adapters, state.extras)
    model.save_pretrained(str(folder))
    if not state.base_residual:
        return
    tensors = load_file(folder / _WEIGHTS)
    settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    for name, rank in _append(tensors, state.base_residual).items():
        scaling = next(iter(model.get_submodule(name).scaling.values()))
        own = name.removeprefix(_PREFIX)
        settings["rank_pattern"][own] = rank
        settings["alpha_pattern"][own] = scaling * (
            math.sqrt(rank) if settings["use_rslora"] else rank
        )
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _append(tensors: dict[str, Tensor], residual: Adapters) -> dict[str, int]:
    """Append a residual's ranks to PEFT's tensors, in place; return each layer's new rank."""
    ranks = {}
    for name, pair in residual.items():
        key_a, key_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[key_a] = torch.cat([tensors[key_a], pair.lora_a])
        tensors[key_b] = torch.cat([tensors[key_b], pair.lora_b.t()], dim=1)
        ranks[name] = len(tensors[key_a])
    return ranks
