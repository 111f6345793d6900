"""What a strategy adds to the frozen base weights, kept as a low-rank pair for each layer.

Its unit is the adapter's: the layer computes with W₀ + (α/R) BA. So no strategy needs to know α,
and the scale of what is merged is that of what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fslora.lowrank import as_matrix, product, stack
from fslora.protocol import Adapters, ClientTask, LoRAWeights, ServerState

_Memory = Mapping[str, Tensor]


def grown(state: ServerState, tasks: Sequence[ClientTask], addition: Adapters) -> ServerState:
    """Add a product to each base weight.

    A pair with more ranks than a matrix of its shape can have is rewritten as that matrix, equal up
    to rounding. Clients then receive it whole again; until then one that took part receives only
    the rows that came since.

    Args:
        state: before.
        tasks: of the round: these clients received the residual as it was.
        addition: module name to what is added, in the adapter's unit.

    Returns:
        The state with the new ``base_residual`` and with what each client has seen of it.
    """
    residual, rewritten = dict(state.base_residual), set()
    for name, pair in addition.items():
        both = [residual[name], pair] if name in residual else [pair]
        if sum(one.rank for one in both) > min(pair.lora_a.shape[1], pair.lora_b.shape[1]):
            residual[name] = as_matrix(both)
            rewritten.add(name)
        else:
            residual[name] = stack(both)
    seen: dict[str, dict[str, Tensor]] = {**state.client_state}
    for task in tasks:
        seen[task.client_id] = {n: torch.tensor(p.rank) for n, p in task.residual.items()}
    seen = {
        client: {name: rows for name, rows in memory.items() if name not in rewritten}
        for client, memory in seen.items()
    }
    return replace(state, base_residual=residual, client_state=seen)


def held_bytes(residual: Adapters, memory: _Memory) -> int:
    """Return how many bytes of the residual's factors need not travel to a client.

    It has received some rows before, or what is new to it is sent as a matrix ``[E, D]``, wherever
    that is smaller.
    """
    spared = 0
    for name, pair in residual.items():
        received = pair.size_bytes // pair.rank * int(memory.get(name, 0))
        matrix = pair.lora_a.shape[1] * pair.lora_b[0].nbytes
        spared += max(received, pair.size_bytes - matrix)
    return spared


@contextmanager
def applied(model: nn.Module, residual: Adapters) -> Iterator[None]:
    """Let a PEFT model's base weights contain the residual; afterwards they have their old bits.

    Args:
        model: a PEFT model whose modules the residual names.
        residual: as ``ServerState.base_residual``.

    Raises:
        ValueError: a base weight is quantised, offloaded or wrapped, so that nothing can be added
            to it without changing it.
    """
    if not residual:
        yield
        return
    kept: dict[str, Tensor] = {}
    weights = {name: _base_weight(name, model.get_submodule(name)) for name in residual}
    try:
        with torch.no_grad():
            for name, pair in residual.items():
                weight_ED, scale = weights[name]
                kept[name] = weight_ED.clone()
                addition_ED = product(LoRAWeights(*(t.to(weight_ED.device) for t in pair)))
                weight_ED.copy_(weight_ED + scale * addition_ED)
        yield
    finally:
        with torch.no_grad():
            for name, before in kept.items():
                weights[name][0].copy_(before)


def _base_weight(name: str, layer: Any) -> tuple[Tensor, float]:  # noqa: ANN401
    """Return a layer's base weight as ``[E, D]``, a view, and its adapter's scaling."""
    base = layer.base_layer
    weight = base.weight
    plain = type(base) in (nn.Linear, Conv1D) and type(weight) is nn.Parameter
    if (
        not plain
        or not weight.is_floating_point()
        or weight.device.type == "meta"
        or hasattr(base, "_hf_hook")
    ):
        raise ValueError(
            f"the base layer of {name} is a {type(base).__name__} with a weight of {weight.dtype} "
            f"on {weight.device}, and this strategy adds to the base weights; load the model "
            "unquantised and whole, or use a strategy that leaves them alone, such as fslora"
        )
    (adapter,) = layer.active_adapters
    return weight if type(base) is nn.Linear else weight.t(), layer.scaling[adapter]
