"""Averages of many clients of a linear loss, by the project's own assign and aggregate."""

import pytest
import torch

from fslora.options import expected_step
from fslora.protocol import ClientUpdate, LocalRule, LoRAWeights
from fslora.strategies import fslora

from .enumeration import normal

RANK, CLIENTS = 8, "abcd"
MODULES = [f"layer {n}" for n in range(500)]
SGD = LocalRule(optimizer="sgd", lr=1.0, steps=1)
GRADIENTS = normal(1, len(CLIENTS), RANK) + 0.7


def moments(ratios=(1 / 4,) * 4, pairs=None, noise=0.0, **options):
    """Mean and variance of each rank's averaged step, [R] each, over modules, and their errors."""
    strategy = fslora(dict(zip(CLIENTS, ratios, strict=True)), SGD, **options)
    pair = LoRAWeights(torch.zeros(RANK, 1).double(), torch.ones(RANK, 1).double())
    state = strategy.init(dict.fromkeys(MODULES, pairs or pair), {}, 7)
    tasks, updates = strategy.assign(state, list(CLIENTS)), []
    drawn = noise * normal(2, len(CLIENTS), len(MODULES), RANK)
    for task, gradient, errors in zip(tasks, GRADIENTS, drawn, strict=True):
        delta = {}
        for (name, given), error in zip(task.adapters.items(), errors, strict=True):
            index = task.sketches[name].index
            own = gradient + error if index is None else (gradient + error)[index]
            delta[name] = LoRAWeights(own[:, None] * task.scale, torch.zeros_like(given.lora_b))
        updates.append(
            ClientUpdate(task.round, task.client_id, task.nonce, delta, {}, 1, {"loss": 0.0})
        )
    new = strategy.aggregate(state, tasks, updates)
    steps = torch.stack([new.adapters[n].lora_a - state.adapters[n].lora_a for n in MODULES])[
        ..., 0
    ]
    return steps.mean(0), steps.var(0), steps.std(0) / len(steps) ** 0.5


MEAN = GRADIENTS.mean(0)
SQUARE = GRADIENTS.square().mean(0)


@pytest.mark.parametrize("ratios", [(1 / 4,) * 4, (1 / 8, 1 / 4, 1 / 2, 1 / 2)])
def test_independent_sketches_vary_by_the_inverse_ratios_over_the_number_of_clients(ratios):
    mean, variance, error = moments(ratios)
    excess = 1 / torch.tensor(ratios).double() - 1
    wanted = (excess[:, None] * GRADIENTS.square()).sum(0) / len(ratios) ** 2
    assert ((mean - MEAN).abs() <= 4.5 * error).all()
    assert float(variance.sum() / wanted.sum()) == pytest.approx(1, abs=0.08)


def test_the_noise_of_the_data_is_raised_by_the_inverse_ratio():
    """A stochastic gradient of variance σ² a rank: Σ (R/S − 1) g² + (R/S) σ², over N²."""
    ratios, sigma = (1 / 8, 1 / 4, 1 / 2, 1 / 2), 2.0
    mean, variance, error = moments(ratios, noise=sigma)
    assert ((mean - MEAN).abs() <= 4.5 * error).all()
    inverse = 1 / torch.tensor(ratios).double()[:, None]
    wanted = ((inverse - 1) * GRADIENTS.square() + inverse * sigma**2).sum(0) / len(ratios) ** 2
    assert float(variance.sum() / wanted.sum()) == pytest.approx(1, abs=0.08)


def test_one_sketch_for_all_keeps_the_variance_of_what_clients_agree_on():
    mean, variance, error = moments(sampler="nested")
    assert ((mean - MEAN).abs() <= 4.5 * error).all()
    assert float(variance.sum() / (3 * MEAN.square()).sum()) == pytest.approx(1, abs=0.08)


def test_balanced_sketches_vary_by_what_clients_disagree_on():
    mean, variance, error = moments(sampler="balanced")
    assert ((mean - MEAN).abs() <= 4.5 * error).all()
    wanted = 3 / len(CLIENTS) * GRADIENTS.var(0).sum()
    assert float(variance.sum() / wanted) == pytest.approx(1, abs=0.08)
    alpha = float(MEAN.square().sum() / SQUARE.sum())
    independent = 3 / len(CLIENTS) * SQUARE.sum()
    assert float(wanted / independent) == pytest.approx((1 - alpha) * 4 / 3)


def test_the_full_forward_moves_by_the_mean_ratio_and_by_inverse_probability_without_bias():
    ratios = (1 / 8, 1 / 4, 1 / 2, 1.0)
    share = torch.tensor(ratios).double()
    mean, _, error = moments(ratios, forward="full")
    assert ((mean - (share[:, None] * GRADIENTS).mean(0)).abs() <= 4.5 * error + 1e-12).all()
    mean, variance, error = moments(ratios, forward="full", averaging="inverse")
    assert ((mean - MEAN).abs() <= 4.5 * error).all()
    wanted = ((1 / share - 1)[:, None] * GRADIENTS.square()).sum(0) / 16
    assert float(variance.sum() / wanted.sum()) == pytest.approx(1, abs=0.08)
    assert expected_step(ratios, 4, "full", "participants") == pytest.approx(share.mean())


def test_importance_sketches_are_unbiased_and_vary_by_their_inverse_probabilities():
    sizes = torch.tensor([1.0, 1, 2, 3, 5, 8, 13, 21]).double()
    pair = LoRAWeights(torch.zeros(RANK, 1).double(), sizes[:, None])
    pair = LoRAWeights(torch.ones(RANK, 1).double(), pair.lora_b)
    options = {"forward": "full", "averaging": "inverse", "sampler": "importance"}
    mean, variance, error = moments(pairs=pair, **options)
    assert ((mean - MEAN).abs() <= 4.5 * error + 1e-12).all()
    chance = (0.5 / RANK + 0.5 * sizes / sizes.sum()) * 2
    assert chance.max() < 1
    wanted = (1 / chance - 1) * SQUARE / len(CLIENTS)
    assert ((variance / wanted - 1).abs() < 0.35).all()
    assert float(variance.sum() / wanted.sum()) == pytest.approx(1, abs=0.1)
