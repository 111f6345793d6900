"""The toy's client against ``LocalTrainer`` on a fused layer, and the verdicts' rules."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fslora_kernels
from benchmarks.theory.closed_forms import sketched_objective
from benchmarks.theory.rounds import best, to_loss
from benchmarks.theory.steps import largest_stable
from benchmarks.theory.toy import INPUTS, MODULE, RANK, target_of, toy
from benchmarks.theory.verdicts import Interval, exponent, inside, mean_of, ratio_of, worst
from benchmarks.theory.worlds import losses
from fslora.client import LocalTrainer
from fslora.data.tasks import Examples
from fslora.protocol import LoRAWeights


@dataclass(frozen=True)
class Squared:
    """½‖W − W*‖² of a layer without a base, read off its answer to the identity."""

    target: torch.Tensor

    def loss(self, model, batch):
        answer = model(torch.eye(INPUTS, dtype=torch.float64))
        return 0.5 * (answer.t() - self.target).square().sum()


@pytest.mark.parametrize("method", ["fslora", "fslora/full/participants", "ffa-lora"])
def test_the_toys_client_is_local_trainer(method):
    world = toy(3, clients=2, steps=4)
    model = nn.Sequential(nn.Linear(INPUTS, INPUTS, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    ).double()
    model.requires_grad_(requires_grad=False)
    fslora_kernels.fuse(model)
    (name,) = fslora_kernels.modules(model)
    a = world.first.adapters[MODULE].lora_a
    b = torch.randn(RANK, INPUTS, generator=torch.Generator().manual_seed(2)).double() * 0.1
    state = replace(world.first, adapters={MODULE: LoRAWeights(a, b)})
    strategy = world.strategy((1 / 4,), replace(world.rule, lr=0.05), method)
    ones = torch.ones(1, 1, dtype=torch.int64)
    examples = Examples({"input_ids": ones, "attention_mask": ones})
    for task in strategy.assign(state, world.clients):
        there = replace(
            task,
            adapters={name: task.adapters[MODULE]},
            frozen=dict.fromkeys([name][: len(task.frozen)], task.frozen.get(MODULE)),
        )
        squared = Squared(world.client.targets[task.client_id])
        theirs = LocalTrainer(model, squared, {task.client_id: examples})(there).delta[name]
        ours = world.client(task).delta[MODULE]
        for one, other in zip(ours, theirs, strict=True):
            if len(other):  # a factor that is not trained does not travel
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert theirs.lora_b.abs().max() > 1e-3


def test_rounds_of_the_toy_go_down_to_the_target():
    world = toy(0, clients=3)
    strategy = world.strategy((1.0,), replace(world.rule, lr=0.3))
    *_, (state, loss) = losses(world, strategy, 30)
    assert world.loss(world.first) == pytest.approx(1)
    assert loss < 1e-2
    pair = state.adapters[MODULE]
    whole = sketched_objective(*pair, target_of(0), 0.0) * 2 / target_of(0).square().sum()
    assert loss == pytest.approx(float(whole))


def test_a_run_that_diverges_ends_with_an_infinite_loss():
    world = toy(0, clients=2)
    found = list(losses(world, world.strategy((1 / 8,), replace(world.rule, lr=30.0)), 50))
    assert found[-1][1] == math.inf
    assert len(found) < 50


def test_smaller_sketches_need_smaller_steps_and_more_rounds():
    world = toy(0, clients=2)
    full, small = (largest_stable(world, (r,), 2**-8, 4, 5, 12) for r in (1.0, 1 / 8))
    assert 4 < full / small < 64
    counts = [best(world, (r,), to_loss(0.6), (0.3, 0.1, 0.03), 60)[0] for r in (1.0, 1 / 8)]
    assert counts[0] < counts[1]
    assert best(world, (1.0,), to_loss(1e-9), (0.01,), 2) is None


def test_the_rules():
    assert inside(Interval(1, 0.9, 1.1), 0.8, 1.2) == "confirmed"
    assert inside(Interval(1, 0.7, 1.1), 0.8, 1.2) == "undecided"
    assert inside(Interval(2, 1.9, 2.1), 0.8, 1.2) == "refuted"
    assert inside(Interval(0, -1, 0.5), 0.8, 1.2) == "refuted"
    assert worst(["confirmed", "undecided"]) == "undecided"
    assert worst(["undecided", "refuted", "confirmed"]) == "refuted"
    assert worst(["confirmed"]) == "confirmed"


def test_estimates():
    found = exponent([1, 2, 4, 8], [3, 12, 48, 192])
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2, 2))
    noisy = exponent([1, 2, 4, 8], [3, 14, 40, 200])
    assert noisy.low < 1.9 < 2 < noisy.high
    assert mean_of([2.0]).high == math.inf
    assert mean_of([1.0, 2, 3]).low == pytest.approx(2 - 4.30265 / 3**0.5, abs=1e-4)
    assert ratio_of([2, 8], [1, 2]).mean == pytest.approx(8**0.5)
