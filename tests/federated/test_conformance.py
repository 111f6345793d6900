"""What every strategy must satisfy; what each of them computes is in the tests beside."""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from fslora import checkpoint
from fslora.aggregation import in_task_order
from fslora.client import download_bytes, upload_bytes
from fslora.protocol import POOLED, LocalRule, LoRAWeights
from fslora.strategies import STRATEGIES
from fslora.validate import rejection

from .worlds import CLIENTS, RANK, assert_same_bits, examples, world

RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)
SIZES = dict(zip(CLIENTS, (1, 2, 4, 8), strict=True))
SGD = LocalRule(optimizer="sgd", lr=0.05, steps=2, batch_size=3)
ITEM = 8  # bytes of a float64

REMEMBERING = ("hetlora", "rolora", "flora", "fedex-lora", "local-only")  # something of clients

# FSLoRA's options that change what a client does with its ranks.
FULL = {"forward": "full", "averaging": "inverse"}
OPTIONS = {
    "fslora, importance": {"sampler": "importance"},
    "fslora, redraw": {"redraw": "step"},
    "fslora, full, redraw, depth": {**FULL, "redraw": "step", "depth": "uniform"},
    "fslora, top": {"depth": "top:1"},
}

everyone = pytest.mark.parametrize("name", [*STRATEGIES, *OPTIONS])


def make(folder, name, ratios=RATIOS, local=SGD, *, prune=False):
    options = {"penalty": 0.0} if name == "hetlora" and not prune else OPTIONS.get(name, {})
    factory = STRATEGIES[name.partition(",")[0]]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "--depth top:1 is biased")
        _, strategy, state, client = world(folder, ratios, local, factory, head=True, **options)
    client.data[POOLED] = examples("one")
    return strategy, state, client


def ordered(tasks, updates):
    return (update for _, update in in_task_order(tasks, updates))


def one_round(strategy, state, client, cohort=CLIENTS, change=lambda update: update):
    tasks = strategy.assign(state, cohort)
    updates = [change(client(task)) for task in tasks]
    return strategy.aggregate(state, tasks, ordered(tasks, updates))


def product(adapters, name):
    return adapters[name].lora_b.t() @ adapters[name].lora_a if name in adapters else 0.0


def increase(adapters, residual):
    """Module name to what is added to its base weight [E, D], dense, in the adapter's unit."""
    return {name: product(adapters, name) + product(residual, name) for name in adapters}


def model_of(strategy, state):
    """The mean of the evaluated models' dense weights, and of their heads."""
    states = strategy.evaluated(state)
    dense = [{**increase(each.adapters, each.base_residual), **each.extras} for each in states]
    return {name: sum(each[name] for each in dense) / len(dense) for name in dense[0]}


def assert_same_model(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name])


@everyone
def test_bits_do_not_depend_on_the_order_of_arrival(tiny_llama, name):
    strategy, state, client = make(tiny_llama, name)
    tasks = strategy.assign(state, CLIENTS)
    updates = [client(task) for task in tasks]
    wanted = strategy.aggregate(state, tasks, ordered(tasks, updates))
    for order in list(itertools.permutations(updates))[1::7]:
        got = strategy.aggregate(state, tasks, ordered(tasks, order))
        assert_same_bits(got, wanted)


@everyone
def test_a_permuted_cohort_gives_the_same_model(tiny_llama, name):
    strategy, state, client = make(tiny_llama, name)
    one, other = (one_round(strategy, state, client, order) for order in (CLIENTS, CLIENTS[::-1]))
    assert_same_model(model_of(strategy, one), model_of(strategy, other))


@everyone
def test_an_empty_cohort_leaves_the_model_alone(tiny_llama, name):
    strategy, state, _ = make(tiny_llama, name)
    assert strategy.assign(state, []) == []
    after = strategy.aggregate(state, [], iter(()))
    assert after.round == state.round + 1
    assert_same_bits(replace(after, round=0), state)


# With depth drawn, the change is divided by its probability.
@pytest.mark.parametrize("name", [n for n in (*STRATEGIES, *OPTIONS) if "depth" not in n])
def test_a_cohort_of_one_makes_its_model_the_global_one(tiny_llama, name):
    """But for FSLoRA below S = R, whose scale differs between a client and the server."""
    ratio = 1.0 if name.startswith("fslora") else 0.5
    strategy, state, client = make(tiny_llama, name, (ratio,) * 4)
    for _ in range(2):
        tasks = strategy.assign(state, ["two"])
        before = model_of(strategy, state)
        if not tasks:
            assert name == "zero-shot"
            return
        (task,) = tasks
        update = client(task)
        state = strategy.aggregate(state, tasks, [update])
        own = {n: t + update.extras[n] for n, t in task.extras.items()}
        for module in state.adapters:
            own[module] = product(task.residual, module) + product(task.frozen, module)
            if module in task.adapters:
                a, b = (
                    old + new if new.shape[0] else old
                    for old, new in zip(task.adapters[module], update.delta[module], strict=True)
                )
                own[module] = own[module] + b.t() @ a * task.scale
            elif name == "head-only":
                own[module] = before[module]
        assert_same_model(model_of(strategy, state), own)


@everyone
def test_weights_sum_to_one_a_cohort_that_learns_nothing_changes_nothing(tiny_llama, name):
    strategy, state, client = make(tiny_llama, name, (1.0,) * 4)

    def nothing(update):
        return replace(
            update,
            delta={n: LoRAWeights(*(t * 0 for t in p)) for n, p in update.delta.items()},
            extras={n: t * 0 for n, t in update.extras.items()},
        )

    before = model_of(strategy, state)
    for _ in range(2):
        state = one_round(strategy, state, client, change=nothing)
        assert_same_model(model_of(strategy, state), before)


@pytest.mark.parametrize("name", ["fslora", "fedit", "fedit-min", "fedit-max", "fed-plora"])
def test_with_every_rank_it_is_fedavg_bit_for_bit(tiny_llama, name):
    fedavg, state, client = make(tiny_llama, "fedit", (1.0,) * 4)
    strategy, other, _ = make(tiny_llama, name, (1.0,) * 4)
    for _ in range(2):
        state = one_round(fedavg, state, client)
        other = one_round(strategy, other, client)
    assert_same_bits(state, other)


@everyone
def test_a_saved_state_goes_on_with_the_same_bits(tiny_llama, tmp_path, name):
    strategy, state, client = make(tiny_llama, name, prune=True)
    state = one_round(strategy, state, client, ["one", "two", "four"])
    assert bool(state.client_state) == (name in REMEMBERING)
    checkpoint.save_state(tmp_path, state)
    loaded = checkpoint.load_state(tmp_path)
    assert_same_bits(state, loaded)
    assert_same_bits(one_round(strategy, state, client), one_round(strategy, loaded, client))


@everyone
def test_updates_are_valid_and_the_resident_model_keeps_its_bits(tiny_llama, name):
    strategy, state, client = make(tiny_llama, name)
    for _ in range(2):
        base = {n: p.clone() for n, p in client.model.named_parameters() if "norm" not in n}
        for task in strategy.assign(state, CLIENTS):
            assert rejection(task, client(task)) is None
        assert all(torch.equal(base[n], client.model.get_parameter(n)) for n in base)
        state = one_round(strategy, state, client)


# Ranks of A and of B that travel, (down, up), in the second round after one with all four clients.
ALL, SUM = RANK, sum(SIZES.values())
TRAVELS = {
    "fslora": lambda s: ((s, s), (s, s)),
    "fedit": lambda s: ((ALL, ALL), (ALL, ALL)),
    "fedit-min": lambda s: ((1, 1), (1, 1)),
    "fedit-max": lambda s: ((ALL, ALL), (ALL, ALL)),
    "hetlora": lambda s: ((s, s), (s, s)),
    "flexlora": lambda s: ((s, s), (s, s)),
    "ffa-lora": lambda s: ((0, ALL), (0, ALL)),
    "rolora": lambda s: ((0, ALL), (ALL, 0)),
    "fed-plora": lambda s: ((ALL, ALL), (s, s)),
    "head-only": lambda s: ((0, 0), (0, 0)),
}


def wire(adapters, extras):
    """Bytes of the tensors of a real message."""
    tensors = {
        f"{n}/{f}": t.contiguous()
        for n, p in adapters.items()
        for f, t in zip("ab", p, strict=True)
    }
    message = save({**tensors, **extras})
    return len(message) - 8 - int.from_bytes(message[:8], "little")


@pytest.mark.parametrize("name", TRAVELS)
def test_bytes_are_the_formula_and_what_travels(tiny_llama, name):
    strategy, state, client = make(tiny_llama, name, local=replace(SGD, lr=1e-9))
    state = one_round(strategy, state, client)
    head = sum(tensor.nbytes for tensor in state.extras.values())
    for task in strategy.assign(state, CLIENTS):
        sizes = TRAVELS[name](SIZES[task.client_id])
        down, up = (
            sum(
                (a * pair.lora_a.shape[1] + b * pair.lora_b.shape[1]) * ITEM
                for pair in state.adapters.values()
            )
            for a, b in sizes
        )
        assert download_bytes(task) == (down, head)
        assert upload_bytes(task) == (up, head)
        update = client(task)
        assert wire(update.delta, update.extras) == up + head
        sent = {**task.adapters, **{f"frozen {n}": p for n, p in task.frozen.items()}}
        assert wire(sent, task.extras) == down + head + task.held_bytes


@pytest.mark.parametrize("name", ["centralised", "local-only", "zero-shot"])
def test_references_send_nothing(tiny_llama, name):
    strategy, state, client = make(tiny_llama, name)
    tasks = strategy.assign(one_round(strategy, state, client), CLIENTS)
    assert [(download_bytes(t), upload_bytes(t)) for t in tasks] == [((0, 0), (0, 0))] * len(tasks)


def rows_of_residual(task, module):
    return task.residual[module].rank if module in task.residual else 0


@pytest.mark.parametrize("name", ["flora", "fedex-lora"])
def test_a_residual_is_downloaded_once_by_each_client(tiny_llama, name):
    """Rounds of two clients at rank 1; what is more than a matrix travels as the matrix."""
    strategy, state, client = make(tiny_llama, name, (1 / 8,) * 4)
    own = {"flora": (0, 1), "fedex-lora": (ALL, ALL)}[name]  # ranks of its adapter: down, up
    grows = {"flora": 2, "fedex-lora": 3 * ALL}[name]  # rows of a round of two
    started = {n: rows_of_residual(strategy.assign(state, ["one"])[0], n) for n in state.adapters}
    # What each client has seen, in rows: all that had been added when it last took part.
    seen = {client_id: dict.fromkeys(state.adapters, 0) for client_id in CLIENTS}
    there = dict(started)
    pairs = (["one", "two"], ["one", "three"], ["two", "three"])
    for cohort in pairs * 4:
        tasks = strategy.assign(state, cohort)
        for task in tasks:
            down = up = 0
            for module, pair in state.adapters.items():
                features_in, features_out = pair.lora_a.shape[1], pair.lora_b.shape[1]
                row = (features_in + features_out) * ITEM
                new = there[module] - seen[task.client_id][module]
                down += own[0] * row + min(new * row, features_in * features_out * ITEM)
                up += own[1] * row
                seen[task.client_id][module] = there[module]
            assert download_bytes(task)[0] == down
            assert upload_bytes(task)[0] == up
        state = strategy.aggregate(state, tasks, [client(task) for task in tasks])
        for module, pair in state.adapters.items():
            most = min(pair.lora_a.shape[1], pair.lora_b.shape[1])
            there[module] += grows  # rows that were ever added; the server keeps no more than most
            assert state.base_residual[module].rank == min(there[module], most)


@pytest.mark.parametrize("name", ["flexlora", "flora", "fedex-lora", "local-only"])
@pytest.mark.parametrize("options", [{"server_optimizer": "fedadam"}, {"server_lr": 0.5}])
def test_what_cannot_take_a_server_optimizer_says_so(name, options):
    with pytest.raises(ValueError, match="use --server-opt fedavg --server-lr 1"):
        STRATEGIES[name](dict.fromkeys(CLIENTS, 0.5), SGD, **options)


def test_rolora_refuses_momentum_but_not_a_learning_rate():
    with pytest.raises(ValueError, match="rolora keeps one factor"):
        STRATEGIES["rolora"]({}, SGD, server_optimizer="fedadam")
    STRATEGIES["rolora"]({}, SGD, server_lr=0.5)


@pytest.mark.parametrize("name", ["fslora", "hetlora", "flexlora", "flora", "fed-plora"])
def test_a_ratio_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match="ratio"):
        STRATEGIES[name]({"one": 1.5}, SGD)
