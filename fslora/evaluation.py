"""Judging the global model: whole, under sketches, and for each capacity class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel

import fslora_kernels
from fslora.data.tasks import Evaluation, Examples, Task
from fslora.lowrank import participation_rank, stack
from fslora.models import put_state
from fslora.protocol import ServerState
from fslora.residual import applied
from fslora.sketch import draw_sketches
from fslora_kernels.sampling import sketch_size
from fslora_kernels.seeds import fold_in


def evenly(examples: Examples, groups: Sequence[int], limit: int) -> tuple[Examples, list[int]]:
    """Keep at most ``limit`` examples, evenly spread; 0 keeps all."""
    if not limit or limit >= len(examples):
        return examples, list(groups)
    rows = torch.linspace(0, len(examples) - 1, limit, dtype=torch.float64).round().long()
    kept = Examples({name: tensor[rows] for name, tensor in examples.tensors.items()})
    return kept, [groups[row] for row in rows.tolist()]


def evaluate(
    model: PeftModel, state: ServerState, task: Task, examples: Examples, batch_size: int
) -> Evaluation:
    """Evaluate the whole adapter (Ω = I), on the base weights as the strategy changed them."""
    put_state(model, state.adapters, state.extras)
    with applied(model, state.base_residual):
        return task.evaluate(model, examples, batch_size)


def evaluate_mean(
    model: PeftModel,
    states: Sequence[ServerState],
    task: Task,
    examples: Examples,
    batch_size: int,
) -> Evaluation:
    """Evaluate several models and return their mean loss and metric."""
    found = [evaluate(model, state, task, examples, batch_size) for state in states]
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
            found.append(participation_rank(pair if beside is None else stack([pair, beside])))
    return sum(found) / len(found)


def evaluate_sketched(
    model: PeftModel,
    state: ServerState,
    task: Task,
    examples: Examples,
    batch_size: int,
    ratios: Sequence[float],
) -> float:
    """Estimate the sketched loss, which is what clients of these ratios minimise.

    Each batch sees a fresh sketch and the ratios take turns, so that it costs one pass.

    Source: arXiv 2501.19389, the objective f^S.
    """
    put_state(model, state.adapters, state.extras)
    modules = list(state.adapters)
    rank = state.adapters[modules[0]].rank
    total, count = 0.0, 0
    try:
        for number, start in enumerate(range(0, len(examples), batch_size)):
            key = fold_in(state.key, "evaluation", state.round, number)
            size = sketch_size(rank, ratios[number % len(ratios)])
            sketches = draw_sketches(key, modules, rank, size)
            fslora_kernels.sketch(model, {name: s.index for name, s in sketches.items()})
            rows = slice(start, start + batch_size)
            batch = Examples({name: tensor[rows] for name, tensor in examples.tensors.items()})
            result = task.evaluate(model, batch, batch_size)
            total += result.loss * result.count
            count += result.count
    finally:
        fslora_kernels.sketch(model, None)
    return total / count


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
            losses[f"{ratio:g}"] = evaluate_mean(model, states, task, own, batch_size).loss
    return losses
