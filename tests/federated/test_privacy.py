import math
from dataclasses import replace
from typing import get_args

import dp_accounting
import pytest
import torch
from dp_accounting.rdp import RdpAccountant

from fslora import checkpoint
from fslora.config import SimulateConfig
from fslora.engines import sequential
from fslora.options import Sampler
from fslora.privacy import epsilon, private
from fslora.protocol import LocalRule, LoRAWeights
from fslora.robust import update_norm
from fslora.server import run_round
from fslora.simulate import simulate
from fslora.strategies import fslora
from fslora.trust import PRIVATE, Privacy

from .hostile import CLIENTS, RANK, honest, small_state
from .worlds import assert_same_bits, tensors_of

NO_CLIP = Privacy(clip=math.inf, noise=0.0, cohort=4, clients=4)


def silent(task):
    """A client that changes nothing."""
    update = honest(task)
    return replace(
        update,
        delta={n: LoRAWeights(*(t * 0 for t in p)) for n, p in update.delta.items()},
        extras={n: t * 0 for n, t in update.extras.items()},
    )


def after_round(state, strategy, client=honest, cohort=CLIENTS):
    return run_round(state, strategy, sequential, client, cohort)[0]


@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.parametrize("server", [("fedavg", 1.0), ("fedadam", 0.1)])
def test_without_noise_and_clipping_it_is_plain_averaging_bit_for_bit(name, server):
    optimizer, lr = server
    strategy, state = small_state(name, server_optimizer=optimizer, server_lr=lr)
    plain = other = state
    for _ in range(3):
        plain = after_round(plain, strategy)
        other = after_round(other, private(strategy, NO_CLIP, optimizer, lr))
    assert_same_bits(plain, other)


def test_the_denominator_is_the_drawn_cohort_however_many_answer():
    strategy, state = small_state(dtype=torch.float64)
    safe = private(strategy, NO_CLIP, "fedavg", 1.0)
    half, whole = (after_round(state, s, cohort=CLIENTS[:2]) for s in (safe, strategy))
    for name, tensor in tensors_of(half).items():
        before = tensors_of(state)[name]
        torch.testing.assert_close(2 * (tensor - before), tensors_of(whole)[name] - before)


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_a_client_moves_the_sum_by_no_more_than_the_bound(clip):
    """Whatever its size, over all modules and heads together."""
    strategy, state = small_state(dtype=torch.float64, ratios=(1.0,) * 4)
    safe = private(strategy, Privacy(clip, 0.0, 4, 4), "fedavg", 1.0)
    ends = [after_round(state, safe, c) for c in (silent, lambda t: one_loud(t, 1e9))]
    (task,) = strategy.assign(state, ["two"])
    assert update_norm(honest(task)) > 0.5
    moved = [4 * (t - tensors_of(ends[0])[n]).flatten() for n, t in tensors_of(ends[1]).items()]
    assert float(torch.cat(moved).norm()) == pytest.approx(clip, rel=1e-9)


def one_loud(task, factor):
    update = silent(task)
    if task.client_id != "two":
        return update
    loud = honest(task)
    return replace(
        update,
        delta={n: LoRAWeights(*(t * factor for t in p)) for n, p in loud.delta.items()},
        extras={n: t * factor for n, t in loud.extras.items()},
    )


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_a_replaced_client_moves_the_sum_by_no_more_than_twice_the_bound(sampler):
    """Of the samplers that are let through: the others' ranks do not depend on who it is."""
    settings = {"model": "m", "data": "d", "dp_clip": 1.0, "dp_noise": 1.0, "sampler": sampler}
    if sampler in ("importance", "balanced"):
        with pytest.raises(ValueError, match=f"--sampler {sampler}"):
            SimulateConfig(**settings)
        return
    SimulateConfig(**settings)
    sums = []
    for replaced in ("before", "zero"):  # both ends of the order that "balanced" goes by
        cohort = [replaced, *CLIENTS]
        _, state = small_state(dtype=torch.float64)
        strategy = fslora(dict.fromkeys(cohort, 1 / 2), LocalRule(), sampler=sampler)
        safe = private(strategy, Privacy(1.0, 0.0, 5, 20), "fedavg", 1.0)
        new = tensors_of(after_round(state, safe, cohort=cohort))
        sums.append(torch.cat([5 * (new[n] - t).flatten() for n, t in tensors_of(state).items()]))
    assert 1 < float((sums[0] - sums[1]).norm()) <= 2 + 1e-9


@pytest.mark.parametrize("name", PRIVATE)
def test_noise_is_gaussian_on_every_trained_coordinate_of_the_sum(name):
    """200 rounds of clients that learn nothing: what is left is the noise alone."""
    strategy, state = small_state(name, dtype=torch.float64)
    privacy = Privacy(clip=0.5, noise=2.0, cohort=4, clients=20)
    safe = private(strategy, privacy, "fedavg", 1.0)
    draws = {n: [] for n in tensors_of(state)}
    for number in range(200):
        begun = replace(state, round=number)
        new = tensors_of(after_round(begun, safe, silent, CLIENTS[:1]))
        for entry, tensor in tensors_of(begun).items():
            draws[entry].append(new[entry] - tensor)
    still = {"ffa-lora": ("lora_a",), "head-only": ("lora_a", "lora_b")}.get(name, ())
    noise = []
    for entry, found in draws.items():
        values = torch.stack(found).flatten(1)
        if entry.endswith(still) and still:
            assert not values.any(), "what nobody trains gets no noise"
        else:
            noise.append(values)
    joined = torch.cat(noise, dim=1)
    deviation = 2.0 * 0.5 / 4  # noise · clip / cohort, although one client took part
    count = joined.numel()
    # Five standard errors each: of the mean, of the deviation, of the kurtosis, by coordinate too.
    assert abs(joined.mean()) < 5 * deviation / count**0.5
    assert float(joined.std()) == pytest.approx(deviation, rel=5 / (2 * count) ** 0.5)
    kurtosis = float(((joined / deviation) ** 4).mean())
    assert kurtosis == pytest.approx(3, abs=5 * (96 / count) ** 0.5)
    own = joined.std(dim=0) / deviation
    assert float((own - 1).abs().max()) < 5 / 400**0.5
    correlation = torch.corrcoef(joined.T[:40]) - torch.eye(len(joined.T[:40]))
    assert float(correlation.abs().max()) < 5 / 200**0.5


def test_noise_is_on_ranks_that_nobody_trained():
    """Noise on the union of the sketches would tell whose they are."""
    strategy, state = small_state(dtype=torch.float64, ratios=(1 / 4,) * 4)
    safe = private(strategy, Privacy(1.0, 1.0, 1, 4), "fedavg", 1.0)
    new = after_round(state, safe, silent, ["one"])
    for name, pair in new.adapters.items():
        for after, before in zip(pair, state.adapters[name], strict=True):
            assert bool((after != before).all())
            assert len(after) == RANK


def test_noise_is_new_in_every_round_and_the_same_on_resume():
    strategy, state = small_state()
    safe = private(strategy, Privacy(1.0, 1.0, 4, 4), "fedavg", 1.0)
    one = after_round(state, safe, silent)
    assert_same_bits(one, after_round(state, safe, silent))
    # A checkpoint sorts the modules.
    backwards = replace(state, adapters=dict(reversed(state.adapters.items())))
    assert_same_bits(one, after_round(backwards, safe, silent))
    two = after_round(one, safe, silent)
    for name in ("adapter first.query lora_a", "extra head.weight"):
        steps = [tensors_of(b)[name] - tensors_of(a)[name] for a, b in ((state, one), (one, two))]
        assert not torch.allclose(*steps)


@pytest.mark.parametrize(
    ("clients", "cohort", "noise"), [(1000, 20, 1.0), (50, 10, 4.0), (8, 8, 3)]
)
def test_epsilon_is_the_accountants(clients, cohort, noise):
    """Fixed-size sampling without replacement, replace-one: the sum's sensitivity is twice C."""
    privacy = Privacy(clip=0.3, noise=noise, cohort=cohort, clients=clients, delta=1e-6)
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    event = dp_accounting.SampledWithoutReplacementDpEvent(
        clients, cohort, dp_accounting.GaussianDpEvent(noise * 0.3 / (2 * 0.3))
    )
    spent = []
    for rounds in range(1, 4):
        accountant.compose(event)
        spent.append(epsilon(privacy, rounds))
        assert spent[-1] == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-12)
    assert 0 < spent[0] < spent[1] < spent[2] < math.inf
    assert epsilon(privacy, 0) == 0.0
    assert epsilon(replace(privacy, noise=0.0), 1) == math.inf


def test_a_round_is_accounted_for_once_however_many_there_are(monkeypatch):
    """It takes a second, and every record of a run has its epsilon."""
    composed = []

    def counted(self, *arguments):
        composed.append(arguments)
        return compose(self, *arguments)

    compose = RdpAccountant.compose
    monkeypatch.setattr(RdpAccountant, "compose", counted)
    privacy = Privacy(clip=0.7, noise=1.7, cohort=3, clients=7)
    assert epsilon(privacy, 1) < epsilon(privacy, 2) < epsilon(privacy, 3)
    assert len(composed) == 1


def test_with_everybody_in_every_round_epsilon_is_near_the_gaussian_mechanisms():
    """Without sampling there is an exact figure to hold Rényi accounting against."""
    privacy = Privacy(clip=1.0, noise=8.0, cohort=5, clients=5, delta=1e-5)
    exact = dp_accounting.get_epsilon_gaussian(4.0 / 3**0.5, 1e-5)  # three rounds at σ / 2C = 4
    assert exact <= epsilon(privacy, 3) <= 1.15 * exact


def test_the_record_has_the_epsilon_so_far_and_a_resumed_run_goes_on(settings, tmp_path):
    config = SimulateConfig(**{**settings, "rounds": 3, "dp_clip": 0.5, "dp_noise": 1.5})
    simulate(config)
    rows = checkpoint.read_records(tmp_path / "run")
    privacy = Privacy(0.5, 1.5, 3, 6)
    assert [row["epsilon"] for row in rows] == [epsilon(privacy, n) for n in range(4)]
    part = replace(config, rounds=1, out=str(tmp_path / "part"))
    simulate(part)
    simulate(replace(part, rounds=3, resume=True))
    states = [checkpoint.load_state(tmp_path / name) for name in ("run", "part")]
    assert_same_bits(*states)
    again = checkpoint.read_records(tmp_path / "part")
    assert [row["epsilon"] for row in again] == [row["epsilon"] for row in rows]


def test_without_privacy_there_is_no_epsilon(settings, tmp_path):
    simulate(SimulateConfig(**{**settings, "rounds": 1}))
    assert checkpoint.read_records(tmp_path / "run")[-1]["epsilon"] is None
