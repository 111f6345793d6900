"""Intervals over seeds, and the verdicts that rest on them."""

import math

import pytest
from rich.console import Console
from scipy.special import stdtrit

from fslora.compare.statistics import difference, ratio, spread, t_quantile, verdict

QUIET = Console(quiet=True)


@pytest.mark.parametrize("freedom", range(1, 41))
def test_t_quantiles(freedom):
    assert t_quantile(freedom) == pytest.approx(stdtrit(freedom, 0.975), abs=1.2e-4)


def test_intervals_and_verdicts():
    found = spread([1.0, 2.0, 3.0])
    assert (found["mean"], found["std"]) == (2.0, 1.0)
    assert found["high"] - 2 == pytest.approx(4.30265 / math.sqrt(3))
    assert verdict(difference([5.0, 6.1, 7.0], [1.0, 2.0, 3.0]), 0) == "higher"
    assert verdict(difference([1.0, 2.0, 3.0], [5.0, 6.1, 7.0]), 0) == "lower"
    assert verdict(difference([1.0, 9.0], [2.0, 3.0]), 0) == "undecided"
    assert verdict(difference([1.0], [2.0]), 0) == "undecided", "one seed decides nothing"
    half = ratio([1.0, 2.0, 4.0], [2.0, 4.1, 8.0])
    assert half["mean"] == pytest.approx(0.4959, abs=1e-4)
    assert verdict(half, 1) == "lower"
    assert ratio([0.0, 1.0], [1.0, 1.0])["mean"] is None
