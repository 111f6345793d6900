"""Ranks drawn by importance: their probabilities are met, and their weights make up for them."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fslora.client import download_bytes, upload_bytes
from fslora.protocol import LocalRule, LoRAWeights
from fslora.sketch import cohort_sketches
from fslora.strategies import fslora
from fslora_kernels.sampling import draw_systematic, inclusion_probabilities

from .test_fslora import masked_global_training
from .worlds import CLIENTS, RANK, linear_update, world

OPTIONS = {"forward": "full", "averaging": "inverse", "sampler": "importance"}
SKETCHED = {"sampler": "importance"}
SGD = LocalRule(optimizer="sgd", lr=0.05, steps=2, batch_size=3)
SIZES = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 40]).double()
MODULES = [f"layer.{n}" for n in range(2000)]


@settings(deadline=None)
@given(
    sizes=st.lists(st.floats(0, 1e6), min_size=2, max_size=20), data=st.data(), key=st.integers(0)
)
def test_probabilities_sum_to_the_size_and_every_draw_has_it(sizes, data, key):
    rank = len(sizes)
    count = data.draw(st.integers(1, rank - 1))
    inclusion = inclusion_probabilities(torch.tensor([sizes]).double(), count)
    assert float(inclusion.sum()) == pytest.approx(count)
    assert inclusion.max() <= 1
    assert inclusion.min() >= count / rank / 2 - 1e-12
    order = torch.tensor(sizes).double().argsort()
    assert all(low <= high + 1e-12 for low, high in pairwise(inclusion[0, order].tolist()))
    (drawn,) = draw_systematic(key % 2**62, ["layer"], inclusion)
    assert len(set(drawn.tolist())) == count
    assert drawn.tolist() == sorted(drawn.tolist())


@pytest.mark.parametrize("count", [1, 3, 6])
def test_ranks_are_drawn_as_often_as_their_probabilities_say(count):
    inclusion = inclusion_probabilities(SIZES.expand(len(MODULES), -1), count)
    held = torch.zeros(len(MODULES), RANK, dtype=torch.float64)
    held.scatter_(1, draw_systematic(3, MODULES, inclusion), 1.0)
    wanted = inclusion[0]
    deviation = (wanted * (1 - wanted) / len(MODULES)).sqrt()
    assert ((held.mean(0) - wanted).abs() <= 5 * deviation).all()
    assert (wanted[7] == 1) == (count > 1), "the largest is certain"
    omega = held / wanted
    assert ((omega.mean(0) - 1).abs() <= 5 * deviation / wanted).all(), "E[Ω] = I"


def test_sketches_carry_the_probabilities_of_their_ranks_by_the_norm_of_each_term():
    a, b = torch.ones(RANK, 4).double(), torch.ones(RANK, 9).double()
    a *= SIZES[:, None]
    b *= torch.arange(RANK, 0, -1).double()[:, None]
    norms = SIZES * torch.arange(RANK, 0, -1) * 6  # sqrt(4) sqrt(9)
    drawn = cohort_sketches(1, 2, {"x": 3, "y": 3, "z": 8}, {"m": LoRAWeights(a, b)}, "importance")
    wanted = inclusion_probabilities(norms[None], 3)[0]
    for client in "xy":
        sketch = drawn[client]["m"]
        torch.testing.assert_close(sketch.probability, wanted[sketch.index])
        torch.testing.assert_close(sketch.inverse_probability, 1 / wanted[sketch.index])
    assert drawn["z"]["m"].index is None


@pytest.mark.parametrize("options", [OPTIONS, SKETCHED], ids=["full", "sketched"])
def test_a_linear_step_is_unbiased_rank_by_rank(options):
    """Each rank on its own moves by the full gradient's step, whatever its probability."""
    adapters = {m: LoRAWeights(SIZES[:, None], torch.ones(RANK, 1).double()) for m in MODULES[:300]}
    strategy = fslora(dict(zip(CLIENTS, (1 / 8, 1 / 4, 1 / 2, 1.0), strict=True)), SGD, **options)
    state = strategy.init(adapters, {}, 5)
    moved = torch.zeros(RANK, dtype=torch.float64)
    for number in range(4):
        tasks = strategy.assign(replace(state, round=number), CLIENTS)
        updates = [linear_update(task, -1.0) for task in tasks]
        new = strategy.aggregate(replace(state, round=number), tasks, updates)
        for name, pair in new.adapters.items():
            moved += (pair.lora_a - adapters[name].lora_a)[:, 0] / len(adapters) / 4
    torch.testing.assert_close(moved, torch.ones(RANK).double(), rtol=0, atol=0.15)


def test_a_sketched_client_computes_with_each_rank_over_its_probability(tiny_llama):
    """Against vanilla PEFT with forward W0 + s B Ω A, Ω = diag(1/π) on the sketch."""
    ratios = (1 / 8, 1 / 4, 1 / 2, 1.0)
    _, strategy, state, client = world(tiny_llama, ratios, SGD, **SKETCHED)
    for task in strategy.assign(state, CLIENTS):
        update = client(task)
        trained = masked_global_training(tiny_llama, state, task)
        for name, (a, b) in trained.items():
            sketch = task.sketches[name]
            rows = slice(None) if sketch.index is None else sketch.index
            if sketch.index is not None:
                assert len(task.rank_scales[name].unique()) == sketch.size, "each has its own"
            old_a, old_b = state.adapters[name]
            torch.testing.assert_close(update.delta[name].lora_a, (a - old_a)[rows])
            torch.testing.assert_close(update.delta[name].lora_b, (b.t() - old_b)[rows])


def test_the_sketched_client_is_sent_its_weights(tiny_llama):
    ratios = (1 / 8, 1 / 4, 1 / 2, 1.0)
    _, strategy, state, client = world(tiny_llama, ratios, SGD, **SKETCHED)
    for task, ratio in zip(strategy.assign(state, CLIENTS), ratios, strict=True):
        size = round(RANK * ratio)
        features = sum(p.lora_a.shape[1] + p.lora_b.shape[1] for p in state.adapters.values())
        weights = size * len(state.adapters) if ratio < 1 else 0
        assert download_bytes(task)[0] == (size * features + weights) * 8
        assert upload_bytes(task)[0] == size * features * 8
        scales = save(task.rank_scales)
        assert len(scales) - 8 - int.from_bytes(scales[:8], "little") == weights * 8
        assert client(task).delta.keys() == task.adapters.keys()


def test_it_trains_and_is_charged_as_the_full_forward(tiny_llama):
    _, strategy, state, client = world(tiny_llama, (1 / 8, 1 / 4, 1 / 2, 1.0), SGD, **OPTIONS)
    _, plain, _, _ = world(
        tiny_llama, (1 / 8, 1 / 4, 1 / 2, 1.0), SGD, forward="full", averaging="inverse"
    )
    tasks, others = strategy.assign(state, CLIENTS), plain.assign(state, CLIENTS)
    assert [download_bytes(t) for t in tasks] == [download_bytes(t) for t in others]
    assert [upload_bytes(t) for t in tasks] == [upload_bytes(t) for t in others]
    updates = [client(task) for task in tasks]
    new = strategy.aggregate(state, tasks, updates)
    for name, pair in state.adapters.items():
        expected = pair.lora_a.clone()
        for task, update in zip(tasks, updates, strict=True):
            sketch = task.sketches[name]
            if sketch.index is None:
                expected += update.delta[name].lora_a / 4
            else:
                own = update.delta[name].lora_a / sketch.probability[:, None]
                expected[sketch.index] += own / 4
        torch.testing.assert_close(new.adapters[name].lora_a, expected)


def test_any_two_ranks_can_be_drawn_together():
    """Even ranks at fixed places would never be: their order is random, and the set uniform."""
    inclusion = inclusion_probabilities(torch.zeros(len(MODULES), RANK).double(), 2)
    drawn = draw_systematic(8, MODULES, inclusion)
    counts = (2**drawn).sum(dim=1).bincount(minlength=2**RANK)
    counts = counts[counts > 0].double()
    assert len(counts) == 28
    chi_square = ((counts - len(MODULES) / 28) ** 2 / (len(MODULES) / 28)).sum()
    assert chi_square < 55.5, "99.9% quantile at 27 degrees of freedom"
