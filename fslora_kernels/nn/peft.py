"""Which ranks of a fused PEFT model are used: view them, or take them out and put them back.

Modules are named as in ``model.named_modules()``; ``FuseReport.fused`` lists them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fslora_kernels.nn.fuse import FusedLayers, fuse, fused_layers
from fslora_kernels.nn.linear import Restriction
from fslora_kernels.sampling import draw_indices, sketch_size
from fslora_kernels.weights import Adapters, LoRAWeights, check_devices, check_index, check_whole


def ranks(model: nn.Module, *, adapter_name: str | None = None) -> dict[str, int]:
    """Return the rank of every fused layer that has the adapter, as ``draw_indices`` takes them.

    Args:
        model: a fused model.
        adapter_name: the adapter that is meant; default the active one.

    Raises:
        ValueError: no fused layer has such an adapter.
    """
    layers = fused_layers(model)
    names = [
        name
        for name, layer in layers.items()
        if adapter_name in layer.r
        or (adapter_name is None and any(active in layer.r for active in layer.active_adapters))
    ]
    if not names:
        wanted = "an active adapter" if adapter_name is None else f"the adapter {adapter_name!r}"
        raise ValueError(f"no fused layer has {wanted}; call fslora_kernels.fuse(model) first")
    return {
        name: layer.r[adapter]
        for name, layer, adapter in _named(layers, dict.fromkeys(names), adapter_name)
    }


def _named(
    layers: Mapping[str, Any], names: Mapping[str, object], adapter_name: str | None
) -> Iterator[tuple[str, Any, str]]:
    """Yield each named layer with the adapter that is meant."""
    for name in names:
        layer = layers.get(name)
        if layer is None:
            known = ", ".join(list(layers)[:3]) or "none: call fslora_kernels.fuse(model) first"
            raise ValueError(f"no fused LoRA layer is named {name!r}; fused layers are {known}, …")
        adapter = adapter_name
        if adapter is None:
            active = [a for a in layer.active_adapters if a in layer.r]
            if len(active) != 1:
                raise ValueError(
                    f"{name} has the active adapters {active}; name one with adapter_name="
                )
            adapter = active[0]
        if adapter not in layer.r or adapter in layer.lora_variant:
            raise ValueError(f"{name} has no plain LoRA adapter {adapter!r}")
        yield name, layer, adapter


def sketch(
    model: nn.Module,
    indices: Mapping[str, Tensor | None] | None,
    *,
    adapter_name: str | None = None,
) -> None:
    """View mode: let layers use only some ranks of their own factors, scaled by rank / size.

    Replaces every sketch set before; layers that are not named use all their ranks. Gradients
    keep the full shapes and are zero outside the index set.

    Args:
        model: a fused model.
        indices: module name to int64 ``[S]``, ascending (None: all ranks); None clears all.
        adapter_name: the adapter that is meant; default the active one.

    Raises:
        ValueError: unknown module, or an index out of range, repeated or not ascending.
    """
    layers = fused_layers(model)
    named = list(_named(layers, indices or {}, adapter_name))
    restrictions = []
    for name, layer, adapter in named:
        index = (indices or {})[name]
        if index is not None:
            check_index(index, layer.r[adapter])
            index = index.to(layer.lora_A[adapter].weight.device)
        restrictions.append((layer, adapter, index))
    _unrestrict(layers)
    for layer, adapter, index in restrictions:
        if index is not None:
            layer.restrictions[adapter] = Restriction(index=index)


def extract(
    model: nn.Module, indices: Mapping[str, Tensor | None], *, adapter_name: str | None = None
) -> Adapters:
    """Compact mode: copy the selected ranks out as a client's own trainable leaves.

    Args:
        model: a fused model.
        indices: module name to int64 ``[S]``, ascending, or None for all ranks.
        adapter_name: the adapter that is meant; default the active one.

    Returns:
        Module name to fresh contiguous leaves ``[S, D]`` and ``[S, E]`` that require gradients.

    Raises:
        ValueError: unknown module, or an index out of range, repeated or not ascending.
    """
    adapters: Adapters = {}
    for name, layer, adapter in _named(fused_layers(model), indices, adapter_name):
        lora_a, lora_b = _factors(layer, adapter)
        index = indices[name]
        if index is not None:
            check_index(index, layer.r[adapter])
            index = index.to(lora_a.device)
            lora_a, lora_b = lora_a[index], lora_b[index]
        adapters[name] = LoRAWeights(
            lora_a.clone(memory_format=torch.contiguous_format).requires_grad_(),
            lora_b.clone(memory_format=torch.contiguous_format).requires_grad_(),
        )
    return adapters


def bind(
    model: nn.Module | FusedLayers,
    adapters: Adapters,
    *,
    adapter_name: str | None = None,
    scale: float | Mapping[str, Tensor] | None = None,
) -> None:
    """Compact mode: let layers compute with these leaves instead of their own factors.

    The layer's own parameters are not touched. Replaces what was bound or sketched before.

    Args:
        model: a fused model, or its ``fused_layers``, which saves the walk through it.
        adapters: module name to ``[S, D]`` and ``[S, E]``, on the layer's device.
        adapter_name: the adapter that is replaced; default the active one.
        scale: of the delta, relative to the layer's own scaling; default rank / S, as a sketch
            needs it. Or module name to one for each rank, ``[S]`` on the layer's device, as ranks
            need that were not drawn alike; it is not differentiated.

    Raises:
        ValueError: unknown module, or factors or scales that do not fit the layer.
    """
    layers = fused_layers(model)
    named = list(_named(layers, adapters, adapter_name))
    for name, layer, adapter in named:
        (rank, *inputs), b_shape = (tuple(factor.shape) for factor in adapters[name])
        most, wanted = layer.r[adapter], (layer.in_features, layer.out_features)
        if not 0 < rank <= most or inputs != [wanted[0]] or b_shape != (rank, wanted[1]):
            raise ValueError(
                f"the leaves of {name} are {(rank, *inputs)} and {b_shape}, but the layer takes "
                f"[S, {wanted[0]}] and [S, {wanted[1]}] with S at most {most}"
            )
    if isinstance(scale, Mapping):
        _check_scales(scale, adapters)
    _unrestrict(layers)
    for name, layer, adapter in named:
        own = scale[name] if isinstance(scale, Mapping) else scale
        layer.restrictions[adapter] = Restriction(leaves=adapters[name], scale=own)


def _check_scales(scales: Mapping[str, Tensor], adapters: Adapters) -> None:
    for name, leaves in adapters.items():
        given = scales.get(name)
        if given is None or given.shape != (leaves.rank,) or given.requires_grad:
            found = None if given is None else tuple(given.shape)
            raise ValueError(
                f"{name} has {leaves.rank} ranks and the scales {found}; give each rank one, in a "
                f"tensor [{leaves.rank}] that does not require a gradient"
            )
        check_devices(leaves.lora_a.device, f"the leaves of {name}", scale=given)


def unbind(model: nn.Module | FusedLayers) -> None:
    """Let every layer use its own full factors again (clears sketches too)."""
    _unrestrict(fused_layers(model))


def _unrestrict(layers: Mapping[str, Any]) -> None:
    for layer in layers.values():
        layer.restrictions.clear()


def scatter(
    model: nn.Module,
    adapters: Adapters,
    indices: Mapping[str, Tensor | None],
    *,
    adapter_name: str | None = None,
) -> None:
    """Write a client's leaves back into the layers' own factors, in place.

    Args:
        model: a fused model.
        adapters: module name to ``[S, D]`` and ``[S, E]``.
        indices: the index sets that the leaves were extracted with.
        adapter_name: the adapter that is meant; default the active one.

    Raises:
        ValueError: unknown module, missing or wrong index set.
    """
    named = list(_named(fused_layers(model), adapters, adapter_name))
    for name, layer, adapter in named:
        index = indices.get(name)
        size = layer.r[adapter] if index is None else index.shape[0]
        if index is not None:
            check_index(index, layer.r[adapter])
        if size != adapters[name].rank:
            raise ValueError(
                f"{name} has {adapters[name].rank} ranks to write back but its index set has "
                f"{size}; pass the index sets that the leaves were extracted with"
            )
    for name, layer, adapter in named:
        lora_a, lora_b = _factors(layer, adapter)
        index = indices.get(name)
        rows = slice(None) if index is None else index.to(lora_a.device)
        lora_a[rows] = adapters[name].lora_a.detach().to(lora_a)
        lora_b[rows] = adapters[name].lora_b.detach().to(lora_b)


def _factors(layer: Any, adapter: str) -> LoRAWeights:  # noqa: ANN401
    """Return the layer's own factors, rank-major views that share their storage."""
    remedy = "take leaves out, and write them back, before fully_shard"
    check_whole(layer.lora_A[adapter].weight, "lora_A.weight", remedy)
    return LoRAWeights(
        layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach().t()
    )


def get_sketched_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    *,
    ratio: float = 1.0,
    seed: int = 0,
    implementation: str | None = None,
    **arguments: Any,  # noqa: ANN401
) -> PeftModel:
    """Wrap a model by ``peft.get_peft_model``, fuse it, and set a sketch: three steps in one.

    Args:
        model: the base model.
        peft_config: a ``LoraConfig``.
        adapter_name: of the adapter.
        ratio: sketch ratio S/R in (0, 1]; 1 trains every rank. Below 1 the same S ranks of each
            layer stay selected until ``sketch`` is called again, as ``SketchCallback`` does.
        seed: of the index sets.
        implementation: as ``fuse`` takes it.
        arguments: passed on to ``peft.get_peft_model``.

    Returns:
        The ``PeftModel``; layers that cannot be fused stay vanilla, and a warning names them.

    Raises:
        ValueError: the ratio is not in (0, 1], or no LoRA layer of the model can be fused.

    Source: arXiv 2501.19389.
    """
    sketch_size(1, ratio)
    wrapped = get_peft_model(model, peft_config, adapter_name, **arguments)
    report = fuse(wrapped, implementation)
    if not report.fused:
        raise ValueError(f"no LoRA layer of this model can be fused, so none can sketch: {report}")
    if report.left:
        warnings.warn(str(report), stacklevel=2)
    if ratio < 1.0:
        indices = draw_indices(seed, ranks(wrapped, adapter_name=adapter_name), ratio)
        sketch(wrapped, indices, adapter_name=adapter_name)
    return wrapped
