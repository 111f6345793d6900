"""Clients train one after another in the same memory, and none finds anything of another."""

from dataclasses import replace
from weakref import ref

import pytest
import torch

import fslora_kernels
from fslora.guard import ClientCrashError, Guarded
from fslora.places import Places
from fslora.protocol import LocalRule, LoRAWeights
from fslora.stacks import stacked

from .worlds import CLIENTS, world

ADAMW = LocalRule(lr=0.01, steps=3, batch_size=2, weight_decay=0.1)
RATIOS = (0.25, 1.0, 0.5, 0.25)


def assert_same_updates(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.metrics == other.metrics
        for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
            assert torch.equal(mine, theirs)


DEPTH = {"forward": "full", "averaging": "inverse", "depth": "uniform"}


@pytest.mark.parametrize(
    ("trainable", "options"),
    [
        ("both", {}),
        ("b", {}),
        ("both", {"forward": "full"}),
        ("b", {"forward": "full"}),
        ("both", {"sampler": "importance"}),
        ("both", {"redraw": "step"}),
        ("both", DEPTH),
    ],
)
def test_who_trained_before_makes_no_difference(tiny_llama, trainable, options):
    rule = replace(ADAMW, trainable=trainable)
    _, strategy, state, client = world(tiny_llama, RATIOS, rule, head=True, **options)
    tasks = strategy.assign(state, CLIENTS)
    tasks += [replace(task, scale=0.5) for task in tasks]
    head = {n: t.clone() for task in tasks for n, t in task.extras.items()}
    alone = [replace(client)(task) for task in tasks]
    assert_same_updates([client(task) for task in tasks], alone)
    assert_same_updates([client(task) for task in reversed(tasks)][::-1], alone)
    assert all(torch.equal(task.extras[n], t) for task in tasks for n, t in head.items())


def test_an_answer_stays_what_it_is_while_others_train(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS, ADAMW)
    first, *others = strategy.assign(state, CLIENTS)
    update = client(first)
    kept = [tensor.clone() for tensor in update.tensors()]
    for task in (*others, first):
        client(task)
    assert all(map(torch.equal, update.tensors(), kept))


def test_a_client_that_crashed_leaves_nothing_behind(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS, ADAMW)
    task = strategy.assign(state, CLIENTS)[0]
    wanted = client(task)

    class Crashing:
        def __init__(self, task):
            self.task, self.left = task, 2

        def loss(self, model, batch):
            self.left -= 1
            if self.left < 0:
                raise ClientCrashError("now")
            return self.task.loss(model, batch)

    object.__setattr__(client, "task", Crashing(client.task))
    assert Guarded(client)(task).failure == "now"
    object.__setattr__(client, "task", client.task.task)
    assert_same_updates([client(task)], [wanted])


def test_out_of_memory_leaves_its_memory_to_the_retry(tiny_llama):
    """The attempt that failed has moments and, in the full forward, the frozen rest."""
    _, strategy, state, client = world(tiny_llama, RATIOS, ADAMW, forward="full")
    task, seen = strategy.assign(state, CLIENTS)[0], []

    class Full:
        def __init__(self, task):
            self.task, self.left = task, 2

        def supervised(self, batch):
            return self.task.supervised(batch)

        def loss(self, model, batch):
            self.left -= 1
            if self.left == 0:
                raise torch.OutOfMemoryError
            if self.left < 0:  # in the retry
                seen.append(sum(map(len, moments(client))) + sum(map(bool, frozen(client))))
            return self.task.loss(model, batch)

    object.__setattr__(client, "task", Full(client.task))
    assert Guarded(client)(task).metrics["pieces"] == 2.0
    first_loss_of_the_retry = seen[0]
    assert first_loss_of_the_retry == 1  # the frozen rest of the retry itself


def places_of(client):
    return client._resident[3]._places.values()


def moments(client):
    return [ranks._optimizer.state for ranks in places_of(client)]


def frozen(client):
    return [ranks._used[1] for ranks in places_of(client)]


def stack_of(rows, width=4):
    return stacked({"q": LoRAWeights(torch.rand(rows, width), torch.rand(rows, width))})


def addresses(ranks):
    return {t.untyped_storage().data_ptr() for t in ranks.parameters}


def test_places_are_in_the_memory_of_the_largest():
    places = Places(torch.device("cpu"))
    small = places.place(stack_of(2), [], ADAMW)
    assert places.place(stack_of(2), [], ADAMW) is small
    gone = ref(small.parameters[0])
    large = places.place(stack_of(5), [], ADAMW)
    assert gone() is not None
    del small
    assert gone() is None  # nobody keeps memory that is too small
    again, rule = places.place(stack_of(2), [], ADAMW), replace(ADAMW, lr=1.0)
    assert len(again.parameters[0]) == 4
    assert addresses(again) == addresses(large)
    assert addresses(places.place(stack_of(5), [], rule)) == addresses(large)
    assert places.place(stack_of(5), [], rule) is not large
    assert addresses(places.place(stack_of(1, 7), [], ADAMW)).isdisjoint(addresses(large))


def test_layouts_that_never_come_back_are_forgotten():
    places = Places(torch.device("cpu"))
    first = places.place(stack_of(200), [], ADAMW)
    gone = ref(first)
    del first
    for rows in range(1, 100):
        places.place(stack_of(rows), [], ADAMW)
    assert gone() is None


def test_a_head_of_its_own_has_a_place_of_its_own():
    places, head = Places(torch.device("cpu")), torch.nn.Parameter(torch.rand(3))
    with_head = places.place(stack_of(2), [head], ADAMW)
    assert with_head.parameters[-1] is head
    assert places.place(stack_of(2), [], ADAMW) is not with_head


def test_binding_again_is_binding(tiny_llama):
    model, strategy, state, client = world(tiny_llama, RATIOS, ADAMW)
    one, other = (task.adapters for task in strategy.assign(state, CLIENTS[:2]))
    batch = {"input_ids": client.data["one"].tensors["input_ids"]}
    model.eval()
    with torch.no_grad():
        whole = model(**batch).logits
        binding = fslora_kernels.bind(model, one, scale=1.0)
        wanted = model(**batch).logits
        fslora_kernels.bind(model, other, scale=1.0)
        assert not torch.equal(model(**batch).logits, wanted)
        binding.again()
        assert torch.equal(model(**batch).logits, wanted)
        fslora_kernels.unbind(model)
        assert torch.equal(model(**batch).logits, whole)
