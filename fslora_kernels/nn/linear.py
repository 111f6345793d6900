"""The PEFT linear layer on the fused operation.

``fuse`` changes the class of an existing ``peft.tuners.lora.Linear`` to this one and ``unfuse``
changes it back, so modules, parameters, hooks and optimizers stay the same objects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from fslora_kernels._autograd import autocasts
from fslora_kernels.ops.sketched_linear.interface import unchecked
from fslora_kernels.weights import LoRAWeights, check_devices


@dataclass(frozen=True, slots=True)
class Restriction:
    """What a fused layer uses instead of an adapter's full factors.

    Attributes:
        index: view mode: int64 ``[S]`` into the layer's own factors, on their device.
        leaves: compact mode: a client's own factors, used whole.
        rank: R of the adapter when its ranks were chosen.
        scale: of the leaves' delta, relative to the layer's own scaling: one number, or one for
            each rank ``[S]``; None is R / S, as it is for an index set.
    """

    index: Tensor | None = None
    leaves: LoRAWeights | None = None
    rank: int = 0
    scale: float | Tensor | None = None

    @property
    def correction(self) -> float | Tensor:
        """The scale; a compiler sees R / S as the size's, not as a number of its own."""
        if self.scale is not None:
            return self.scale
        if self.leaves is not None:
            return self.rank / self.leaves.rank
        return 1.0 if self.index is None else self.rank / self.index.shape[0]


UNRESTRICTED = Restriction()


def _altered(module: nn.Module) -> str | None:
    """Say why calling a module is more than its class's forward, or None."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has hooks"
    if "forward" in module.__dict__ or "_hf_hook" in module.__dict__:
        return "has a forward that is not its own"
    return None


def indirect_reason(base: nn.Module) -> str | None:
    """Say why the base product cannot be accumulated onto the delta, or None if it can.

    Bypassing ``base.forward`` is right only for an untouched plain layer: a hook would not run, an
    offloaded weight would be read before it is there, a nested adapter would be lost.
    """
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"its base layer is {type(base).__module__}.{type(base).__qualname__}"
    kind = type(base.weight)
    if kind is not nn.Parameter and kind is not Tensor:
        return f"its base weight is a {kind.__name__}"
    altered = _altered(base)
    return None if altered is None else f"its base layer {altered}"


def _mixed_dtypes(x: Tensor, weight: Tensor) -> bool:
    """Whether the base layer has its own opinion on dtypes: let it run, or complain."""
    return x.dtype != weight.dtype and not autocasts(x)


class SketchedForward:
    """The forward pass of a fused LoRA layer, mixed into PEFT's class of it.

    Everything but the plain unmerged forward pass is PEFT's own code.

    Attributes:
        implementation: what ``sketched_linear`` is asked to use.
        recompute: whether an input is made again in the backward pass where it can be.
        restrictions: adapter name to what is used instead of its full factors.
    """

    implementation: str | None
    recompute: bool = False  # of layers that were pickled before there was the choice
    restrictions: dict[str, Restriction]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """Return base(x) plus the active adapters' deltas, ``[..., out_features]``."""
        vanilla = _vanilla_reason(self, x, args, kwargs)
        if vanilla is not None:
            used = {
                *self.active_adapters,
                *self.merged_adapters,
                *(kwargs.get("adapter_names") or ()),
            }
            if not self.disable_adapters and not used.isdisjoint(self.restrictions):
                raise ValueError(
                    f"a sketch is set on this layer, but {vanilla}, which runs PEFT's own code "
                    "with the whole adapter; call fslora_kernels.sketch(model, None) and "
                    "fslora_kernels.unbind(model) first"
                )
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        y: Tensor | None = None
        base = self._modules["base_layer"]
        hooked = _has_any_global_hook()  # type: ignore[no-untyped-call]
        if hooked or indirect_reason(base) is not None or _mixed_dtypes(x, base.weight):
            y = base(x)
        for name in self.active_adapters:
            if name in self.scaling:
                y = _add_adapter(self, name, x, base, y)
        return base(x) if y is None else y

    def merge(
        self: Any,
        safe_merge: bool = False,  # noqa: FBT001, FBT002
        adapter_names: list[str] | None = None,
    ) -> None:
        """Merge whole adapters into the base weight, as PEFT does.

        Raises:
            ValueError: one of them is sketched or replaced by leaves, so this layer computes
                something else than what would be merged.
        """
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.restrictions:
                raise ValueError(
                    f"the adapter {name!r} is sketched, or leaves are bound to it, and PEFT merges "
                    "its whole factors at the scale of all ranks; scatter leaves that are to be "
                    "merged, then call fslora_kernels.sketch(model, None) (see there what a sketch "
                    "that stays the same for a whole training means)"
                )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Move the index sets along with the factors."""
        super()._apply(*args, **kwargs)  # type: ignore[misc]
        for name, restriction in self.restrictions.items():
            if restriction.index is not None:
                index = beside(restriction.index, self.lora_A[name].weight)
                self.restrictions[name] = replace(restriction, index=index)
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and what it was restricted to."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self.restrictions.pop(adapter_name, None)


class SketchedLoRALinear(SketchedForward, PeftLinear):  # type: ignore[misc]
    """``peft.tuners.lora.Linear`` computed by ``sketched_linear``."""


def beside(index: Tensor, factor: Tensor) -> Tensor:
    """Return an index set on a factor's device; as it is where that is the empty meta device."""
    return index if factor.device.type == "meta" else index.to(factor.device)


def _vanilla_reason(
    layer: Any,  # noqa: ANN401
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str | None:
    """Say why a call is left to PEFT's own forward, or None."""
    if args or kwargs:
        return "the call passes more than the input"
    if x.is_nested:
        return "the input is a nested tensor"
    if layer.disable_adapters:
        return "the adapters are disabled"
    if layer.merged:
        return "an adapter is merged into the base weight"
    return adapters_reason(layer)


def adapters_reason(layer: Any) -> str | None:  # noqa: ANN401
    """Say why a layer with its active adapters is left to PEFT's own forward, or None."""
    for name in layer.active_adapters:
        if name in layer.lora_variant:
            return "an active adapter is a LoRA variant"
        if name in layer.scaling and (kept := _dropout_reason(_dropout(layer, name))):
            return f"its dropout {kept}"
        if name in layer.scaling and layer.restrictions.get(name, UNRESTRICTED).leaves is None:
            for factor in (layer.lora_A[name], layer.lora_B[name]):
                if type(factor) is not nn.Linear:
                    return f"a factor of the adapter is a {type(factor).__name__}"
                if (altered := _altered(factor)) is not None:
                    return f"a factor of the adapter {altered}"
    return None


def _dropout(layer: Any, name: str) -> nn.Module:  # noqa: ANN401
    """Return ``layer.lora_dropout[name]`` in a tenth of its time, twice a call."""
    module: nn.Module = layer._modules["lora_dropout"]._modules[name]
    return module


def _dropout_reason(dropout: nn.Module) -> str | None:
    """Say why a dropout module is more than a probability, or None."""
    if type(dropout) is nn.Dropout:
        if dropout.training and dropout.p >= 1:
            return "drops everything"
    elif type(dropout) is not nn.Identity:
        return f"is a {type(dropout).__name__}"
    return _altered(dropout)


def _add_adapter(
    layer: Any,  # noqa: ANN401
    name: str,
    x: Tensor,
    base: Any,  # noqa: ANN401
    y: Tensor | None,
) -> Tensor:
    """Return base(x) plus this adapter's delta, or y plus it where y is given."""
    restriction = layer.restrictions.get(name, UNRESTRICTED)
    scale, index = layer.scaling[name] * restriction.correction, restriction.index
    if restriction.leaves is not None:
        lora_a, lora_b = restriction.leaves
    else:
        lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight.t()
        if index is not None:
            index = index.to(x.device)  # nn.DataParallel's replicas share one restriction
    if lora_a.device != x.device:
        check_devices(x.device, "the layer's input", adapter=lora_a)
    bias = layer.lora_B[name].bias * layer.scaling[name] if layer.lora_bias[name] else None
    weight = None
    if y is None:
        weight = base.weight if type(base) is nn.Linear else base.weight.t()
        base_bias = base.bias
        if base_bias is not None:
            bias = base_bias if bias is None else base_bias + bias
    drop = _dropout(layer, name)
    dropout = drop.p if drop.training and type(drop) is nn.Dropout else 0.0
    delta = unchecked(
        x,
        weight,
        lora_a,
        lora_b,
        index,
        bias,
        scale,
        dropout,
        None,
        layer.implementation,
        recompute=layer.recompute,
    )
    return delta if y is None else y + delta.to(y.dtype)
