from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.engines import sequential
from fslora.protocol import LoRAWeights
from fslora.robust import _centre, apply, clipped, defended, update_norm
from fslora.server import run_round
from fslora.trust import ROBUST, Rule

from .hostile import CLIENTS, RANK, honest, small_state
from .worlds import assert_same_bits, tensors_of

NAME = "second.value"


def answers(cohort=CLIENTS, **options):
    strategy, state = small_state(dtype=torch.float64, **options)
    tasks = strategy.assign(state, cohort)
    return strategy, state, tasks, [honest(task) for task in tasks]


def contributors(tasks, updates, rank, factor):
    """Who changed a rank of NAME, and how: {client: row}."""
    found = {}
    for task, update in zip(tasks, updates, strict=True):
        index = task.sketches[NAME].index
        ranks = list(range(RANK)) if index is None else index.tolist()
        if rank in ranks:
            found[task.client_id] = update.delta[NAME][factor][ranks.index(rank)]
    return found


@pytest.mark.parametrize("rule", ["median", "trimmed"])
def test_a_row_is_the_centre_of_those_who_trained_it(rule):
    _, _, tasks, updates = answers(ratios=(1 / 2, 1.0, 3 / 4, 1 / 2))
    after = apply(Rule(rule, min_coverage=3, trim=0.3), tasks, updates)
    updates = apply(Rule("clip"), tasks, updates)
    coverages = set()
    for rank in range(RANK):
        for factor in range(2):
            before = contributors(tasks, updates, rank, factor)
            rows = torch.stack(list(before.values())).sort(dim=0).values
            coverages.add(len(rows))
            # Of three the middle one. Of four ⌈0.3 · 4⌉ = 2 at each end would leave none: two.
            wanted = torch.zeros_like(rows[0])
            if len(rows) >= 3:
                wanted = rows[1] if len(rows) == 3 else (rows[1] + rows[2]) / 2
            for row in contributors(tasks, after, rank, factor).values():
                torch.testing.assert_close(row, wanted, rtol=0, atol=1e-15)
    assert min(coverages) < 3 in coverages, "some rows have too few contributors, some enough"
    heads = torch.stack([update.extras["head.weight"] for update in updates]).sort(dim=0).values
    for update in after:
        torch.testing.assert_close(update.extras["head.weight"], heads[1:3].mean(dim=0))


def test_trimming_cuts_the_share_at_each_end_rounded_up():
    _, _, tasks, updates = answers(ratios=(1.0,) * 4)
    heads = torch.stack([update.extras["head.weight"] for update in updates]).sort(dim=0).values
    for trim, wanted in ((0.0, heads.mean(dim=0)), (0.01, heads[1:3].mean(dim=0))):
        after = apply(Rule("trimmed", clip=1e9, trim=trim), tasks, updates)
        torch.testing.assert_close(after[0].extras["head.weight"], wanted)
    seven = torch.arange(25.0)[:, None] ** 3
    middle = seven[7:-7].mean(dim=0)
    assert torch.equal(_centre(Rule("trimmed", trim=0.28), seven), middle), (
        "0.28 · 25 is not above 7"
    )


def test_where_all_agree_every_rule_is_the_mean():
    strategy, state, tasks, updates = answers(ratios=(1.0,) * 4)
    agreed = [replace(u, delta=updates[0].delta, extras=updates[0].extras) for u in updates]
    wanted = strategy.aggregate(state, tasks, agreed)
    for rule in ("clip", "median", "trimmed"):
        got = defended(strategy, Rule(rule)).aggregate(state, tasks, agreed)
        for name, tensor in tensors_of(wanted).items():
            torch.testing.assert_close(tensors_of(got)[name], tensor, rtol=0, atol=1e-15)


@pytest.mark.parametrize("rule", ["clip", "median", "trimmed"])
def test_clients_of_different_depth_count_where_they_train(rule):
    options = {"forward": "full", "averaging": "inverse", "depth": "uniform"}
    strategy, state, tasks, updates = answers(ratios=(1.0,) * 4, **options)
    depths = {len(update.delta) for update in updates}
    assert depths == {1, 2}
    after = apply(Rule(rule, clip=1e9, min_coverage=1), tasks, updates)
    assert [each.delta.keys() for each in after] == [each.delta.keys() for each in updates]
    rows = torch.stack([u.delta[NAME].lora_a for u in updates if NAME in u.delta])
    if rule == "median":
        middle = rows.quantile(0.5, dim=0)
        for each in after:
            if NAME in each.delta:
                torch.testing.assert_close(each.delta[NAME].lora_a, middle)
    strategy.aggregate(state, tasks, after)


@pytest.mark.parametrize("rule", ["clip", "median", "trimmed"])
def test_a_round_of_which_nothing_was_accepted_stays_empty(rule):
    _, _, tasks, _ = answers()
    assert apply(Rule(rule), tasks, []) == []


def test_no_rule_is_the_strategy_itself():
    strategy, *_ = answers()
    assert defended(strategy, Rule()) is strategy


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("rule", ["clip", "median", "trimmed"])
def test_one_client_cannot_move_the_model_far_whatever_it_sends(name, rule):
    """Three of four are honest and agree; the fourth's 1e12 moves nothing out of their reach."""
    strategy, state = small_state(name, (1.0,) * 4, torch.float64)
    safe = defended(strategy, Rule(rule))

    def client(task):
        update = honest(replace(task, key=1))
        if task.client_id != "three":
            return update
        return replace(
            update,
            delta={n: LoRAWeights(*(t - 1e12 for t in p)) for n, p in update.delta.items()},
            extras={n: t - 1e12 for n, t in update.extras.items()},
        )

    bent, _ = run_round(state, strategy, sequential, client, CLIENTS)
    got, _ = run_round(state, safe, sequential, client, CLIENTS)
    reach = update_norm(honest(replace(strategy.assign(state, ["one"])[0], key=1)))

    def moved(new):
        old = tensors_of(state)
        return sum(float((t - old[n]).square().sum()) for n, t in tensors_of(new).items()) ** 0.5

    assert moved(bent) > 1e11
    assert moved(got) <= reach * (1 + 1e-9)


@given(st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4), st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_clipping_bounds_the_norm_and_keeps_the_direction(scales, bound):
    _, _, tasks, updates = answers()
    scaled = [
        replace(u, extras={n: t * s for n, t in u.extras.items()})
        for u, s in zip(updates, scales, strict=True)
    ]
    for before, after in zip(scaled, apply(Rule("clip", clip=bound), tasks, scaled), strict=True):
        norm = update_norm(before)
        assert update_norm(after) == pytest.approx(min(norm, bound), rel=1e-12)
        if norm <= bound:
            assert after is before
        share = min(1, bound / norm)
        for name, tensor in before.extras.items():
            torch.testing.assert_close(after.extras[name], tensor * share)


def test_clipping_without_a_bound_takes_the_median_norm():
    _, _, tasks, updates = answers()
    norms = sorted(map(update_norm, updates))
    after = sorted(map(update_norm, apply(Rule("clip"), tasks, updates)))
    middle = (norms[1] + norms[2]) / 2
    assert after == pytest.approx([*norms[:2], middle, middle])


def test_the_norm_is_of_modules_and_heads_together_in_any_order():
    *_, updates = answers()
    update = updates[1]
    tensors = [t for pair in update.delta.values() for t in pair] + [*update.extras.values()]
    assert update_norm(update) == pytest.approx(
        float(torch.cat([t.flatten() for t in tensors]).norm())
    )
    backwards = replace(update, delta=dict(reversed(update.delta.items())))
    assert update_norm(backwards) == update_norm(update)
    assert clipped(update, 2.0, 2.0) is update
    huge = replace(update, extras={"head.weight": torch.full((2, 3), 1e154, dtype=torch.float64)})
    huge.delta[NAME] = LoRAWeights(*(torch.full_like(t, 1e154) for t in huge.delta[NAME]))
    assert update_norm(huge) == float("inf")
    single = replace(update, delta={}, extras={"head.weight": torch.tensor([4096.0, 1.0])})
    assert update_norm(single) == (2**24 + 1) ** 0.5, "the squares of float32 are not float32"


def test_bits_are_those_of_the_tasks_order_and_the_arguments_are_left_alone():
    strategy, state, tasks, updates = answers(ratios=(1 / 2, 1.0, 1.0, 1.0))
    copies = [[t.clone() for p in u.delta.values() for t in p] for u in updates]
    safe = defended(strategy, Rule("median"))
    one = safe.aggregate(state, tasks, iter(updates))
    assert_same_bits(one, safe.aggregate(state, tasks, iter(updates)))
    for update, before in zip(updates, copies, strict=True):
        assert all(map(torch.equal, [t for p in update.delta.values() for t in p], before))
