"""FSLoRA's options: the full forward, averaging, samplers, and how long a step each takes."""

import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fslora.client import download_bytes, upload_bytes
from fslora.clock import step_counter
from fslora.config import SimulateConfig
from fslora.options import expected_step
from fslora.protocol import LocalRule, LoRAWeights
from fslora.sketch import cohort_sketches
from fslora.strategies import fed_plora, fslora

from .worlds import CLIENTS, RANK, assert_same_bits, examples, linear_update, world

RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)
SGD = LocalRule(optimizer="sgd", lr=0.05, steps=2, batch_size=3)
SAMPLERS = ("uniform", "balanced", "nested", "class-shared")

# Ten clients of the classes 1/8, 1/4, 1/2, all of them in every round.
TEN = dict(zip("abcdefghij", [1 / 8] * 3 + [1 / 4] * 3 + [1 / 2] * 4, strict=True))
FACTORS = {
    ("sketched", "participants"): 1.0,
    ("sketched", "count"): 3.06,
    ("sketched", "inverse"): 4.4,
    ("full", "participants"): 0.3125,
    ("full", "count"): 0.982,
    ("full", "inverse"): 1.0,
}
ALLOWED = [pair for pair in FACTORS if pair != ("sketched", "inverse")]


def built(ratios, local=SGD, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fslora(ratios, local, **options)


# --- the full forward


def test_full_by_count_is_fed_plora_bit_for_bit(tiny_llama):
    options = {"forward": "full", "averaging": "count"}
    _, ours, state, client = world(tiny_llama, RATIOS, SGD, head=True, **options)
    _, theirs, other, _ = world(tiny_llama, RATIOS, SGD, fed_plora, head=True)
    for _ in range(2):
        tasks = ours.assign(state, CLIENTS)
        state = ours.aggregate(state, tasks, [client(task) for task in tasks])
        tasks = theirs.assign(other, CLIENTS)
        other = theirs.aggregate(other, tasks, [client(task) for task in tasks])
    assert_same_bits(state, other)


def test_full_is_charged_for_what_it_downloads_and_computes(tiny_llama):
    _, sketched, state, client = world(tiny_llama, RATIOS, SGD)
    _, full, _, _ = world(tiny_llama, RATIOS, SGD, forward="full")
    flops = step_counter(client, examples("one"))
    whole = sum(p.lora_a.nbytes + p.lora_b.nbytes for p in state.adapters.values())
    small, large = (strategy.assign(state, CLIENTS) for strategy in (sketched, full))
    for one, other, ratio in zip(small, large, RATIOS, strict=True):
        assert download_bytes(one)[0] == whole * ratio
        assert download_bytes(other)[0] == whole
        assert upload_bytes(other) == upload_bytes(one)
        assert flops(other) == flops(small[-1]), "as at S = R"
        assert (flops(one) < flops(other)) == (ratio < 1)


# --- averaging


def test_inverse_weighs_each_change_by_what_its_rank_was_drawn_with(tiny_llama):
    options = {"forward": "full", "averaging": "inverse"}
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, head=True, **options)
    tasks = strategy.assign(state, CLIENTS)
    updates = [client(task) for task in tasks]
    new = strategy.aggregate(state, tasks, updates)
    for name, pair in state.adapters.items():
        expected = pair.lora_b.clone()
        for task, update, ratio in zip(tasks, updates, RATIOS, strict=True):
            index = task.sketches[name].index
            rows = slice(None) if index is None else index
            expected[rows] += update.delta[name].lora_b / ratio / 4
        torch.testing.assert_close(new.adapters[name].lora_b, expected)
    for name, head in state.extras.items():
        change = sum(update.extras[name] for update in updates) / 4
        torch.testing.assert_close(new.extras[name], head + change)


@pytest.mark.parametrize(("pair", "factor"), FACTORS.items())
def test_the_factors_of_one_eighth_one_quarter_and_one_half(pair, factor):
    assert expected_step([*TEN.values()], 10, *pair) == pytest.approx(factor, rel=2e-3)


def measured(ratios, per_round, rounds=80, modules=15, **options):
    """Mean movement of A over that of the full gradient, of one linear step by assign/aggregate.

    B is all ones and the loss is the sum of the layer's BA, so that A's gradient is the scale.
    """
    lr, generator = 0.1, torch.Generator().manual_seed(4)
    strategy = built(ratios, per_round=per_round, **options)
    pairs = [LoRAWeights(torch.zeros(RANK, 1), torch.ones(RANK, 1)) for _ in range(modules)]
    state = strategy.init({f"layer {n}": pair for n, pair in enumerate(pairs)}, {}, 3)
    moved = 0.0
    for number in range(rounds):
        order = torch.randperm(len(ratios), generator=generator)[:per_round].tolist()
        cohort = [list(ratios)[place] for place in sorted(order)]
        tasks = strategy.assign(replace(state, round=number), cohort)
        updates = [linear_update(task, lr) for task in tasks]
        new = strategy.aggregate(replace(state, round=number), tasks, updates)
        moved += sum(float(pair.lora_a.mean()) for pair in new.adapters.values()) / modules
    return moved / rounds / -lr


@pytest.mark.parametrize(
    ("forward", "averaging", "sampler"),
    [
        *((forward, "count", sampler) for forward in ("sketched", "full") for sampler in SAMPLERS),
        ("sketched", "participants", "uniform"),
        ("full", "participants", "uniform"),
        ("full", "inverse", "balanced"),
    ],
)
def test_a_monte_carlo_linear_step_moves_by_the_factor(forward, averaging, sampler):
    """Six clients drawn of ten: the cohort's classes change from round to round."""
    options = {"forward": forward, "averaging": averaging, "sampler": sampler}
    exact = expected_step([*TEN.values()], 6, **options)
    found = measured(TEN, 6, **options)
    assert found == pytest.approx(exact, rel=0.05)


def test_a_single_client_and_equal_ratios_have_their_closed_forms():
    assert expected_step([0.25], 1, "sketched", "count") == pytest.approx(1.0)
    assert expected_step([0.25], 1, "full", "count") == pytest.approx(0.25)
    found = expected_step([0.25] * 7, 3, "full", "count")
    assert found == pytest.approx(1 - 0.75**3)
    assert expected_step([0.25] * 7, 3, "sketched", "count") == pytest.approx(4 * (1 - 0.75**3))
    assert expected_step([1.0] * 5, 3, "sketched", "count") == pytest.approx(1.0)
    different = [n / 16 for n in range(1, 17)]  # classes of one client each
    alone, shared = (
        expected_step(different, 16, "sketched", "count", s) for s in ("uniform", "class-shared")
    )
    assert shared == pytest.approx(alone), "who shares with nobody draws independently"
    for sampler, joint in (("nested", 0.25), ("class-shared", 0.25), ("balanced", 0.75)):
        assert expected_step([0.25] * 7, 3, "full", "count", sampler) == pytest.approx(joint)


def test_what_does_not_go_together_is_refused_and_what_is_longer_warns():
    with pytest.raises(ValueError, match=r"already multiplies by R/S.*--forward full"):
        fslora(TEN, SGD, averaging="inverse")
    with pytest.warns(UserWarning, match=r"3\.06 times as far") as found:
        fslora(TEN, SGD, averaging="count", per_round=10)
    assert len(found) == 1
    with pytest.warns(UserWarning, match=" moves a rank 1 times as far"):
        fslora(TEN, SGD, averaging="count", per_round=1)


def test_settings_refuse_what_cannot_be_before_anything_is_loaded():
    common = {"model": "m", "data": "d"}
    with pytest.raises(ValueError, match="--averaging inverse"):
        SimulateConfig(**common, averaging="inverse")
    for forward, averaging in (("full", "count"), ("full", "participants"), ("sketched", "count")):
        with pytest.raises(ValueError, match="or in the mean, --forward full --averaging inverse"):
            SimulateConfig(**common, forward=forward, averaging=averaging, sampler="importance")
    for option in (
        *({"forward": "full"}, {"averaging": "count"}, {"sampler": "nested"}),
        *({"redraw": "step"}, {"depth": "top:1"}, {"depth_min_probability": 0.2}),
    ):
        with pytest.raises(ValueError, match=r"does nothing without --.* fslora.*leave it out"):
            SimulateConfig(**common, strategy="hetlora", **option)


# --- samplers

MODULES = [f"layer.{n}" for n in range(1000)]
SIZES = {"d": 4, "a": 1, "c": 2, "b": 2, "e": 8}


def masks(sampler, round_number=1, modules=MODULES, sizes=SIZES):
    """Client to [modules, R]: what it holds."""
    adapters = dict.fromkeys(modules, LoRAWeights(torch.zeros(RANK, 1), torch.ones(RANK, 1)))
    drawn = cohort_sketches(5, round_number, sizes, adapters, sampler)
    held = {}
    for client, sketches in drawn.items():
        held[client] = torch.zeros(len(modules), RANK, dtype=torch.float64)
        for row, sketch in zip(held[client], sketches.values(), strict=True):
            row[slice(None) if sketch.index is None else sketch.index] = 1
    return held


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_clients_expectation_of_omega_is_the_identity(sampler):
    for client, held in masks(sampler).items():
        size = SIZES[client]
        assert held.sum(dim=1).eq(size).all()
        omega = held * RANK / size
        deviation = ((RANK / size - 1) / len(MODULES)) ** 0.5
        assert ((omega.mean(0) - 1).abs() <= 5 * deviation).all()
        moments = (omega.t() @ omega / len(MODULES))[~torch.eye(RANK, dtype=torch.bool)]
        expected = RANK * (size - 1) / (size * (RANK - 1))
        assert ((moments - expected).abs() < 0.4).all(), "pairs as of a uniform set"


def test_balanced_covers_all_ranks_equally_often():
    """9 ranks' worth of clients over 8 ranks: every rank once or twice; 16: each exactly twice."""
    few = {client: SIZES[client] for client in "abcd"}
    for sizes, counts in ((few, {1.0, 2.0}), ({**few, "e": 7}, {2.0})):
        total = sum(masks("balanced", sizes=sizes).values())
        assert set(total.unique().tolist()) == counts
    uniform = sum(masks("uniform", sizes=few).values())
    assert uniform.eq(0).any()


def test_balanced_does_not_depend_on_the_order_of_the_cohort():
    one, other = masks("balanced"), masks("balanced", sizes=dict(reversed(SIZES.items())))
    assert all(torch.equal(one[client], other[client]) for client in SIZES)


def test_nested_smaller_sketches_are_in_larger_ones():
    held = masks("nested")
    for small, large in ("ab", "bc", "cd", "de"):
        assert (held[small] <= held[large]).all()


def test_class_shared_is_one_set_a_ratio_and_round():
    held = masks("class-shared")
    assert torch.equal(held["b"], held["c"])
    together = (held["a"] * held["b"]).sum(1).mean()
    assert together == pytest.approx(2 / RANK, abs=0.05), "classes are independent"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rounds_and_modules_draw_anew(sampler):
    one, two = (masks(sampler, number)["b"] for number in (1, 2))
    same = Counter((one == two).all(dim=1).tolist())[True] / len(MODULES)
    assert same == pytest.approx(1 / 28, abs=0.02), "as often as chance has it: 1 in C(8, 2)"
    assert len(one.unique(dim=0)) == 28


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_trains_and_sends_what_it_says(tiny_llama, sampler):
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, sampler=sampler)
    tasks = strategy.assign(state, CLIENTS)
    assert [task.client_id for task in tasks] == CLIENTS
    updates = [client(task) for task in tasks]
    new = strategy.aggregate(state, tasks, updates)
    whole = sum(p.lora_a.nbytes + p.lora_b.nbytes for p in state.adapters.values())
    assert [upload_bytes(t)[0] for t in tasks] == [whole * ratio for ratio in RATIOS]
    assert all(not torch.equal(new.adapters[n].lora_a, p.lora_a) for n, p in state.adapters.items())
