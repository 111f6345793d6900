import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fslora.data.metrics import score


def pairs(classes):
    return st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=40)


def f1_of(truth, guess, label):
    hits = sum(t == g == label for t, g in zip(truth, guess, strict=True))
    precision = hits / max(1, sum(guess == label))
    recall = hits / max(1, sum(truth == label))
    return 2 * precision * recall / (precision + recall) if hits else 0.0


@given(pairs(2))
def test_binary_scores_equal_their_definitions(examples):
    truth, guess = np.array(examples).T
    assert score("accuracy", truth, guess, 2) == pytest.approx(np.mean(truth == guess))
    assert score("f1", truth, guess, 2) == pytest.approx(f1_of(truth, guess, 1))
    varied = len(set(truth)) == len(set(guess)) == 2
    mcc = np.corrcoef(truth, guess)[0, 1] if varied else 0.0
    assert score("mcc", truth, guess, 2) == pytest.approx(mcc, abs=1e-12)


@given(pairs(4))
def test_scores_of_many_classes_equal_their_definitions(examples):
    truth, guess = np.array(examples).T
    present = sorted({*truth, *guess})
    macro = np.mean([f1_of(truth, guess, label) for label in present])
    assert score("f1", truth, guess, 4) == pytest.approx(macro)
    one_hot_truth, one_hot_guess = (
        np.eye(4)[ids] - np.eye(4)[ids].mean(0) for ids in (truth, guess)
    )
    spread = np.sqrt((one_hot_truth**2).sum() * (one_hot_guess**2).sum())
    mcc = (one_hot_truth * one_hot_guess).sum() / spread if spread else 0.0
    assert score("mcc", truth, guess, 4) == pytest.approx(mcc, abs=1e-12)
