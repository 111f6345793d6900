import math

import pytest
import torch

from fslora.attacks import draw_attackers, hostile, poisoned
from fslora.data.lazy import LazyExamples, NamedExamples
from fslora.data.tasks import Examples
from fslora.robust import update_norm
from fslora.trust import Threat

from .hostile import CLIENTS, honest, small_state

LIARS = frozenset({"two", "three"})


def tensors(update):
    return [t for pair in update.delta.values() for t in pair] + list(update.extras.values())


def answer(attack, client="three", **options):
    """(honest update, what is sent) of a client."""
    strategy, state = small_state(dtype=torch.float64)
    (task,) = strategy.assign(state, [client])
    return honest(task), hostile(Threat(attack, **options), honest, LIARS)(task)


def test_who_is_hostile_depends_on_the_seed_alone():
    clients = [f"c{n}" for n in range(20)]
    drawn = draw_attackers(Threat("scale", 0.2), clients, 0)
    assert len(drawn) == 4
    assert drawn == draw_attackers(Threat("noise", 0.2), clients, 0)
    assert any(drawn != draw_attackers(Threat("scale", 0.2), clients, s) for s in range(1, 4))
    assert draw_attackers(Threat("none", 1.0), clients, 0) == frozenset()
    assert draw_attackers(Threat("scale", 0.0), clients, 0) == frozenset()


def test_a_share_that_is_nobody_is_refused():
    clients = [f"c{n}" for n in range(7)]
    with pytest.raises(
        ValueError, match=r"--attackers 0.05 of 7 clients is nobody; (\S+) is one"
    ) as e:
        draw_attackers(Threat("scale", 0.05), clients, 0)
    one = float(str(e.value).split("; ")[1].split()[0])
    assert len(draw_attackers(Threat("scale", one), clients, 0)) == 1


@pytest.mark.parametrize(("attack", "factor"), [("scale", 4.0), ("sign-flip", -4.0)])
def test_scaled_attacks(attack, factor):
    true, sent = answer(attack, strength=4.0)
    assert all(map(torch.equal, tensors(sent), [t * factor for t in tensors(true)]))


def test_noise_has_the_norm_it_says_and_depends_on_the_task():
    true, sent = answer("noise", strength=3.0)
    count = sum(t.numel() for t in tensors(true))
    spread = 5 / math.sqrt(2 * count)
    assert update_norm(sent) == pytest.approx(3 * update_norm(true), rel=spread)
    again = answer("noise", strength=3.0)[1]
    assert all(map(torch.equal, tensors(sent), tensors(again)))
    assert abs(torch.cat([t.flatten() for t in tensors(sent)]).mean()) < update_norm(sent) / count


def test_wrong_ranks_sends_the_same_rows_under_other_ranks():
    true, sent = answer("wrong-ranks")
    for name, pair in true.delta.items():
        for before, after in zip(pair, sent.delta[name], strict=True):
            assert len(before) == 4
            assert torch.equal(after, before[[3, 0, 1, 2]])
    assert all(torch.equal(sent.extras[n], t) for n, t in true.extras.items())


@pytest.mark.parametrize("attack", ["sign-flip", "scale", "noise", "wrong-ranks", "label-flip"])
def test_honest_clients_are_left_alone(attack):
    true, sent = answer(attack, "one")
    assert all(map(torch.equal, tensors(sent), tensors(true)))


def test_labels_are_reversed_for_the_hostile_alone():
    labels = torch.tensor([0, 1, 2, 2])
    own = {c: Examples({"labels": labels, "input_ids": labels}) for c in CLIENTS}
    bad = poisoned(Threat("label-flip"), own, LIARS, 3)
    assert bad["two"].tensors["labels"].tolist() == [2, 1, 0, 0]
    assert bad["two"].tensors["input_ids"] is labels
    assert bad["one"] is own["one"]
    assert poisoned(Threat("scale"), own, LIARS, 3) == own


def test_labels_are_reversed_when_a_client_is_asked():
    asked = []

    def encode(place):
        asked.append(place)
        return Examples({"labels": torch.tensor([0, 1])})

    named = NamedExamples(CLIENTS, LazyExamples(len(CLIENTS), encode))
    bad = poisoned(Threat("label-flip"), named, LIARS, 2)
    assert asked == []
    assert bad["three"].tensors["labels"].tolist() == [1, 0]
    assert bad["three"] is bad["three"]
    assert [CLIENTS[place] for place in asked] == ["three"]
