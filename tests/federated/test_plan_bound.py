"""The fitted effort: constants that are put in come out, and a dependence that is none is none."""

from dataclasses import replace

import numpy as np
import pytest

from fslora.plan.bound import Curve, Effort, fit

TARGET, START, RANK = 3.0, 5.0, 16
ONE = np.ones(1)


def curve(effort, ratios, noise=0.0, rounds=200):
    """A run that learns like t^-0.7, in rounds over effort, whole rounds being evaluated."""
    ratios = np.array(ratios)
    shares = np.full(len(ratios), 1 / len(ratios))
    times = np.arange(rounds) / effort(ratios, shares)
    values = 2 + (START - 2) * (1 + times) ** -0.7
    wobble = np.random.default_rng(len(ratios) * 7 + int(ratios[0] * 16)).standard_normal(rounds)
    values[1:] += noise * wobble[1:]
    return Curve(ratios, shares, values)


def curves(effort, noise=0.0):
    return [curve(effort, r, noise) for r in ([1 / 8], [1 / 4], [1.0], [1 / 8, 1.0])]


@pytest.mark.parametrize("effort", [Effort(0.8, 1.0), Effort(0.8, -1.0), Effort(0.3, -2.0)])
def test_constants_that_are_put_in_come_out(effort):
    found = fit(curves(effort), TARGET, RANK, 0)
    assert found.best.inverse == pytest.approx(effort.inverse, rel=0.1)
    assert found.best.mixing == pytest.approx(effort.mixing, abs=0.15)
    mix = np.array([1 / 4, 1 / 2, 1.0]), np.array([0.5, 0.25, 0.25])
    truth = curve(effort, [1.0]).rounds_to(np.array([START, TARGET]))[-1] * effort(*mix)
    assert found.rounds(*mix) == pytest.approx(truth, rel=0.05)
    assert found.deviation < 0.05


@pytest.mark.parametrize("inverse", [0.0, -0.04])
def test_no_dependence_and_the_contrary_are_found_too(inverse):
    found = fit(curves(Effort(inverse, 1.0), noise=0.02), TARGET, RANK, 0)
    slow, low, high = found.slowdown(1 / 8)
    assert low <= slow <= high
    assert slow == pytest.approx(1 + 7 * inverse, abs=0.1)
    assert (high < 1) is (inverse < 0)


def test_noise_widens_the_interval():
    mix = np.array([1 / 8, 1.0]), np.array([0.5, 0.5])
    widths = []
    for noise in (0.0, 0.05):
        found = fit(curves(Effort(0.8, -1.0), noise), TARGET, RANK, 0)
        low, high = found.interval(*mix)
        assert low <= high
        widths.append(high / low)
    assert widths[1] > widths[0]


def test_the_power_mean_is_smooth_through_zero():
    mix = np.array([1 / 8, 1.0]), np.array([0.5, 0.5])
    near = [Effort(1.0, q)(*mix) for q in (-2e-4, -5e-5, 0.0, 5e-5, 2e-4)]
    assert near[2] == pytest.approx(8**0.5), "the geometric mean of 8 and 1"
    assert (np.diff(near) > 0).all()
    assert Effort(1.0, 1.0)(*mix) == pytest.approx(4.5)
    assert Effort(1.0, -1.0)(*mix) == pytest.approx(2 / (1 + 1 / 8))


def test_rounds_to_a_level_by_hand():
    falling = Curve(ONE, ONE, np.array([4.0, 3.0, 3.5, 2.0]))
    found = falling.rounds_to(np.array([3.5, 3.0, 2.5, 1.0]))
    assert found[:3].tolist() == [0.5, 1.0, 2.5], "the rise after round 1 is no progress"
    assert np.isnan(found[3])
    rising = Curve(ONE, ONE, np.array([0.5, 0.6, 0.8]))
    assert rising.rounds_to(np.array([0.55, 0.7])) == pytest.approx([0.5, 1.5])


def test_pilots_that_say_too_little_are_refused():
    learnt = curves(Effort(0.8, -1.0))
    best = min(curve.values.min() for curve in learnt)
    with pytest.raises(ValueError, match=f"no pilot reaches 2, the best comes to {best:.3f}"):
        fit(learnt, 2.0, RANK, 0)
    scores = [replace(curve, values=1 - curve.values) for curve in learnt]
    with pytest.raises(ValueError, match=f"reaches 0.9, the best comes to {1 - best:.3f}"):
        fit(scores, 0.9, RANK, 0)
    with pytest.raises(ValueError, match="fewer than two pilots of uniform ratios"):
        fit(learnt[2:], TARGET, RANK, 0)


def test_levels_that_a_run_began_beyond_say_nothing_of_it():
    learnt = curves(Effort(0.8, -1.0))
    ahead = Curve(np.array([1 / 2]), ONE, np.array([3.2, 3.1, 2.9]))
    fitted = fit([*learnt, ahead], TARGET, RANK, 0)  # without a warning, which would be an error
    assert np.isfinite(fitted.full_rounds).all()
