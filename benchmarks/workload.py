"""The models that are measured: real pretrained ones, or the small one in the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

from fslora.models import model_path

LLAMA_768 = "llama-768"


def shared_data() -> Path:
    """Return the folder of real data: below ``shared`` beside the repository, or FSLORA_SHARED."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get("FSLORA_SHARED", beside)) / "data"


def shared_model(name: str) -> str | None:
    """Return the folder of a shared pretrained model, or None where there is none."""
    folder = shared_data() / "models" / name
    return str(folder) if folder.is_dir() else None


def default_model() -> str:
    """Return stories260K where it is at hand, else the base in the package."""
    return shared_model("stories260K-hf") or "docs-base"


def bare(model: str, *, classes: int = 0, layers: int = 0) -> nn.Module:
    """Load a base model in float32, frozen, in training mode.

    Args:
        model: folder, hub id, ``docs-base`` or ``llama-768``.
        classes: make it a classifier of so many classes; 0 keeps the language model.
        layers: keep only the first so many layers; 0 keeps all.

    Raises:
        FileNotFoundError: it is written like a path and there is nothing.
        ValueError: it cannot be loaded.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if model == LLAMA_768:
        return llama_768(layers or 4).requires_grad_(requires_grad=False).train()
    settings: dict[str, Any] = {"dtype": torch.float32}
    settings |= {"num_hidden_layers": layers} if layers else {}
    settings |= {"num_labels": classes} if classes else {}
    auto = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    path = model_path(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of a classifier's head
        try:
            base = auto.from_pretrained(path, **settings)
        except OSError as error:
            raise ValueError(
                f"cannot load the model {model!r}: {' '.join(str(error).split())[:300]} … "
                f"Give a folder that save_pretrained wrote, a hub id, docs-base or {LLAMA_768}"
            ) from error
    return base.requires_grad_(requires_grad=False).train()


def llama_768(layers: int) -> nn.Module:
    """Build a Llama of the layers of a small real one (768 features, 12 heads), random weights."""
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=4096,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def with_adapter(
    base: nn.Module, rank: int, *, alpha: float = 16.0, classes: int = 0, dropout: float = 0.0
) -> PeftModel:
    """Put a LoRA adapter on every linear layer but the output's, as any PEFT user would."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type=TaskType.SEQ_CLS if classes else None,
    )
    return get_peft_model(base, config).train()
