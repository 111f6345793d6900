"""What a strategy adds to the frozen base weights: a pair for each layer, of low rank at first.

Its unit is the adapter's: the layer computes with W₀ + (α/R) BA. So no strategy needs to know α,
and the scale of what is merged is that of what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fslora.lowrank import product, total
from fslora.protocol import POOLED, Adapters, ClientTask, LoRAWeights, ServerState


def grown(state: ServerState, tasks: Sequence[ClientTask], addition: Adapters) -> ServerState:
    """Add a product to each base weight.

    A pair with more ranks than a matrix of its shape can have is rewritten as that matrix, equal up
    to rounding. A client that took part before receives only the rows that came since, whichever
    way the server keeps them: it adds them to what it has.

    Args:
        state: before.
        tasks: of the round: these clients received the residual as it was.
        addition: module name to what is added, in the adapter's unit.

    Returns:
        The state with the new ``base_residual`` and with how many of the rows that were ever added
        each client has seen; under ``POOLED`` how many there are.
    """
    residual, added = dict(state.base_residual), _added(state)
    everything = dict(added)
    for name, pair in addition.items():
        residual[name] = total([residual[name], pair] if name in residual else [pair])
        everything[name] = everything.get(name, 0) + pair.rank
    seen = {task.client_id: {name: added[name] for name in task.residual} for task in tasks}
    if everything:
        seen[POOLED] = everything
    memory = {
        client: {name: torch.tensor(rows) for name, rows in own.items()}
        for client, own in seen.items()
    }
    return replace(state, base_residual=residual, client_state={**state.client_state, **memory})


def held_bytes(state: ServerState, client_id: str) -> int:
    """Return how many bytes of the residual's factors need not travel to a client.

    It has received some rows before, or what is new to it is sent as a matrix ``[E, D]``, wherever
    that is smaller.
    """
    spared, added = 0, _added(state)
    seen = state.client_state.get(client_id, {})
    for name, pair in state.base_residual.items():
        new = added[name] - int(seen.get(name, 0))
        matrix = pair.lora_a.shape[1] * pair.lora_b[0].nbytes
        spared += pair.size_bytes - min(new * (pair.size_bytes // pair.rank), matrix)
    return spared


def _added(state: ServerState) -> dict[str, int]:
    """How many rows were ever added to each residual; older states know of those it has."""
    known = state.client_state.get(POOLED, {})
    return {n: int(known.get(n, pair.rank)) for n, pair in state.base_residual.items()}


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
