"""Adapting a model, fusing it and sketching it in one call."""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fslora_kernels.nn.fuse import FuseReport, fuse
from fslora_kernels.nn.peft import ranks, sketch
from fslora_kernels.sampling import draw_indices, sketch_size

NEED_ALL_RANKS = ("pissa", "olora", "corda", "lora_ga", "loftq", "orthogonal")


def needs_all_ranks(config: PeftConfig) -> str | None:
    """Say why a sketch of an adapter that was just initialised changes the model, or None.

    PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ take the adapter's product out of the base weight;
    "orthogonal" starts from ranks whose products cancel. All others start from zero, and False says
    that the model is changed anyway.
    """
    method = getattr(config, "init_lora_weights", True)
    if not isinstance(method, str) or not method.lower().startswith(NEED_ALL_RANKS):
        return None
    return (
        f"init_lora_weights={method!r} starts from an adapter of which all ranks together give the "
        "pretrained model, and a sketch of them does not"
    )


def _fused(model: nn.Module, implementation: str | None, *, recompute: bool) -> FuseReport:
    """Fuse a model of which at least one layer has to be fused."""
    report = fuse(model, implementation, recompute=recompute)
    if not report.fused:
        raise ValueError(f"no LoRA layer of this model can be fused, so none can sketch: {report}")
    return report


def get_sketched_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    *,
    ratio: float = 1.0,
    seed: int = 0,
    implementation: str | None = None,
    recompute: bool = False,
    **arguments: Any,  # noqa: ANN401
) -> PeftModel:
    """Wrap a model by ``peft.get_peft_model``, fuse it, and set a sketch: three steps in one.

    Args:
        model: the base model.
        peft_config: a ``LoraConfig``.
        adapter_name: of the adapter.
        ratio: sketch ratio S/R in (0, 1]; 1 trains every rank. Below 1 the same S ranks of each
            layer stay selected until ``sketch`` is called again, as ``SketchCallback`` does. If
            nothing does, see ``sketch`` for what has to be scaled before the model is saved.
        seed: of the index sets.
        implementation: as ``fuse`` takes it.
        recompute: likewise.
        arguments: passed on to ``peft.get_peft_model``.

    Returns:
        The ``PeftModel``; layers that cannot be fused stay vanilla, and a warning names them.

    Raises:
        ValueError: the ratio is not in (0, 1], the config is of another method than LoRA or starts
            from an adapter that a sketch would break, or no LoRA layer can be fused.
        NotImplementedError: the implementation cannot run where the model is.

    A model that is refused is left unwrapped, and trains what it trained before; one that already
    had adapters keeps the new one too.

    Source: arXiv 2501.19389.
    """
    sketch_size(1, ratio)
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(  # noqa: TRY004
            f"a {type(peft_config).__name__} has no ranks to sketch; pass a peft.LoraConfig"
        )
    if ratio < 1.0 and (reason := needs_all_ranks(peft_config)) is not None:
        raise ValueError(f"{reason}; leave init_lora_weights at True, or train with ratio=1.0")
    adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    children = [(module, dict(module._modules)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wrapped = get_peft_model(model, peft_config, adapter_name, **arguments)
    try:
        report = _fused(wrapped, implementation, recompute=recompute)
    except (ValueError, NotImplementedError):
        if not adapted:
            del model.peft_config
            for module, own in children:
                module._modules.update(own)
            for parameter, trains in trained:
                parameter.requires_grad_(trains)
        raise
    if report.left:
        warnings.warn(str(report), stacklevel=2)
    if ratio < 1.0:
        indices = draw_indices(seed, ranks(wrapped, adapter_name=adapter_name), ratio)
        sketch(wrapped, indices, adapter_name=adapter_name)
    return wrapped
