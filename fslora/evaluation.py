"""Judging the global model: whole, under sketches, and for each capacity class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor

import fslora_kernels
from fslora.data.tasks import Evaluation, Examples, Task
from fslora.lowrank import participation_rank, total
from fslora.models import put_state
from fslora.protocol import ServerState
from fslora.residual import applied
from fslora.sketch import draw_sketches
from fslora_kernels.sampling import sketch_size
from fslora_kernels.seeds import fold_in, uniform


def evenly(examples: Examples, groups: Sequence[int], limit: int) -> tuple[Examples, list[int]]:
    """Keep at most ``limit`` examples, evenly spread; 0 keeps all."""
    if not limit or limit >= len(examples):
        return examples, list(groups)
    rows = torch.linspace(0, len(examples) - 1, limit, dtype=torch.float64).round().long()
    kept = Examples({name: tensor[rows] for name, tensor in examples.tensors.items()})
    return kept, [groups[row] for row in rows.tolist()]


def evaluate(
    model: PeftModel,
    state: ServerState,
    task: Task,
    examples: Examples,
    batch_size: int,
    *,
    scored: bool = True,
) -> Evaluation:
    """Evaluate the whole adapter (Ω = I), on the base weights as the strategy changed them."""
    put_state(model, state.adapters, state.extras)
    with applied(model, state.base_residual):
        return task.evaluate(model, examples, batch_size, scored=scored)


def evaluate_mean(
    model: PeftModel,
    states: Sequence[ServerState],
    task: Task,
    examples: Examples,
    batch_size: int,
    *,
    scored: bool = True,
) -> Evaluation:
    """Evaluate several models and return their mean loss and metric."""
    found = [evaluate(model, state, task, examples, batch_size, scored=scored) for state in states]
    metrics = [each.metric for each in found if each.metric is not None]
    return Evaluation(
        loss=sum(each.loss for each in found) / len(found),
        metric=sum(metrics) / len(metrics) if metrics else None,
        count=found[0].count,
    )


def effective_rank(states: Sequence[ServerState]) -> float:
    """Return the participation rank of BA (with what is beside it), mean over modules and states.

    FSLoRA's objective punishes ranks that are not redundant, and so lowers it.
    """
    found = []
    for state in states:
        for name, pair in state.adapters.items():
            beside = state.base_residual.get(name)
            found.append(participation_rank(pair if beside is None else total([pair, beside])))
    return sum(found) / len(found)


def evaluate_sketched(
    model: PeftModel,
    state: ServerState,
    task: Task,
    examples: Examples,
    batch_size: int,
    clients: Sequence[float],
) -> float:
    """Estimate the sketched loss, which is what clients of these ratios minimise.

    Each ratio is judged on examples of its own: as large a share of all as it has of the clients,
    evenly spread and another one in each round, a fresh sketch for each batch. The mean over the
    clients of their ratio's loss is returned, so that all costs one pass.

    Args:
        model: the fused model.
        state: what to evaluate.
        task: the loss.
        examples: the evaluation.
        batch_size: examples at a time.
        clients: the sketch ratio of every client.

    Source: arXiv 2501.19389, the objective f^S.
    """
    put_state(model, state.adapters, state.extras)
    modules = list(state.adapters)
    rank = state.adapters[modules[0]].rank
    key = fold_in(state.key, "evaluation", state.round)
    weighted, weights = 0.0, 0
    try:
        for ratio, rows in dealt(len(examples), clients, key).items():
            size, total, count = sketch_size(rank, ratio), 0.0, 0
            for number, start in enumerate(range(0, len(rows), batch_size)):
                own = rows[start : start + batch_size]
                drawn = draw_sketches(fold_in(key, f"{ratio:g}", number), modules, rank, size)
                fslora_kernels.sketch(model, {name: s.index for name, s in drawn.items()})
                batch = Examples({name: tensor[own] for name, tensor in examples.tensors.items()})
                result = task.evaluate(model, batch, batch_size, scored=False)
                total += result.loss * result.count
                count += result.count
            weight = clients.count(ratio)
            weighted += weight * total / count
            weights += weight
    finally:
        fslora_kernels.sketch(model, None)
    return weighted / weights


def dealt(count: int, clients: Sequence[float], key: int) -> dict[float, Tensor]:
    """Deal examples to ratios, each as many as its share of the clients, evenly spread.

    Multiples of the golden ratio, modulo 1, are spread evenly, and so are those of any run of
    them: each client's neighbouring examples meet every ratio in its share.

    Args:
        count: how many examples.
        clients: the ratio of every client.
        key: of where the multiples begin.

    Returns:
        Ratio to its examples, ascending; a ratio of too small a share for one is left out.
    """
    places = torch.arange(count, dtype=torch.float64)
    order = ((places * (5**0.5 - 1) / 2 + uniform(key, "start")) % 1).argsort()
    owners = torch.tensor(sorted(clients), dtype=torch.float64)
    ratios = torch.empty(count, dtype=torch.float64)
    ratios[order] = owners[((places + 0.5) * len(clients) / count).long()]
    return {
        ratio: rows
        for ratio in sorted(set(clients))
        if len(rows := (ratios == ratio).nonzero().flatten())
    }


def evaluate_by_ratio(
    model: PeftModel,
    states: Sequence[ServerState],
    task: Task,
    examples: Examples,
    groups: Sequence[int],
    batch_size: int,
    ratio_of: Mapping[int, float],
) -> dict[str, float]:
    """Evaluate the whole adapter on the held-out text of each class's clients.

    Args:
        model: the fused model.
        states: what to evaluate; the mean over several.
        task: the loss.
        examples: the evaluation.
        groups: for each example its client's position, or -1.
        batch_size: examples at a time.
        ratio_of: client position to sketch ratio.

    Returns:
        Ratio (as ``f"{ratio:g}"``) to loss; classes without held-out text are left out.
    """
    owners = torch.tensor([ratio_of.get(group, 0.0) for group in groups], dtype=torch.float64)
    losses = {}
    for ratio in sorted(set(ratio_of.values())):
        rows = (owners == ratio).nonzero().flatten()
        if len(rows):
            own = Examples({name: tensor[rows] for name, tensor in examples.tensors.items()})
            found = evaluate_mean(model, states, task, own, batch_size, scored=False)
            losses[f"{ratio:g}"] = found.loss
    return losses
