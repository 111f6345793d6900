"""Making the LoRA layers of a PEFT model compute through ``sketched_linear``, and back."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import MethodType
from typing import Any

from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import ParamWrapper
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from fslora_kernels._dispatch import check_implementation, unavailable
from fslora_kernels.nn.linear import (
    SketchedForward,
    SketchedLoRALinear,
    adapters_reason,
    indirect_reason,
)

# Exact types only: a subclass may compute something else. The quantised ones are known by their
# names, so that their libraries are not imported here; they join the table when one is met.
QUANTISED = (
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.torchao.TorchaoLoraLinear",
)
FUSED_CLASSES: dict[type, type] = {PeftLinear: SketchedLoRALinear}


def _fused_class(peft_class: type) -> type | None:
    """Return our class for PEFT's class of a layer, or None where there is none."""
    if f"{peft_class.__module__}.{peft_class.__qualname__}" in QUANTISED:
        name, bases = f"Sketched{peft_class.__name__}", (SketchedForward, peft_class)
        FUSED_CLASSES.setdefault(peft_class, type(name, bases, {"__module__": __name__}))
    return FUSED_CLASSES.get(peft_class)


def __getattr__(name: str) -> type:
    """Make a quantised layer's class when pickle asks for it by its name."""
    for path in QUANTISED:
        module, _, peft_name = path.rpartition(".")
        if name == f"Sketched{peft_name}":
            fused_class = _fused_class(getattr(import_module(module), peft_name))
            if fused_class is not None:
                return fused_class
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, slots=True)
class FuseReport:
    """What ``fuse`` did.

    Attributes:
        fused: module name to its mode: "delta-first", or "accumulate: <why>"; or "vanilla: <why>"
            where PEFT's own code computes the layer as long as the reason holds.
        left: module name to why it stays vanilla PEFT.
        implementation: what the layers ask for; "auto" decides at each call.
    """

    fused: dict[str, str]
    left: dict[str, str]
    implementation: str

    def __str__(self) -> str:
        """Summarise in a few lines, naming every layer that is not in the fast mode."""
        slow = {name: mode for name, mode in self.fused.items() if mode != "delta-first"}
        lines = [
            f"fused {len(self.fused)} LoRA layers (implementation: {self.implementation}), "
            f"left {len(self.left)} as vanilla PEFT"
        ]
        lines += [f"  {name}: {mode}" for name, mode in slow.items()]
        lines += [f"  {name}: left, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def _is_own(layer: nn.Module, attribute: str) -> bool:
    """Whether an attribute of the instance is nothing but the forward of its class."""
    return getattr(vars(layer).get(attribute), "__func__", None) is type(layer).forward


def _is_replaced(layer: nn.Module) -> bool:
    """Whether a call runs another forward than the class's, accelerate's hooks around it aside."""
    forward = vars(layer).get("forward")
    if forward is None or _is_own(layer, "forward"):
        return False
    wrapper = getattr(forward, "func", None)
    by_accelerate = getattr(wrapper, "__module__", None) == "accelerate.hooks"
    return not (by_accelerate and _is_own(layer, "_old_forward"))


def _change_class(layer: nn.Module, kind: type) -> None:
    """Change the class, and the forward that accelerate's hooks have bound to the instance."""
    bound = [attribute for attribute in ("forward", "_old_forward") if _is_own(layer, attribute)]
    layer.__class__ = kind
    for attribute in bound:
        setattr(layer, attribute, MethodType(kind.forward, layer))  # type: ignore[attr-defined]


def _refusal(layer: LoraLayer) -> str | None:
    if isinstance(layer, ParamWrapper):
        return (
            f"a ParamWrapper adapts the bare parameter {layer.parameter_name!r}, as of experts "
            "kept in one tensor, and there is no linear layer to fuse"
        )
    if _fused_class(type(layer)) is None:
        return f"{type(layer).__name__} is not among the fused types"
    if _is_replaced(layer):
        return (
            "it has a forward of its own, as torch.compile(layer.forward) and X-LoRA set, and the "
            "fused one would never run; fuse before that is set"
        )
    if layer.lora_variant:
        variants = {type(variant).__name__ for variant in layer.lora_variant.values()}
        return f"it uses the LoRA variant {', '.join(sorted(variants))}"
    for dropout in layer.lora_dropout.values():
        if type(dropout) not in (nn.Dropout, nn.Identity):
            return f"its dropout is a {type(dropout).__name__}"
    return None


def _mode(layer: Any) -> str:  # noqa: ANN401
    if (reason := adapters_reason(layer)) is not None:
        return f"vanilla: {reason}"
    if (reason := indirect_reason(layer.base_layer)) is not None:
        return f"accumulate: {reason}"
    return "delta-first"


def fuse(
    model: nn.Module, implementation: str | None = None, *, recompute: bool = False
) -> FuseReport:
    """Make the LoRA layers of a PEFT model compute through ``sketched_linear``.

    Works before or in the middle of training: parameters, optimizers, hooks and checkpoints stay
    what they are. Layers that cannot be fused are left as they are and listed in the report, as
    are those that run their own base layer first (mode "accumulate"): quantised, offloaded, hooked
    or parametrized ones; and those whose active adapter is itself offloaded or hooked, or of a
    variant, which PEFT computes (mode "vanilla"). Calling it again changes these choices, and
    fuses layers that an adapter which came later has added.

    Args:
        model: a ``peft.PeftModel``, or any module with PEFT LoRA layers in it.
        implementation: "torch", "triton", or None for "auto".
        recompute: save memory, for some time: inputs that are products of what autograd keeps
            anyway, as behind RMSNorm and SwiGLU, are multiplied out again in the backward pass
            instead of being kept for it. Results are the same, to the bit but in layers of up to
            128 × 128 on a CPU. Other inputs are kept as before; with gradient checkpointing, and
            inside ``torch.compile``, all are left to that. It must be left out where a model writes
            over such a product, or what it comes from, unseen by autograd (``x.data``, or inside
            the norm under ``no_grad``).

    Returns:
        What was fused, in which mode, what not and why.

    Raises:
        ValueError: the model has no LoRA layer, or no such implementation exists.
        NotImplementedError: the implementation cannot run where the adapters are.
    """
    check_implementation(implementation)
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    if not layers:
        raise ValueError(
            "the model has no LoRA layer; wrap it first: peft.get_peft_model(model, LoraConfig())"
        )
    for device in {p.device.type for _, layer in layers for p in layer.lora_A.parameters()}:
        if implementation not in (None, "auto") and (reason := unavailable(implementation, device)):
            raise NotImplementedError(
                f"implementation {implementation!r} cannot run here: {reason}"
            )
    uncalled = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    fused, left = {}, {}
    for name, layer in layers:
        if layer in uncalled:
            left[name] = "nn.MultiheadAttention reads its weight and never calls it"
            continue
        if not isinstance(layer, SketchedForward):
            if (refusal := _refusal(layer)) is not None:
                left[name] = refusal
                continue
            _change_class(layer, FUSED_CLASSES[type(layer)])
            layer.restrictions = {}
        layer.implementation, layer.recompute = implementation, recompute
        fused[name] = _mode(layer)
    return FuseReport(fused, left, implementation or "auto")


def unfuse(model: nn.Module) -> None:
    """Give every fused layer its PEFT class back; sketches and bound leaves are dropped.

    Raises:
        ValueError: a fused layer was given another class or a forward of its own since; nothing is
            changed then.
    """
    layers = fused_layers(model)
    for name, layer in layers.items():
        if type(layer) not in FUSED_CLASSES.values():
            raise ValueError(
                f"{name} is a {type(layer).__name__}: its class was changed after fuse, as "
                "fully_shard does to the modules that it is given; unfuse before that"
            )
        if _is_replaced(layer):
            raise ValueError(
                f"{name} has a forward of its own, set after fuse, which would go on calling the "
                "fused one; undo that first, as by: del layer.forward"
            )
    for layer in layers.values():
        del layer.restrictions, layer.implementation
        vars(layer).pop("recompute", None)
        _change_class(layer, type(layer).__bases__[1])


def fused_layers(model: nn.Module) -> dict[str, Any]:
    """Return the fused layers by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SketchedForward)}


def modules(model: nn.Module) -> list[str]:
    """Return the names of the fused layers, as ``sketch`` and ``extract`` take them."""
    return list(fused_layers(model))
