from dataclasses import replace

import pytest
import torch

from fslora import server
from fslora.aggregation import mean_update
from fslora.assignment import gather_each
from fslora.protocol import LoRAWeights, Sketch, Sketches, ranks_of
from fslora.sketch import cohort_sketches
from fslora.stacks import Stacks, few_tensors, places_of, rows_of, stacked
from fslora.validate import rejection

from .hostile import CLIENTS, honest, small_state

# Widths that modules share: as A and as B, in another order, and one that nobody shares.
SHAPES = {"q": (4, 6), "up": (4, 10), "down": (10, 4), "v": (4, 6), "out": (6, 4), "odd": (3, 7)}
RANK = 8
SIZES = {"one": 2, "two": RANK, "three": 3, "four": 2}


def global_adapters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoRAWeights(*(torch.randn(RANK, width, generator=generator) for width in shape))
        for name, shape in SHAPES.items()
    }


def drawn_sketches(adapters, sampler="uniform"):
    return cohort_sketches(3, 1, SIZES, adapters, sampler)


def assert_same_bits(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def assert_same_pairs(found, wanted):
    assert list(found) == list(wanted)
    for name, pair in wanted.items():
        for one, other in zip(found[name], pair, strict=True):
            assert_same_bits(one, other)


def test_stacks_are_the_same_adapters_in_a_tensor_for_each_width():
    adapters = global_adapters()
    stacks = stacked(adapters)
    assert_same_pairs(stacks, adapters)
    widths = {width for shape in SHAPES.values() for width in shape}
    assert sorted(tensor.shape[1] for tensor in stacks.tensors) == sorted(widths)
    assert sum(tensor.numel() for tensor in stacks.tensors) == sum(
        factor.numel() for pair in adapters.values() for factor in pair
    )
    assert few_tensors(stacks) is stacks.tensors
    assert len(few_tensors(adapters)) == 2 * len(adapters)
    assert "q" in stacks
    assert "x" not in stacks
    assert len(stacked({})) == 0


def test_factors_of_another_type_have_a_tensor_of_their_own():
    adapters = {
        "a": LoRAWeights(torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bfloat16)),
        "b": LoRAWeights(torch.ones(2, 4), torch.ones(2, 4)),
    }
    assert [len(tensor) for tensor in stacked(adapters).tensors] == [6, 2]
    assert_same_pairs(stacked(adapters), adapters)


def test_a_factor_that_does_not_travel_has_no_rows():
    adapters = {n: LoRAWeights(a, b[:0]) for n, (a, b) in global_adapters().items()}
    assert_same_pairs(stacked(adapters), adapters)


def test_stacks_keep_their_tensors_unless_the_order_is_another():
    adapters = global_adapters()
    stacks = stacked(adapters)
    assert stacked(stacks) is stacks
    assert stacked(stacks, adapters) is stacks
    backwards = dict(reversed(adapters.items()))
    assert_same_pairs(stacked(stacks, backwards), backwards)
    upper = stacked({name: adapters[name] for name in ("down", "out")})
    assert stacked(upper, adapters) is upper  # as of a client that trains some of the layers
    some = {name: adapters[name] for name in ("out", "q")}
    assert list(stacked(some, adapters)) == ["q", "out"]


def test_an_optimizer_steps_the_stacks_and_layers_see_it_through_the_views():
    adapters = global_adapters()
    stacks = stacked(adapters)
    leaves = {n: LoRAWeights(*(t.clone().requires_grad_() for t in p)) for n, p in adapters.items()}
    assert not stacks["q"].lora_a.requires_grad
    gradients = [torch.zeros_like(t) for t in stacks.tensors]
    stacks.require_gradients(gradients)
    optimizers = [
        torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
        for parameters in (stacks.tensors, [t for pair in leaves.values() for t in pair])
    ]
    for _ in range(3):
        for optimizer, pairs in zip(optimizers, (stacks, leaves), strict=True):
            optimizer.zero_grad(set_to_none=False)
            sum((factor**3).sum() for pair in pairs.values() for factor in pair).backward()
            optimizer.step()
    for name, pair in leaves.items():
        for one, other in zip(stacks[name], pair, strict=True):
            torch.testing.assert_close(one, other)


def test_a_gradient_is_added_where_it_belongs_before_the_backward_pass_ends():
    stacks = stacked(global_adapters())
    gradients = [torch.zeros_like(t) for t in stacks.tensors]
    stacks.require_gradients(gradients)
    of = {t.untyped_storage().data_ptr() for t in gradients}
    for pair in stacks.values():
        for factor in pair:
            assert factor.is_leaf
            assert factor.grad.untyped_storage().data_ptr() in of
    (stacks["q"].lora_a * 2).sum().backward()
    (stacks["q"].lora_a * 3).sum().backward()
    assert_same_bits(stacks["q"].lora_a.grad, torch.full((RANK, 4), 5.0))
    assert sum(float(t.sum()) for t in gradients) == 5.0 * RANK * 4


@pytest.mark.parametrize("sampler", ["uniform", "balanced", "nested"])
def test_gathering_for_all_clients_is_gathering_for_each(sampler):
    adapters = global_adapters()
    drawn = drawn_sketches(adapters, sampler)
    drawn["three"] = {name: drawn["three"][name] for name in ("down", "v")}  # at a depth
    drawn["four"] = {}
    found = gather_each(adapters, drawn)
    assert found.keys() == drawn.keys()
    for client, own in drawn.items():
        by_hand = {n: LoRAWeights(*(t[s.rows] for t in adapters[n])) for n, s in own.items()}
        assert_same_pairs(found[client], by_hand)


def test_rows_are_in_the_stacks_where_the_places_say():
    adapters = global_adapters()
    drawn, whole = drawn_sketches(adapters), stacked(adapters)
    for client, own in gather_each(adapters, drawn).items():
        for tensor, places, kind in zip(own.tensors, own.places, own.layout.kinds, strict=True):
            every = whole.tensors[whole.layout.kinds.index(kind)]
            assert_same_bits(tensor, every[places])
        ranks = torch.cat([drawn[client][name].rows for name in adapters])
        for found, places in zip(
            places_of(ranks[None], own.layout, whole.layout), own.places, strict=True
        ):
            assert_same_bits(found[0], places)
        for found, places in zip(rows_of(ranks[None], own.layout), own.places, strict=True):
            assert_same_bits(found[0], places % RANK)


@pytest.mark.parametrize("divide_by", ["participants", "count", "inverse"])
def test_the_mean_is_the_same_for_stacks_for_pairs_and_for_pairs_in_another_order(divide_by):
    strategy, state = small_state()
    tasks = strategy.assign(state, CLIENTS)
    assert all(isinstance(task.adapters, Stacks) for task in tasks)
    as_pairs = [honest(task) for task in tasks]
    as_stacks = [replace(one, delta=stacked(one.delta)) for one in as_pairs]
    backwards = [replace(one, delta=dict(reversed(one.delta.items()))) for one in as_pairs]
    stacks_backwards = [replace(one, delta=stacked(one.delta)) for one in backwards]
    plain = [replace(task, adapters=dict(task.adapters)) for task in tasks]

    # By hand, one rank after the other.
    total = {n: [torch.zeros_like(t) for t in p] for n, p in state.adapters.items()}
    counts = {n: torch.zeros(p.rank) for n, p in state.adapters.items()}
    for task, update in zip(tasks, as_pairs, strict=True):
        for name, pair in update.delta.items():
            sketch = task.sketches[name]
            weight = sketch.correction if divide_by == "inverse" else 1.0
            for place, rank in enumerate(sketch.rows.tolist()):
                counts[name][rank] += 1
                for rows, change in zip(total[name], pair, strict=True):
                    rows[rank] += change[place] * weight
    for name, rows in total.items():
        by = counts[name].clamp(min=1)[:, None] if divide_by == "count" else len(tasks)
        total[name] = LoRAWeights(*(factor / by for factor in rows))

    for asked in (tasks, plain):
        for updates in (as_pairs, as_stacks, backwards, stacks_backwards):
            found, _ = mean_update(state.adapters, state.extras, asked, updates, divide_by)
            assert list(found) == list(state.adapters)
            for name, pair in found.items():
                for one, other in zip(pair, total[name], strict=True):
                    torch.testing.assert_close(one, other)


def forged(update, number, change):
    stacks = stacked(update.delta)
    tensors = [change(t) if n == number else t for n, t in enumerate(stacks.tensors)]
    return replace(update, delta=Stacks(stacks.layout, tensors))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t[:-1], "but was"),
        (lambda t: t.double(), "but was"),
        (lambda t: t.to_sparse(), "is not a plain tensor"),
        (torch.nn.Parameter, "is not a plain tensor"),
        (lambda t: t.to("meta"), "is not a plain tensor"),
        (lambda t: torch.where(torch.arange(len(t))[:, None] == 1, torch.nan, t), "is not finite"),
        (lambda t: t * 1e38, "its norm is"),
    ],
)
@pytest.mark.parametrize("number", [0, -1])
def test_stacks_that_do_not_fit_are_refused_as_pairs_are(change, reason, number):
    strategy, state = small_state()
    (task,) = strategy.assign(state, ["two"])
    update = honest(task)
    count = len(stacked(update.delta).tensors)
    assert rejection(task, replace(update, delta=stacked(update.delta))) is None
    assert reason in rejection(task, forged(update, number % count, change))


def test_stacks_with_a_factor_that_does_not_travel_are_refused():
    strategy, state = small_state("ffa-lora")
    (task,) = strategy.assign(state, ["two"])
    assert task.local.trained == (False, True)
    update = honest(task)
    assert rejection(task, replace(update, delta=stacked(update.delta))) is None
    both = {n: LoRAWeights(*map(torch.ones_like, pair)) for n, pair in task.adapters.items()}
    for delta in (both, stacked(both)):
        assert "but was" in rejection(task, replace(update, delta=delta))


def test_stacks_of_other_modules_are_refused():
    strategy, state = small_state()
    (task,) = strategy.assign(state, ["two"])
    update = honest(task)
    fewer = dict(list(update.delta.items())[1:])
    for delta in (stacked(fewer), stacked({**update.delta, "more": update.delta["first.query"]})):
        reason = rejection(task, replace(update, delta=delta))
        assert reason == "its modules are not those that it was given"


def test_sketches_in_one_tensor_are_those_of_each_module():
    index = torch.tensor([[0, 3], [1, 2]])
    together = Sketches(("a", "b"), index, 4)
    alone = {name: Sketch(row, 4) for name, row in zip("ab", index, strict=True)}
    assert list(together) == list(alone)
    assert ("a" in together, "c" in together, len(together)) == (True, False, 2)
    for name, sketch in together.items():
        assert_same_bits(sketch.index, alone[name].index)
        assert (sketch.rank, sketch.probability) == (4, None)
    with pytest.raises(KeyError):
        together["c"]
    for names in ("ab", "ba", "b"):
        assert_same_bits(ranks_of(together, names), ranks_of(alone, names))
    every = ranks_of({"a": Sketch(None, 2), "b": Sketch(torch.tensor([1]), 2)}, "ba")
    assert every.tolist() == [1, 0, 1]


def test_sketches_of_every_rank_have_no_index():
    together = Sketches(("a", "b"), None, 3)
    assert dict(together) == dict.fromkeys("ab", Sketch(None, 3))
    assert (together.size, Sketches(("a",), torch.tensor([[0, 2]]), 3).size) == (3, 2)
    for names in ("ab", "ba", "b"):
        assert ranks_of(together, names).tolist() == [0, 1, 2] * len(names)


@pytest.mark.parametrize("row", [[2, 1], [1, 1], [0, 4], [-1, 2]])
def test_sketches_in_one_tensor_are_checked_as_others_are(row):
    together = Sketches(("a", "b"), torch.tensor([[0, 1], row]), 4)
    assert together["a"].size == 2
    with pytest.raises(ValueError, match="the index set"):
        together["b"]


def test_answers_are_handled_together_where_they_come_quickly(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(server.time, "perf_counter", lambda: now[0])

    def coming(waits):
        for number, wait in enumerate(waits):
            now[0] += wait
            yield number, wait

    def sizes(waits):
        return [len(block) for block in server._blocks(coming(waits))]

    assert sizes([0.001] * 40) == [16, 16, 8]
    assert sizes([1.0] * 3) == [1, 1, 1], "nobody waits for the next one to see this one"
    assert sizes([0.04] * 7) == [3, 3, 1]
    assert sizes([]) == []
