"""Which ranks of a fused PEFT model are used: view them, or take them out and put them back.

Modules are named as in ``model.named_modules()``; ``FuseReport.fused`` lists them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fslora_kernels.nn.fuse import fused_layers
from fslora_kernels.nn.linear import Restriction, beside
from fslora_kernels.weights import Adapters, LoRAWeights, check_devices, check_index, check_whole


def ranks(model: nn.Module, *, adapter_name: str | None = None) -> dict[str, int]:
    """Return the rank of every fused layer that has the adapter, as ``draw_indices`` takes them.

    Args:
        model: a fused model.
        adapter_name: the adapter that is meant; default the active one.

    Raises:
        ValueError: no fused layer has such an adapter.
    """
    found = slots(model, adapter_name=adapter_name)
    if not found:
        wanted = "an active adapter" if adapter_name is None else f"the adapter {adapter_name!r}"
        raise ValueError(f"no fused layer has {wanted}; call fslora_kernels.fuse(model) first")
    return {name: slot.rank for name, slot in found.items()}


class Slot(NamedTuple):
    """Where a layer is told what to compute with in the place of an adapter's own factors.

    Attributes:
        restrictions: the layer's, by adapter name.
        adapter: the adapter that is meant.
        rank: R.
        in_features: D.
        out_features: E.
    """

    restrictions: dict[str, Restriction]
    adapter: str
    rank: int
    in_features: int
    out_features: int


def slots(model: nn.Module, *, adapter_name: str | None = None) -> dict[str, Slot]:
    """Return the slot of every fused layer that has the adapter, by module name.

    ``bind`` and ``unbind`` take them in the place of the model, which saves walking through it and
    asking each layer, as long as the model and its adapters stay what they are.

    Args:
        model: a fused model.
        adapter_name: the adapter that is meant; default the active one.
    """
    layers = fused_layers(model)
    names = [
        name
        for name, layer in layers.items()
        if adapter_name in layer.r
        or (adapter_name is None and any(active in layer.r for active in layer.active_adapters))
    ]
    return _slots(layers, names, adapter_name)


def _slots(
    layers: Mapping[str, Any], names: Iterable[str], adapter_name: str | None
) -> dict[str, Slot]:
    return {
        name: Slot(
            layer.restrictions,
            adapter,
            _rank(layer, adapter),
            layer.in_features,
            layer.out_features,
        )
        for name, layer, adapter in _named(layers, names, adapter_name)
    }


def _named(
    layers: Mapping[str, Any], names: Iterable[str], adapter_name: str | None
) -> Iterator[tuple[str, Any, str]]:
    """Yield each named layer with the adapter that is meant."""
    for name in names:
        layer = layers.get(name)
        if layer is None:
            raise _unknown(name, layers)
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


def _unknown(name: str, layers: Mapping[str, Any]) -> ValueError:
    known = ", ".join(list(layers)[:3]) or "none: call fslora_kernels.fuse(model) first"
    return ValueError(f"no fused LoRA layer is named {name!r}; fused layers are {known}, …")


def _rank(layer: Any, adapter: str) -> int:  # noqa: ANN401
    """Return R as the factors have it: PEFT's hotswap leaves ``layer.r`` as it was."""
    rank: int = layer.lora_A[adapter].weight.shape[0]
    return rank


def _check_index(index: object, layer: Any, name: str, adapter: str) -> Tensor:  # noqa: ANN401
    if not isinstance(index, Tensor):
        raise ValueError(  # noqa: TRY004
            f"the index set of {name} is a {type(index).__name__}; give a one-dimensional int64 "
            "tensor, torch.tensor([...])"
        )
    check_index(index, _rank(layer, adapter))
    return index


def sketch(
    model: nn.Module,
    indices: Mapping[str, Tensor | None] | None,
    *,
    adapter_name: str | None = None,
) -> None:
    """View mode: let layers use only some ranks of their own factors, scaled by rank / size.

    Replaces every sketch and all leaves set before, or those of the named adapter; layers that are
    not named use all their ranks. Gradients keep the full shapes and are zero outside the index
    set. Keep a sketch until the backward pass is done: gradient checkpointing runs the forward pass
    again then, and would take a new one.

    What is saved or merged is always the whole adapter at its own scale, that is after
    ``sketch(model, None)``. Under sketches that change it is what they are in the mean. One that
    stayed the same for a whole training multiplied its ranks by R/S, and the saved delta would be
    S/R of the trained one: multiply these columns of ``lora_B`` by R/S before.

    Args:
        model: a fused model.
        indices: module name to int64 ``[S]``, ascending (None: all ranks), which is copied; None
            clears all.
        adapter_name: the adapter that is meant; default the active one.

    Raises:
        ValueError: unknown module or adapter, or an index out of range, repeated or not ascending.
    """
    layers = fused_layers(model)
    named = list(_named(layers, indices or {}, adapter_name))
    if adapter_name is not None and not any(adapter_name in layer.r for layer in layers.values()):
        raise ValueError(f"no fused layer has the adapter {adapter_name!r}")
    restrictions = []
    for name, layer, adapter in named:
        index = (indices or {})[name]
        if index is not None:
            _check_index(index, layer, name, adapter)
            with torch.inference_mode(mode=False):  # backward refuses a tensor of that mode
                index = beside(index.clone(), layer.lora_A[adapter].weight)
        restrictions.append((layer, adapter, index))
    _unrestrict(layers, adapter_name)
    for layer, adapter, index in restrictions:
        if index is not None:
            layer.restrictions[adapter] = Restriction(index=index, rank=_rank(layer, adapter))


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
    adapters: dict[str, LoRAWeights] = {}
    for name, layer, adapter in _named(fused_layers(model), indices, adapter_name):
        lora_a, lora_b = _factors(layer, adapter)
        index = indices[name]
        if index is not None:
            index = _check_index(index, layer, name, adapter).to(lora_a.device)
            lora_a, lora_b = lora_a[index], lora_b[index]
        with torch.inference_mode(mode=False):  # a tensor of that mode gets no gradient
            adapters[name] = LoRAWeights(
                lora_a.clone(memory_format=torch.contiguous_format).requires_grad_(),
                lora_b.clone(memory_format=torch.contiguous_format).requires_grad_(),
            )
    return adapters


class Binding(NamedTuple):
    """What layers were told to compute with.

    Attributes:
        layers: all of the model.
        adapter_name: the adapter that is replaced; None replaces whatever is set.
        restrictions: a layer's, the adapter, and what is used in its place.
    """

    layers: Mapping[str, Any]
    adapter_name: str | None
    restrictions: list[tuple[dict[str, Restriction], str, Restriction]]

    def again(self) -> None:
        """Bind the same leaves again, as long as the model and its adapters are what they were."""
        _unrestrict(self.layers, self.adapter_name)
        for own, adapter, restriction in self.restrictions:
            own[adapter] = restriction


def bind(
    model: nn.Module | Mapping[str, Slot],
    adapters: Adapters,
    *,
    adapter_name: str | None = None,
    scale: float | Mapping[str, Tensor] | None = None,
) -> Binding:
    """Compact mode: let layers compute with these leaves instead of their own factors.

    The layer's own parameters are not touched. Replaces what was bound or sketched before, or of
    the named adapter alone.

    Args:
        model: a fused model, or its ``slots``.
        adapters: module name to ``[S, D]`` and ``[S, E]``, on the layer's device.
        adapter_name: the adapter that is replaced; default the active one, or that of the slots.
        scale: of the delta, relative to the layer's own scaling; default rank / S, as a sketch
            needs it. Or module name to one for each rank, ``[S]`` on the layer's device, as ranks
            need that were not drawn alike; it is not differentiated.

    Returns:
        What was bound. Its ``again()`` spares looking at the same leaves once more.

    Raises:
        ValueError: unknown module, factors or scales that do not fit the layer, or another adapter
            than that of the slots.
    """
    layers: Mapping[str, Any]
    found: Mapping[str, Slot]
    if isinstance(model, nn.Module):
        layers = fused_layers(model)
        found = _slots(layers, adapters, adapter_name)
    elif adapter_name is None:
        layers = found = model
    else:
        raise ValueError("slots are of one adapter: give its name to slots(), not to bind()")
    if isinstance(scale, Mapping):
        _check_scales(scale, adapters)
    scales: Mapping[str, float | Tensor | None] = (
        scale if isinstance(scale, Mapping) else dict.fromkeys(adapters, scale)
    )
    restrictions = []
    for name, leaves in adapters.items():
        slot = found.get(name)
        if slot is None:
            raise _unknown(name, layers)
        own, adapter, rank, d, e = slot
        a_shape, b_shape = leaves.lora_a.shape, leaves.lora_b.shape
        if a_shape[1:] != (d,) or b_shape != (a_shape[0], e) or not 0 < a_shape[0] <= rank:
            raise ValueError(
                f"the leaves of {name} are {tuple(a_shape)} and {tuple(b_shape)}, but the layer "
                f"takes [S, {d}] and [S, {e}] with S at most {rank}"
            )
        restrictions.append((own, adapter, Restriction(None, leaves, rank, scales[name])))
    binding = Binding(layers, adapter_name, restrictions)
    binding.again()
    return binding


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


def unbind(model: nn.Module | Mapping[str, Slot]) -> None:
    """Let every layer use its own full factors again (clears sketches too).

    Args:
        model: a fused model, or its ``slots``.
    """
    _unrestrict(fused_layers(model) if isinstance(model, nn.Module) else model, None)


def _unrestrict(layers: Mapping[str, Any], adapter_name: str | None) -> None:
    for layer in layers.values():
        if adapter_name is None:
            layer.restrictions.clear()
        else:
            layer.restrictions.pop(adapter_name, None)


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
        ValueError: unknown module, missing or wrong index set, factors that do not fit the layer,
            or an adapter that is merged into the base weight; nothing is written then.
    """
    named = list(_named(fused_layers(model), adapters, adapter_name))
    for name, layer, adapter in named:
        if adapter in layer.merged_adapters:
            raise ValueError(
                f"the adapter {adapter!r} is merged into the base weight of {name}, and unmerging "
                "takes out what its factors say by then; call model.unmerge_adapter() first"
            )
        index = indices.get(name)
        size = _rank(layer, adapter)
        if index is not None:
            size = len(_check_index(index, layer, name, adapter))
        found = [tuple(factor.shape) for factor in adapters[name]]
        wanted = [(size, layer.in_features), (size, layer.out_features)]
        if adapters[name].rank != size:
            raise ValueError(
                f"{name} has {adapters[name].rank} ranks to write back but its index set has "
                f"{size}; pass the index sets that the leaves were extracted with"
            )
        if found != wanted:
            raise ValueError(f"the leaves of {name} are {found}, but the layer takes {wanted}")
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
