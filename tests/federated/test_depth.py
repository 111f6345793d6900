"""Training the upper layers only: who trains what, how it is weighted, and what it spares."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from fslora.client import _batches, download_bytes, upload_bytes
from fslora.clock import step_counter
from fslora.config import SimulateConfig
from fslora.depth import layers_of, read_depth
from fslora.engines import sequential
from fslora.protocol import LocalRule, LoRAWeights
from fslora.server import run_round
from fslora.strategies import fslora
from fslora_kernels.seeds import fold_in

from .worlds import CLIENTS, RANK, assert_same_bits, examples, linear_update, peft_model, world

RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)
SGD = LocalRule(optimizer="sgd", lr=0.05, steps=2, batch_size=3)
ADAMW = LocalRule(optimizer="adamw", lr=0.01, steps=3, batch_size=3)
UNBIASED = {"forward": "full", "averaging": "inverse"}
UNIFORM = {**UNBIASED, "depth": "uniform"}


def test_layers_follow_their_numbers_and_what_has_none_is_on_top():
    modules = [
        *(f"model.encoder.layer.{n}.attention.{p}" for n in (10, 2, 0) for p in ("query", "value")),
        *("model.pooler.dense", "model.decoder.block.1.q", "model.encoder.layer.2.mlp.0.down"),
    ]
    short = {name: name if "pooler" in name else name.split(".", 3)[-1] for name in modules}
    assert [sorted(map(short.get, layer)) for layer in layers_of(modules)] == [
        ["0.attention.query", "0.attention.value"],
        ["2.attention.query", "2.attention.value", "2.mlp.0.down"],
        ["10.attention.query", "10.attention.value"],
        ["1.q"],
        ["model.pooler.dense"],
    ]


@pytest.mark.parametrize(
    ("depth", "ratio", "least", "wanted"),
    [
        ("all", 1 / 8, 0.1, [1, 1, 1, 1]),
        ("top:1", 1 / 8, 0.1, [1, 1, 1, 1]),  # of those layers that are trained at all
        ("uniform", 1 / 8, 0.1, [1 / 4, 1 / 2, 3 / 4, 1]),
        ("uniform", 1 / 8, 0.6, [0.6, 0.6, 3 / 4, 1]),
        ("by-ratio", 1 / 8, 0.1, [0.1, 0.1, 0.1, 1]),
        ("by-ratio", 1 / 2, 0.1, [0.1, 0.1, 1 / 2, 1]),
        ("by-ratio", 1.0, 0.1, [1 / 4, 1 / 2, 3 / 4, 1]),
    ],
)
def test_probabilities_of_the_layers_from_the_lowest(depth, ratio, least, wanted):
    assert read_depth(depth).probabilities(4, ratio, least) == pytest.approx(wanted)


@pytest.mark.parametrize("text", ["", "top", "top:0", "top:-1", "top:x", "half", "uniform:2"])
def test_what_is_no_depth_is_refused(text):
    with pytest.raises(ValueError, match="none of all, uniform, by-ratio and top:K"):
        SimulateConfig(model="m", data="d", depth=text)


def test_what_does_not_go_together_is_refused():
    for options in ({}, {"forward": "full"}, {"forward": "full", "averaging": "count"}):
        with pytest.raises(ValueError, match=r"use --forward full --averaging inverse.*top:K"):
            SimulateConfig(model="m", data="d", depth="uniform", **options)
    with pytest.raises(ValueError, match="cannot be made up for"):
        SimulateConfig(model="m", data="d", depth_min_probability=0.0)


# --- four layers of one module, without a model

MODULES = [f"layers.{n}.q" for n in (0, 1, 2, 10)]
BOTH = dict(zip(CLIENTS, (1 / 8, 1.0) * 2, strict=True))


def many_rounds(rounds=250, **options):
    """Tasks of many rounds, and how far each module moved by a linear step, of the full one's."""
    a, b = torch.zeros(RANK, 1).double(), torch.ones(RANK, 1).double()
    strategy = fslora(BOTH, SGD, **options)
    state = strategy.init(dict.fromkeys(MODULES, LoRAWeights(a, b)), {}, 3)
    every, moved = [], torch.zeros(len(MODULES), dtype=torch.float64)
    for number in range(rounds):
        tasks = strategy.assign(replace(state, round=number), CLIENTS)
        new = strategy.aggregate(state, tasks, [linear_update(task, -1.0) for task in tasks])
        moved += torch.stack([pair.lora_a.mean() for pair in new.adapters.values()]) / rounds
        every += tasks
    return every, moved


@pytest.mark.parametrize(
    ("depth", "redraw"), [("uniform", "round"), ("by-ratio", "round"), ("uniform", "step")]
)
def test_every_layer_is_trained_as_often_as_it_says_and_moves_alike(depth, redraw):
    options = {**UNBIASED, "depth": depth, "redraw": redraw, "depth_min_probability": 0.25}
    tasks, moved = many_rounds(**options)
    for ratio in set(BOTH.values()):
        own = [set(task.adapters) for task in tasks if BOTH[task.client_id] == ratio]
        assert all(trained == set(MODULES[-len(trained) :]) for trained in own), "from the top"
        shares = [sum(module in trained for trained in own) / len(own) for module in MODULES]
        wanted = torch.tensor(read_depth(depth).probabilities(4, ratio, 0.25))
        deviation = (wanted * (1 - wanted) / len(own)).sqrt()
        assert ((torch.tensor(shares) - wanted).abs() <= 4 * deviation + 1e-6).all()
    torch.testing.assert_close(moved, torch.ones(4).double(), rtol=0, atol=0.15)


def test_clients_and_rounds_draw_their_depth_on_their_own():
    tasks, _ = many_rounds(rounds=50, **UNIFORM)
    depths = torch.tensor([len(task.adapters) for task in tasks]).view(50, 4)
    assert all(len(row.unique()) > 1 for row in depths.t())
    assert (depths != depths[:, :1]).any()


# --- on a model of two layers


def by_depth(strategy, state, client_id="three"):
    """One task of each number of trained layers, from the rounds that happen to draw it."""
    found = {}
    for number in range(20):
        (task,) = strategy.assign(replace(state, round=number), [client_id])
        found[len(layers_of(task.adapters))] = task
    return found[1], found[2]


@pytest.mark.parametrize("rule", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_a_client_trains_its_sketches_above_and_nothing_below(tiny_llama, rule):
    """Against vanilla PEFT with the whole adapter, of which some ranks of some layers train."""
    _, strategy, state, client = world(tiny_llama, RATIOS, rule, **UNIFORM)
    for task in by_depth(strategy, state):
        model, update = peft_model(tiny_llama), client(task)
        leaves = {
            name: [factor.clone().requires_grad_() for factor in pair]
            for name, pair in task.adapters.items()
        }
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[rule.optimizer]
        parameters = [leaf for pair in leaves.values() for leaf in pair]
        optimizer = kind(parameters, lr=rule.lr, weight_decay=0.0)
        batches = _batches(examples(task.client_id), rule.batch_size, fold_in(task.key, "batches"))
        for _ in range(rule.steps):
            weights = {}
            for name, pair in state.adapters.items():
                rows = [factor.clone() for factor in pair]
                if name in leaves:
                    index = task.sketches[name].index
                    rows = [
                        old.index_copy(0, index, new)
                        for old, new in zip(rows, leaves[name], strict=True)
                    ]
                weights[f"{name}.lora_A.default.weight"] = rows[0]
                weights[f"{name}.lora_B.default.weight"] = rows[1].t()
            ids = next(batches)["input_ids"]
            optimizer.zero_grad()
            torch.func.functional_call(
                model, weights, kwargs={"input_ids": ids, "labels": ids}
            ).loss.backward()
            optimizer.step()
        assert update.delta.keys() == leaves.keys() == set(task.sketches)
        for name, pair in leaves.items():
            for change, new, old in zip(update.delta[name], pair, task.adapters[name], strict=True):
                torch.testing.assert_close(change, new.detach() - old)
                assert change.abs().sum() > 0


def test_the_backward_pass_stops_at_the_lowest_trained_layer(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, **UNIFORM)
    asks = {}
    for number, layer in enumerate(client.model.base_model.model.model.layers):
        layer.register_forward_hook(
            lambda _, __, output, number=number: asks.update({number: output.requires_grad})
        )
    flops = step_counter(client, examples("one"))
    upper, whole = by_depth(strategy, state)
    saved = {}
    for task in (upper, whole):
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.update({t.untyped_storage().data_ptr(): t.nbytes}) or t,
            lambda t: t,
        ):
            client(replace(task, local=replace(task.local, steps=1)))
        saved[task is whole] = sum(kept.values())
        assert asks == {0: task is whole, 1: True}
    assert saved[False] < 0.75 * saved[True]
    layers = client.model.base_model.model.model.layers
    base = sum(
        p.numel() for n, p in layers[0].named_parameters() if "proj" in n and "lora" not in n
    )
    tokens = SGD.batch_size * 12
    assert flops(whole) - flops(upper) > 2 * tokens * base, "one layer's products with dy"


def test_bytes_are_all_down_and_the_trained_layers_up(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, head=True, **UNIFORM)
    head = sum(tensor.nbytes for tensor in state.extras.values())
    features = {n: sum(f.shape[1] for f in pair) * 8 for n, pair in state.adapters.items()}
    for task in by_depth(strategy, state):
        up = sum(features[name] * 4 for layer in layers_of(task.adapters) for name in layer)
        assert download_bytes(task) == (sum(features.values()) * RANK, head)
        assert upload_bytes(task) == (up, head)
        tensors = {
            f"{n}/{f}": t for n, p in client(task).delta.items() for f, t in p._asdict().items()
        }
        message = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        assert len(message) - 8 - int.from_bytes(message[:8], "little") == up


def test_coverage_is_of_all_modules(tiny_llama):
    _, strategy, state, client = world(tiny_llama, (1.0,) * 4, SGD, **UNIFORM)
    state = replace(state, round=2)
    tasks = strategy.assign(state, CLIENTS)
    _, record = run_round(state, strategy, sequential, client, CLIENTS)
    share = sum(len(task.adapters) for task in tasks) / len(state.adapters) / 4
    assert 0.5 <= share < 1
    assert record.coverage == pytest.approx([share] * RANK, abs=1e-6)


def test_importance_goes_with_depth(tiny_llama):
    _, strategy, state, _ = world(tiny_llama, RATIOS, SGD, **UNIFORM, sampler="importance")
    _, plain, _, _ = world(tiny_llama, RATIOS, SGD, **UNBIASED, sampler="importance")
    upper, whole = by_depth(strategy, state)
    for task in (upper, whole):
        (other,) = plain.assign(replace(state, round=task.round - 1), [task.client_id])
        for share, layer in zip((1 / 2, 1.0), layers_of(other.adapters), strict=True):
            for name in set(layer) & set(task.sketches):
                one, two = task.sketches[name], other.sketches[name]
                assert torch.equal(one.index, two.index)
                torch.testing.assert_close(one.probability, share * two.probability)


# --- the fixed mode


def test_top_layers_alone_have_an_adapter_and_it_says_that_it_is_biased(tiny_llama):
    with pytest.warns(UserWarning, match=r"--depth top:1 is biased: it never trains the layers"):
        _, strategy, state, client = world(tiny_llama, RATIOS, SGD, depth="top:1")
    _, whole, all_of_it, _ = world(tiny_llama, RATIOS, SGD)
    _, upper = layers_of(all_of_it.adapters)
    assert set(state.adapters) == set(upper)
    for task, other in zip(
        strategy.assign(state, CLIENTS), whole.assign(all_of_it, CLIENTS), strict=True
    ):
        features = sum(sum(f.shape[1] for f in all_of_it.adapters[name]) for name in upper)
        assert download_bytes(task)[0] == task.sketches[upper[0]].size * features * 8
        assert upload_bytes(task) == download_bytes(task)
        for name in upper:
            assert torch.equal(task.adapters[name].lora_a, other.adapters[name].lora_a)
    for parameter in client.model.parameters():
        parameter.requires_grad_(False)
    asks = []
    bottom = client.model.base_model.model.model.layers[0]
    bottom.register_forward_hook(lambda _, __, output: asks.append(output.requires_grad))
    (task,) = strategy.assign(state, ["two"])
    assert set(client(task).delta) == set(upper)
    assert asks == [False] * SGD.steps


@pytest.mark.filterwarnings("ignore:--depth top")
def test_as_many_top_layers_as_there_are_is_all_of_them(tiny_llama):
    states = []
    for depth in ("all", "top:2", "top:9"):
        _, strategy, state, client = world(tiny_llama, RATIOS, SGD, depth=depth)
        tasks = strategy.assign(state, CLIENTS)
        states.append(strategy.aggregate(state, tasks, [client(task) for task in tasks]))
    for other in states[1:]:
        assert_same_bits(states[0], other)
