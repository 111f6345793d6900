"""The sums that strategies promise, against dense algebra; published bugs would fail here."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from fslora.aggregation import trained_factors
from fslora.evaluation import evaluate
from fslora.lowrank import padded, tail_norm, truncated
from fslora.protocol import LocalRule, LoRAWeights
from fslora.strategies import (
    fed_plora,
    fedex_lora,
    ffa_lora,
    flexlora,
    flora,
    hetlora,
    local_only,
    rolora,
)
from fslora.strategies.hetlora import weights

from .worlds import CLIENTS, RANK, dense, examples, pair, peft_model, world

RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)
SGD = LocalRule(optimizer="sgd", lr=0.05, steps=2, batch_size=3)
SCALING = 16 / RANK  # α/R of worlds.peft_model
ADAMW = LocalRule(optimizer="adamw", lr=0.05, steps=2, batch_size=3)
LAYERS = 3  # shapes in the model: 16 x 16, 8 x 16, 16 x 32


def trained(strategy, state, client, scales=None):
    """One round: (state after it, tasks, each client's factors after training)."""
    tasks = strategy.assign(state, CLIENTS)
    if scales:
        tasks = [replace(task, scale=scale) for task, scale in zip(tasks, scales, strict=True)]
    updates = [client(task) for task in tasks]
    factors = [trained_factors(*each) for each in zip(tasks, updates, strict=True)]
    return strategy.aggregate(state, tasks, updates), tasks, factors


def residual_of(state, name):
    return dense(state.base_residual[name]) if name in state.base_residual else 0.0


def vanilla_loss(folder, increases, client):
    """The loss of the plain model whose weights [E, D] are increased, without any adapter code."""
    model = peft_model(folder).unload()
    for name, increase in increases.items():
        module = model.get_submodule(name.removeprefix("base_model.model."))
        module.weight.data += SCALING * increase
    ids = examples(client).tensors["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def loss_of(world_of, state, client):
    model, _, _, trainer = world_of
    return evaluate(model, state, trainer.task, examples(client), 6).loss


# FLoRA


@pytest.mark.parametrize("scales", [None, (8.0, 4.0, 2.0, 1.0)], ids=["equal", "unequal_scales"])
def test_floras_stack_is_the_exact_mean_of_the_products(tiny_llama, scales):
    """Not the last client's product alone, and no scale of the stack's own; over three rounds."""
    here = world(tiny_llama, RATIOS, SGD, flora)
    _, strategy, state, client = here
    expected = {name: residual_of(state, name) for name in state.adapters}
    assert all(increase.abs().sum() > 0 for increase in expected.values()), "B begins not at zero"
    for _ in range(3):
        state, tasks, factors = trained(strategy, state, client, scales)
        for name in state.adapters:
            parts = [
                task.scale * dense(own[name]) for task, own in zip(tasks, factors, strict=True)
            ]
            expected[name] = expected[name] + sum(parts) / 4
            torch.testing.assert_close(residual_of(state, name), expected[name])
            most = min(expected[name].shape)
            assert state.base_residual[name].rank <= most
    assert vanilla_loss(tiny_llama, expected, "two") == pytest.approx(
        loss_of(here, state, "two"), rel=1e-6
    )


def test_flora_starts_every_round_afresh(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, flora)
    seen = []
    for _ in range(2):
        state, tasks, _ = trained(strategy, state, client)
        for task in tasks:
            for name, factors in task.adapters.items():
                assert factors.lora_b.eq(0).all()
                assert factors.lora_a.abs().max() <= factors.lora_a.shape[1] ** -0.5
                seen.append((name, factors.lora_a[0].tolist()))
    assert len({tuple(row) for _, row in seen}) == len(seen), "no two are alike"


# HetLoRA


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_hetloras_scale_is_the_same_on_the_client_and_the_server(tiny_llama, size):
    """The loss that a client of any rank starts from is that of the server's truncated adapter."""
    here = world(tiny_llama, (size / RANK,) * 4, replace(SGD, steps=1), hetlora)
    _, strategy, state, client = here
    (task,) = strategy.assign(state, ["one"])
    assert all(own.rank == size for own in task.adapters.values())
    cut = {name: padded(own, RANK) for name, own in task.adapters.items()}
    before = {name: dense(own) for name, own in task.adapters.items()}
    everything = replace(task, local=replace(task.local, batch_size=6))
    wanted = vanilla_loss(tiny_llama, before, "one")
    assert client(everything).metrics["loss"] == pytest.approx(wanted, rel=1e-6)
    assert loss_of(here, replace(state, adapters=cut), "one") == pytest.approx(wanted, rel=1e-6)


def test_hetlora_weighs_padded_factors_by_frobenius_norms(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, hetlora, penalty=0.0)
    new, _, factors = trained(strategy, state, client)
    for name, got in new.adapters.items():
        sizes = torch.stack([dense(own[name]).norm() for own in factors])
        shares = sizes / sizes.sum()
        assert len(set(shares.tolist())) == 4
        for factor in (0, 1):
            expected = torch.zeros_like(got[factor])
            for share, own in zip(shares, factors, strict=True):
                expected[: own[name].rank] += share * own[name][factor]
            torch.testing.assert_close(got[factor], expected)


def test_hetloras_weights_sum_to_one_even_without_any_norm():
    pairs = [pair(2, 5, 7, seed) for seed in range(3)]
    assert sum(weights(pairs)) == pytest.approx(1, abs=1e-12)
    zero = LoRAWeights(pairs[0].lora_a, pairs[0].lora_b * 0)
    assert weights([zero, zero]) == [0.5, 0.5]


def test_hetlora_with_equal_ranks_and_equal_norms_is_fedavg(tiny_llama):
    """All clients have the same data and ranks, so that all norms are equal."""
    _, strategy, state, client = world(tiny_llama, (0.5,) * 4, SGD, hetlora, penalty=0.0)
    tasks = [replace(task, key=1) for task in strategy.assign(state, CLIENTS)]
    first = client(tasks[0])
    updates = [replace(first, client_id=t.client_id, nonce=t.nonce) for t in tasks]
    new = strategy.aggregate(state, tasks, updates)
    for name, got in new.adapters.items():
        expected = state.adapters[name].lora_b[:4] + first.delta[name].lora_b
        torch.testing.assert_close(got.lora_b[:4], expected)
        assert got.lora_b[4:].eq(0).all(), "nobody trains or holds them"


@pytest.mark.parametrize("shrinks", [True, False])
def test_hetlora_prunes_a_client_whose_tail_shrank(tiny_llama, shrinks):
    _, strategy, state, client = world(tiny_llama, (0.5,) * 4, SGD, hetlora, decay=0.75)
    (task,) = strategy.assign(state, ["one"])
    assert (task.local.penalty, task.local.penalty_from) == (5e-3, 3)
    update = client(replace(task, local=replace(task.local, penalty=1.0 if shrinks else 0.0)))
    if not shrinks:
        delta = {n: p._replace(lora_b=task.adapters[n].lora_b) for n, p in update.delta.items()}
        update = replace(update, delta=delta)  # B doubles
    before = tail_norm(task.adapters, 3)
    assert (tail_norm(trained_factors(task, update), 3) < before) == shrinks
    new = strategy.aggregate(state, [task], [update])
    (again,) = strategy.assign(new, ["one"])
    for name, own in again.adapters.items():
        assert own.rank == (3 if shrinks else 4)
        assert new.adapters[name].lora_a[3].eq(0).all() == shrinks
    never = hetlora(dict.fromkeys(CLIENTS, 0.5), SGD, decay=0.75, penalty=0.0)
    new = never.aggregate(state, never.assign(state, ["one"]), [update])
    (again,) = never.assign(new, ["one"])
    assert {own.rank for own in again.adapters.values()} == {4}, "λ = 0 prunes nobody"
    with pytest.raises(ValueError, match="decay must be in"):
        hetlora({}, SGD, decay=1.0)


def test_the_penalty_is_added_to_the_gradient(tiny_llama):
    """One step of SGD moves by lr times the gradient of task loss + λ Σ ‖B[:, j:]‖ ‖A[j:]‖."""
    rule = LocalRule(optimizer="sgd", lr=0.1, steps=1, batch_size=3, accumulation=2)
    _, strategy, state, client = world(tiny_llama, (0.5,) * 4, rule, hetlora, decay=0.75)
    (task,) = strategy.assign(state, ["one"])
    without = client(replace(task, local=replace(rule, penalty=0.0)))
    with_it = client(replace(task, local=replace(rule, penalty=2.0, penalty_from=3)))
    for name, own in task.adapters.items():
        a, b = (factor.clone().requires_grad_() for factor in own)
        (2.0 * torch.linalg.norm(b[3:]) * torch.linalg.norm(a[3:])).backward()
        for got, bare, leaf in zip(with_it.delta[name], without.delta[name], (a, b), strict=True):
            assert leaf.grad.abs().sum() > 0
            torch.testing.assert_close(got, bare - 0.1 * leaf.grad)
    assert with_it.metrics == without.metrics


# FlexLoRA


@pytest.mark.parametrize(("stacked", "inputs", "outputs"), [(6, 9, 13), (20, 9, 13), (6, 13, 4)])
def test_the_truncated_svd_equals_a_dense_one(stacked, inputs, outputs):
    lora = pair(stacked, inputs, outputs)
    u, sizes, vh = torch.linalg.svd(dense(lora), full_matrices=False)
    for rank in (1, 3, 100):
        got = truncated(lora, rank)
        most = min(rank, stacked, inputs, outputs)
        expected = (u[:, :most] * sizes[:most]) @ vh[:most]
        assert got.rank == most
        torch.testing.assert_close(dense(got), expected)
        torch.testing.assert_close(got.lora_a @ got.lora_a.t(), torch.eye(most).double())
        torch.testing.assert_close(got.lora_b.norm(dim=1), sizes[:most])


def test_flexlora_deals_the_largest_singular_parts_of_the_mean_product(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, flexlora)
    for _ in range(2):
        state, _, factors = trained(strategy, state, client)
        tasks = strategy.assign(state, CLIENTS)
        for name in state.adapters:
            mean = sum(dense(own[name]) for own in factors) / 4
            u, sizes, vh = torch.linalg.svd(mean, full_matrices=False)
            for task in tasks:
                rank = task.adapters[name].rank
                best = (u[:, :rank] * sizes[:rank]) @ vh[:rank]
                torch.testing.assert_close(dense(task.adapters[name]), best)
    assert [next(iter(t.adapters.values())).rank for t in tasks] == [1, 2, 4, 8]


def test_ranks_that_the_mean_does_not_have_can_still_be_trained(tiny_llama):
    """One client of rank 1 took part: the others get its part and directions with B = 0."""
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, flexlora)
    (task,) = strategy.assign(state, ["one"])
    state = strategy.aggregate(state, [task], [client(task)])
    (whole,) = strategy.assign(state, ["four"])
    for name, own in whole.adapters.items():
        assert own.lora_b[1:].eq(0).all()
        assert own.lora_a.abs().sum(dim=1).gt(0).all()
        assert client(whole).delta[name].lora_b.abs().sum(dim=1).gt(0).all()


# FedEx-LoRA


def test_fedex_makes_the_mean_of_the_products_exact_in_every_shape(tiny_llama):
    here = world(tiny_llama, RATIOS, ADAMW, fedex_lora)
    _, strategy, state, client = here
    shapes = set()
    for _ in range(3):
        base = {name: residual_of(state, name) for name in state.adapters}
        state, _, factors = trained(strategy, state, client)
        expected = {}
        for name, got in state.adapters.items():
            mean_a, mean_b = (sum(own[name][f] for own in factors) / 4 for f in (0, 1))
            torch.testing.assert_close(got.lora_a, mean_a)
            torch.testing.assert_close(got.lora_b, mean_b)
            expected[name] = base[name] + sum(dense(own[name]) for own in factors) / 4
            added = residual_of(state, name) - base[name]
            assert added.norm() > 1e-2, "averaging factors does miss something"
            torch.testing.assert_close(residual_of(state, name) + dense(got), expected[name])
            shapes.add(tuple(added.shape))
        assert vanilla_loss(tiny_llama, expected, "three") == pytest.approx(
            loss_of(here, state, "three"), rel=1e-6
        )
    assert len(shapes) == LAYERS


# FFA-LoRA and RoLoRA


@pytest.mark.parametrize("factory", [ffa_lora, rolora])
def test_averaging_one_factor_is_exact_and_the_other_stays(tiny_llama, factory):
    _, strategy, state, client = world(
        tiny_llama, RATIOS, replace(SGD, optimizer="adamw", weight_decay=0.1), factory
    )
    for number in (1, 2, 3):
        before = state
        state, tasks, _ = trained(strategy, before, client)
        moves = "b" if factory is ffa_lora or number % 2 else "a"
        updates = [client(task) for task in tasks]
        for name, got in state.adapters.items():
            old = before.adapters[name]
            stays, changed = (0, 1) if moves == "b" else (1, 0)
            assert torch.equal(got[stays], old[stays])
            assert all(update.delta[name][stays].shape[0] == 0 for update in updates)
            products = []
            for update in updates:
                factors = [*old]
                factors[changed] = old[changed] + update.delta[name][changed]
                products.append(dense(LoRAWeights(*factors)))
            assert (products[0] - products[1]).norm() > 1e-6
            torch.testing.assert_close(dense(got), sum(products) / 4)


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam", "fedyogi"])
def test_no_server_optimizer_moves_the_a_of_ffa_lora(tiny_llama, optimizer):
    _, strategy, state, client = world(
        tiny_llama, RATIOS, SGD, partial(ffa_lora, server_optimizer=optimizer)
    )
    for _ in range(2):
        before = state
        state, *_ = trained(strategy, before, client)
        for name, (a, b) in state.adapters.items():
            assert torch.equal(a, before.adapters[name].lora_a)
            assert not torch.equal(b, before.adapters[name].lora_b)
    with pytest.raises(ValueError, match="weight decay of fedadamw would shrink"):
        ffa_lora({}, SGD, server_optimizer="fedadamw")


def test_rolora_downloads_what_a_client_missed(tiny_llama):
    """Both factors after a round missed, one after none, A only once it has been trained."""
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, rolora)
    sizes = [(p.lora_a.nbytes, p.lora_b.nbytes) for p in state.adapters.values()]
    a, b = (sum(size) for size in zip(*sizes, strict=True))
    held = []
    for cohort in (["one", "two"], ["one"], ["one", "two"], ["one", "two"]):
        tasks = strategy.assign(state, cohort)
        held.append([task.held_bytes for task in tasks])
        state = strategy.aggregate(state, tasks, [client(task) for task in tasks])
    assert a != b
    assert held == [[a, a], [a], [b, 0], [a, a]]


# Fed-PLoRA


def test_fed_plora_trains_its_terms_with_the_others_in_the_forward(tiny_llama):
    """Against plain autograd on the whole adapter, of which only the drawn terms are moved."""
    rule = LocalRule(optimizer="sgd", lr=0.05, steps=3, batch_size=6)
    _, strategy, state, client = world(tiny_llama, RATIOS, rule, fed_plora)
    for task in strategy.assign(state, CLIENTS):
        update = client(task)
        model = peft_model(tiny_llama)
        own = {name: model.get_submodule(name) for name in state.adapters}
        for _ in range(rule.steps):
            ids = examples(task.client_id).tensors["input_ids"]
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            with torch.no_grad():
                for name, layer in own.items():
                    index = task.sketches[name].index
                    rows = slice(None) if index is None else index
                    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                    a[rows] -= rule.lr * a.grad[rows]
                    b[:, rows] -= rule.lr * b.grad[:, rows]
        for name, layer in own.items():
            index = task.sketches[name].index
            rows = slice(None) if index is None else index
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight.t()
            old = state.adapters[name]
            torch.testing.assert_close(update.delta[name].lora_a, (a - old.lora_a)[rows].detach())
            torch.testing.assert_close(update.delta[name].lora_b, (b - old.lora_b)[rows].detach())


def test_fed_plora_averages_each_term_over_those_who_trained_it(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, fed_plora)
    tasks = strategy.assign(state, CLIENTS)
    updates = [client(task) for task in tasks]
    new = strategy.aggregate(state, tasks, updates)
    counts = set()
    for name, got in new.adapters.items():
        for rank in range(RANK):
            changes = []
            for task, update in zip(tasks, updates, strict=True):
                index = task.sketches[name].index
                drawn = list(range(RANK)) if index is None else index.tolist()
                if rank in drawn:
                    changes.append(update.delta[name].lora_b[drawn.index(rank)])
            counts.add(len(changes))
            expected = state.adapters[name].lora_b[rank] + sum(changes) / len(changes)
            torch.testing.assert_close(got.lora_b[rank], expected)
    assert len(counts) > 1


# Local only


def test_local_only_goes_on_from_what_a_client_has_trained_and_from_nothing_else(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, local_only)
    first, tasks, factors = trained(strategy, state, client)
    for task, own, again in zip(tasks, factors, strategy.assign(first, CLIENTS), strict=True):
        for name in own:
            assert own[name].rank == task.adapters[name].rank
            for before, after in zip(own[name], again.adapters[name], strict=True):
                assert torch.equal(before, after)
    second, _, _ = trained(strategy, first, client)
    for one, two in zip(strategy.evaluated(first), strategy.evaluated(second), strict=True):
        for name in state.adapters:
            assert not torch.equal(dense(one.adapters[name]), dense(two.adapters[name]))
    for name, pair_ in state.adapters.items():
        assert all(torch.equal(*t) for t in zip(pair_, second.adapters[name], strict=True))
