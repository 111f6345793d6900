"""The sketched loss: which examples meet which ratio, and what their mean is."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fslora import evaluation
from fslora.data.tasks import Evaluation, Examples

from .worlds import RANK, world

CLIENTS = [1 / 8] * 6 + [1 / 2] * 3 + [1.0]


class Noting:
    """A task that notes the sketch under which each example is seen; its loss is the sketch."""

    def __init__(self):
        self.seen, self.size, self.sketches = {}, None, set()

    def evaluate(self, _model, examples, _batch_size, *, scored):
        assert not scored, "a score of a few examples costs passes, and nobody reads it"
        rows = examples.tensors["input_ids"].flatten().tolist()
        self.seen |= dict.fromkeys(rows, self.size)
        return Evaluation(float(self.size), None, len(rows))


def judged(folder, monkeypatch, *, clients, count, batch_size, number=3):
    """What a round's evaluation showed to whom, and what it found."""
    model, _, state, _ = world(folder, (1 / 8, 1 / 4, 1 / 2, 1.0))
    noting = Noting()

    def sketch(_model, indices):
        if indices is not None:
            index = next(iter(indices.values()))
            noting.size = RANK if index is None else len(index)
            noting.sketches.add(str(indices))

    monkeypatch.setattr(evaluation.fslora_kernels, "sketch", sketch)
    state = replace(state, round=number)
    examples = Examples({"input_ids": torch.arange(count)[:, None]})
    loss = evaluation.evaluate_sketched(model, state, noting, examples, batch_size, clients)
    return noting, loss


@pytest.mark.parametrize("batch_size", [4, 100])
def test_ratios_are_judged_by_their_clients_share_whatever_the_batches(
    tiny_llama, monkeypatch, batch_size
):
    """Sizes of ranks 1, 4 and 8 have 6, 3 and 1 of 10 clients; so they have of 80 examples."""
    noting, loss = judged(tiny_llama, monkeypatch, clients=CLIENTS, count=80, batch_size=batch_size)
    assert sorted(noting.seen) == list(range(80)), "one pass"
    assert Counter(noting.seen.values()) == {1: 48, 4: 24, 8: 8}
    assert loss == pytest.approx((6 * 1 + 3 * 4 + 1 * 8) / 10)
    for start in range(0, 80, 20):  # as a client's own text lies
        own = Counter(noting.seen[row] for row in range(start, start + 20))
        assert 10 <= own[1] <= 14
        assert 4 <= own[4] <= 8
        assert 1 <= own[8] <= 3


def test_rounds_deal_otherwise_and_the_same_round_alike(tiny_llama, monkeypatch):
    given = {"clients": CLIENTS, "count": 80, "batch_size": 8}
    one, same = (judged(tiny_llama, monkeypatch, **given)[0] for _ in range(2))
    other = judged(tiny_llama, monkeypatch, **given, number=4)[0]
    assert (one.seen, one.sketches) == (same.seen, same.sketches)
    assert one.seen != other.seen
    assert len(one.sketches) == 6 + 3 + 1, "a fresh sketch for each batch"


def test_a_share_too_small_for_an_example_is_left_out(tiny_llama, monkeypatch):
    noting, loss = judged(tiny_llama, monkeypatch, clients=CLIENTS, count=2, batch_size=8)
    assert Counter(noting.seen.values()) == {1: 1, 4: 1}
    assert loss == pytest.approx((6 * 1 + 3 * 4) / 9)
