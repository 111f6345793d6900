"""The algorithm against independent ways to compute it; what the published code would fail."""

import itertools
import random

import pytest
import torch
from safetensors.torch import save

import fslora_kernels
from fslora.client import _batches, payload_bytes
from fslora.data.tasks import Examples
from fslora.engines import sequential
from fslora.protocol import LocalRule
from fslora.server import run_round
from fslora.sketch import draw_sketches
from fslora_kernels.sampling import sketch_size
from fslora_kernels.seeds import fold_in

from .worlds import CLIENTS, RANK, examples, peft_model, world

RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)
SGD = LocalRule(optimizer="sgd", lr=0.05, steps=3, batch_size=3)
MOMENTUM = LocalRule(optimizer="sgd", lr=0.05, steps=3, batch_size=3, momentum=0.9, clip_norm=0.1)
ADAMW = LocalRule(optimizer="adamw", lr=0.01, steps=3, batch_size=3, accumulation=2)


@pytest.fixture(scope="module")
def folder(tiny_llama):
    return tiny_llama


def outside(sketch):
    rows = torch.ones(sketch.rank, dtype=torch.bool)
    rows[slice(None) if sketch.index is None else sketch.index] = False
    return rows


def masked_global_training(folder, state, task):
    """Train the full factors of a vanilla PEFT model with forward W0 + s B Ω A; return them."""
    rule = task.local
    model = peft_model(folder)
    leaves, masks = {}, {}
    for name, pair in state.adapters.items():
        leaves[name] = (
            pair.lora_a.clone().requires_grad_(),
            pair.lora_b.t().clone().requires_grad_(),
        )
        sketch = task.sketches[name]
        masks[name] = torch.zeros(sketch.rank, dtype=torch.float64)
        masks[name][~outside(sketch)] = task.rank_scales.get(
            name, torch.tensor(sketch.correction, dtype=torch.float64)
        )
    parameters = [leaf for pair in leaves.values() for leaf in pair]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[rule.optimizer]
    options = {"momentum": rule.momentum} if rule.optimizer == "sgd" else {}
    optimizer = kind(parameters, lr=rule.lr, weight_decay=rule.weight_decay, **options)
    batches = _batches(examples(task.client_id), rule.batch_size, fold_in(task.key, "batches"))
    for _ in range(rule.steps):
        optimizer.zero_grad()
        for _ in range(rule.accumulation):
            ids = next(batches)["input_ids"]
            weights = {}
            for name, (a, b) in leaves.items():
                weights[f"{name}.lora_A.default.weight"] = a * masks[name][:, None]
                weights[f"{name}.lora_B.default.weight"] = b
            output = torch.func.functional_call(
                model, weights, kwargs={"input_ids": ids, "labels": ids}
            )
            (output.loss / rule.accumulation).backward()
        if rule.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, rule.clip_norm)
        optimizer.step()
    return {name: (a.detach(), b.detach()) for name, (a, b) in leaves.items()}


def test_batches_have_every_example_once_before_any_twice():
    ids = torch.arange(7)[:, None]
    data = Examples({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    batches = [batch["labels"] for batch in itertools.islice(_batches(data, 3, key=5), 14)]
    assert {len(batch) for batch in batches} == {3}
    passes = torch.cat(batches).view(6, 7)
    assert passes.sort(dim=1).values.eq(ids.t()).all()
    assert len(passes.unique(dim=0)) == 6, "in a new order each time"
    for batch in itertools.islice(_batches(data, 9, key=5), 3):
        assert batch["labels"].sort(dim=0).values.equal(ids), "all that there are"


def test_every_module_is_in_training_mode(folder):
    """``from_pretrained`` leaves all in eval mode, and PEFT's wrapper around it is not."""
    model, strategy, state, client = world(folder, RATIOS)
    assert model.training
    assert not model.base_model.model.training
    for task in strategy.assign(state, CLIENTS[:2]):
        client(task)
        assert all(module.training for module in model.modules())
        model.eval()


@pytest.mark.parametrize("rule", [SGD, MOMENTUM, ADAMW], ids=["sgd", "momentum_clip", "adamw"])
def test_the_small_module_equals_the_masked_global_adapter(folder, rule):
    _, strategy, state, client = world(folder, RATIOS, rule)
    for task in strategy.assign(state, CLIENTS):
        update = client(task)
        trained = masked_global_training(folder, state, task)
        for name, (a, b) in trained.items():
            sketch = task.sketches[name]
            rows = ~outside(sketch)
            delta_a = a - state.adapters[name].lora_a
            delta_b = b.t() - state.adapters[name].lora_b
            torch.testing.assert_close(update.delta[name].lora_a, delta_a[rows])
            torch.testing.assert_close(update.delta[name].lora_b, delta_b[rows])
            assert update.delta[name].lora_a.abs().sum() > 0
            if rule is not ADAMW:  # AdamW's epsilon moves rows whose gradient is zero by nothing
                assert delta_a[outside(sketch)].eq(0).all()


def test_the_first_round_draws_by_the_key_of_round_one(folder):
    _, strategy, state, _ = world(folder, RATIOS)
    for task, ratio in zip(strategy.assign(state, CLIENTS), RATIOS, strict=True):
        key, size = fold_in(state.key, 1, task.client_id), sketch_size(RANK, ratio)
        for name, sketch in draw_sketches(key, list(state.adapters), RANK, size).items():
            assert torch.equal(task.sketches[name].rows, sketch.rows)


@pytest.mark.parametrize("server", ["fedavg", "fedadam"])
def test_only_selected_ranks_change_and_a_and_b_share_them(folder, server):
    _, strategy, state, client = world(folder, RATIOS, ADAMW, server_optimizer=server)
    (task,) = strategy.assign(state, ["one"])
    new = strategy.aggregate(state, [task], [client(task)])
    for name, sketch in task.sketches.items():
        assert sketch.size == 1
        for old_rows, new_rows in zip(state.adapters[name], new.adapters[name], strict=True):
            changed = (old_rows != new_rows).any(dim=1)
            assert torch.equal(changed, ~outside(sketch)), name


def test_compact_shapes_and_bytes_are_the_formula(folder):
    _, strategy, state, client = world(folder, RATIOS)
    for task, ratio in zip(strategy.assign(state, CLIENTS), RATIOS, strict=True):
        size = sketch_size(RANK, ratio)
        formula = sum(
            size * (pair.lora_a.shape[1] + pair.lora_b.shape[1]) * 8
            for pair in state.adapters.values()
        )
        update = client(task)
        for adapters in (task.adapters, update.delta):
            assert payload_bytes(adapters, {}) == (formula, 0)
            message = save(
                {f"{n}/{f}": t for n, p in adapters.items() for f, t in p._asdict().items()}
            )
            header = int.from_bytes(message[:8], "little")
            assert len(message) - 8 - header == formula


def test_full_ratio_is_fedavg_lora(folder):
    """Two rounds against a plain loop: vanilla PEFT, torch.optim, mean of the trained weights."""
    _, strategy, state, client = world(folder, (1.0,) * 4, SGD)
    vanilla = peft_model(folder)
    lora = {n: p for n, p in vanilla.named_parameters() if p.requires_grad}
    weights = {n: p.detach().clone() for n, p in lora.items()}
    for _ in range(2):
        tasks = strategy.assign(state, CLIENTS)
        assert all(s.index is None for task in tasks for s in task.sketches.values())
        state, _ = run_round(state, strategy, sequential, client, CLIENTS)
        trained = []
        for task in tasks:
            for name, parameter in lora.items():
                parameter.data.copy_(weights[name])
            optimizer = torch.optim.SGD(lora.values(), lr=SGD.lr)
            batches = _batches(examples(task.client_id), 3, fold_in(task.key, "batches"))
            for _ in range(SGD.steps):
                optimizer.zero_grad()
                ids = next(batches)["input_ids"]
                vanilla(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
            trained.append({n: p.detach().clone() for n, p in lora.items()})
        weights = {n: sum(client[n] for client in trained) / 4 for n in weights}
    for name, pair in state.adapters.items():
        torch.testing.assert_close(pair.lora_a, weights[f"{name}.lora_A.default.weight"])
        torch.testing.assert_close(pair.lora_b.t(), weights[f"{name}.lora_B.default.weight"])


def test_the_server_divides_by_participants_not_by_coverage(folder):
    _, strategy, state, client = world(folder, RATIOS)
    tasks = strategy.assign(state, CLIENTS)
    updates = [client(task) for task in tasks]
    new = strategy.aggregate(state, tasks, updates)
    for name, pair in state.adapters.items():
        expected = pair.lora_a.clone()
        for task, update in zip(tasks, updates, strict=True):
            index = task.sketches[name].index
            rows = slice(None) if index is None else index
            expected[rows] += update.delta[name].lora_a / 4
        torch.testing.assert_close(new.adapters[name].lora_a, expected)


def test_fedadam_is_torchs_adam_on_the_negative_mean_change(folder):
    _, strategy, state, client = world(
        folder, RATIOS, SGD, server_optimizer="fedadam", server_lr=0.01
    )
    _, averaging, _, _ = world(folder, RATIOS, SGD)
    name = next(iter(state.adapters))
    parameter = state.adapters[name].lora_a.clone().requires_grad_()
    adam = torch.optim.Adam([parameter], lr=0.01)
    for _ in range(3):
        tasks = strategy.assign(state, CLIENTS)
        updates = [client(task) for task in tasks]
        mean = averaging.aggregate(state, tasks, updates).adapters[name].lora_a
        parameter.grad = state.adapters[name].lora_a - mean
        state = strategy.aggregate(state, tasks, updates)
        adam.step()
        torch.testing.assert_close(state.adapters[name].lora_a, parameter.detach())


def test_bits_do_not_depend_on_the_order_of_arrival(folder):
    _, strategy, state, client = world(folder, RATIOS)

    def shuffled(seed):
        def engine(client, tasks):
            updates = list(sequential(client, tasks))
            random.Random(seed).shuffle(updates)
            return iter(updates)

        return engine

    wanted, _ = run_round(state, strategy, sequential, client, CLIENTS)
    for seed in range(3):
        got, record = run_round(state, strategy, shuffled(seed), client, CLIENTS)
        assert [c.id for c in record.clients] == CLIENTS
        for name in wanted.adapters:
            assert torch.equal(got.adapters[name].lora_a, wanted.adapters[name].lora_a)
            assert torch.equal(got.adapters[name].lora_b, wanted.adapters[name].lora_b)


def test_the_sketched_delta_is_right_on_average(folder):
    """The mean of the layer's output over all sets of 2 of 4 ranks is the full adapter's."""
    model = peft_model(folder, rank=4)
    name = next(iter(fslora_kernels.fuse(model).fused))
    layer = model.get_submodule(name)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).double()
    outputs = []
    for chosen in itertools.combinations(range(4), 2):
        leaves = fslora_kernels.extract(model, {name: torch.tensor(chosen)})
        fslora_kernels.bind(model, leaves)
        outputs.append(layer(x).detach())
        fslora_kernels.unbind(model)
    torch.testing.assert_close(torch.stack(outputs).mean(0), layer(x).detach())


def test_a_clients_training_touches_nothing_but_its_leaves(folder):
    model, strategy, state, client = world(folder, RATIOS)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    random_state = torch.random.get_rng_state()
    (task,) = strategy.assign(state, ["one"])
    copies = {n: [t.clone() for t in p] for n, p in task.adapters.items()}
    update = client(task)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert not any(t.requires_grad or t.grad is not None for t in update.tensors())
    for name, pair in task.adapters.items():
        for copy, factor in zip(copies[name], pair, strict=True):
            assert torch.equal(copy, factor)
