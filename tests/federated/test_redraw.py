"""A new sketch for every local step, against torch's own optimizers on a parameter per rank."""

import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from fslora.client import _batches, download_bytes, upload_bytes
from fslora.clock import step_counter
from fslora.config import SimulateConfig
from fslora.engines import sequential
from fslora.options import expected_step
from fslora.protocol import LocalRule
from fslora.server import run_round
from fslora.strategies import fedit, fslora
from fslora_kernels.sampling import draw_uniform
from fslora_kernels.seeds import fold_in

from .test_options import TEN, measured
from .worlds import CLIENTS, RANK, assert_same_bits, examples, peft_model, world

RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)
SGD = LocalRule(optimizer="sgd", lr=0.05, steps=4, batch_size=3)
MOMENTUM = replace(SGD, momentum=0.9, clip_norm=0.1, weight_decay=0.1)
ADAMW = LocalRule(optimizer="adamw", lr=0.01, steps=4, batch_size=3, accumulation=2)
ADAMW_DECAY = replace(ADAMW, weight_decay=0.3)
FULL = {"forward": "full", "averaging": "inverse"}


def drawn(task, state, size):
    """The index sets of the task's steps, by the documented generator alone."""
    modules = list(state.adapters)
    for step in range(task.local.steps):
        rows = draw_uniform(fold_in(task.key, "sketch", step), modules, RANK, size)
        yield dict(zip(modules, rows, strict=True))


def unions(task, state, size):
    sets = list(drawn(task, state, size))
    return {name: torch.cat([each[name] for each in sets]).unique() for name in state.adapters}


def trained_rank_by_rank(folder, state, task, size, *, full):
    """Vanilla PEFT; every rank of A and B a parameter, which torch skips without a gradient."""
    rule, model = task.local, peft_model(folder)
    ranks = {
        name: [[row.clone().requires_grad_() for row in factor] for factor in pair]
        for name, pair in state.adapters.items()
    }
    every = [row for pair in ranks.values() for factor in pair for row in factor]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[rule.optimizer]
    options = {"momentum": rule.momentum} if rule.optimizer == "sgd" else {}
    optimizer = kind(every, lr=rule.lr, weight_decay=rule.weight_decay, **options)
    batches = _batches(examples(task.client_id), rule.batch_size, fold_in(task.key, "batches"))
    for indices in drawn(task, state, size):
        optimizer.zero_grad()
        for _ in range(rule.accumulation):
            weights = {}
            for name, (a, b) in ranks.items():
                chosen = set(indices[name].tolist())
                unused = 1.0 if full else 0.0

                def rows(factor, used, chosen=chosen, unused=unused):
                    return torch.stack(
                        [
                            row * used if j in chosen else row.detach() * unused
                            for j, row in enumerate(factor)
                        ]
                    )

                scale = 1.0 if full else RANK / size
                weights[f"{name}.lora_A.default.weight"] = rows(a, scale)
                weights[f"{name}.lora_B.default.weight"] = rows(b, 1.0).t()
            ids = next(batches)["input_ids"]
            output = torch.func.functional_call(
                model, weights, kwargs={"input_ids": ids, "labels": ids}
            )
            (output.loss / rule.accumulation).backward()
        if rule.clip_norm:
            torch.nn.utils.clip_grad_norm_(every, rule.clip_norm)
        optimizer.step()
    return {
        name: [torch.stack([row.detach() for row in factor]) for factor in pair]
        for name, pair in ranks.items()
    }


@pytest.mark.parametrize("options", [{}, FULL], ids=["sketched", "full"])
@pytest.mark.parametrize(
    "rule", [MOMENTUM, ADAMW, ADAMW_DECAY], ids=["momentum_clip_decay", "adamw", "adamw_decay"]
)
def test_each_rank_is_trained_as_a_parameter_of_its_own(tiny_llama, rule, options):
    _, strategy, state, client = world(tiny_llama, RATIOS, rule, redraw="step", **options)
    for task, size in zip(strategy.assign(state, CLIENTS[1:3]), (2, 4), strict=True):
        update = client(task)
        trained = trained_rank_by_rank(tiny_llama, state, task, size, full=bool(options))
        for name, union in unions(task, state, size).items():
            assert torch.equal(task.sketches[name].index, union)
            for change, new, old in zip(
                update.delta[name], trained[name], state.adapters[name], strict=True
            ):
                torch.testing.assert_close(change, (new - old)[union])
                assert (change != 0).any(dim=1).all(), "every rank of the union was trained"


@pytest.mark.parametrize("rule", [MOMENTUM, ADAMW_DECAY], ids=["momentum", "adamw"])
def test_drawing_every_rank_anew_is_the_plain_training_heads_included(tiny_llama, rule):
    _, strategy, state, client = world(tiny_llama, (1.0,) * 4, rule, head=True)
    (task,) = strategy.assign(state, ["one"])
    plain, redrawn = client(task), client(replace(task, local=replace(rule, redrawn_ranks=RANK)))
    for name, pair in plain.delta.items():
        for ours, theirs in zip(redrawn.delta[name], pair, strict=True):
            torch.testing.assert_close(ours, theirs)
    for name, change in plain.extras.items():
        assert change.any()
        torch.testing.assert_close(redrawn.extras[name], change)


@pytest.mark.parametrize("rule", [MOMENTUM, ADAMW], ids=["momentum", "adamw"])
def test_one_step_is_the_plain_step_on_its_sketch(tiny_llama, rule):
    rule = replace(rule, steps=1)
    _, strategy, state, client = world(tiny_llama, RATIOS, rule, redraw="step")
    for task in strategy.assign(state, CLIENTS):
        plain = replace(task, local=replace(task.local, redrawn_ranks=0))
        one, other = client(task), client(plain)
        for name, pair in one.delta.items():
            for ours, theirs in zip(pair, other.delta[name], strict=True):
                torch.testing.assert_close(ours, theirs)


def test_with_every_rank_it_is_fedavg_bit_for_bit(tiny_llama):
    _, ours, state, client = world(tiny_llama, (1.0,) * 4, ADAMW, head=True, redraw="step")
    _, theirs, other, _ = world(tiny_llama, (1.0,) * 4, ADAMW, fedit, head=True)
    for strategy in (ours, theirs):
        tasks = strategy.assign(state, CLIENTS)
        new = strategy.aggregate(state, tasks, [client(task) for task in tasks])
        other = new if strategy is ours else other
    assert_same_bits(new, other)


@pytest.mark.parametrize("options", [{}, FULL], ids=["sketched", "full"])
def test_bytes_are_those_of_the_union_and_what_travels(tiny_llama, options):
    _, strategy, state, client = world(tiny_llama, RATIOS, SGD, redraw="step", **options)
    for task, size in zip(strategy.assign(state, CLIENTS), (1, 2, 4, 8), strict=True):
        down = up = 0
        for name, union in unions(task, state, size).items():
            features = sum(factor.shape[1] for factor in state.adapters[name])
            up += len(union) * features * 8
            down += (RANK if options else len(union)) * features * 8
        assert (download_bytes(task), upload_bytes(task)) == ((down, 0), (up, 0))
        delta = client(task).delta
        sent = ({**task.adapters, **{f"frozen {n}": p for n, p in task.frozen.items()}}, delta)
        for adapters, wanted in zip(sent, (down, up), strict=True):
            tensors = {f"{n}/{f}": t for n, p in adapters.items() for f, t in p._asdict().items()}
            message = save({name: tensor.contiguous() for name, tensor in tensors.items()})
            assert len(message) - 8 - int.from_bytes(message[:8], "little") == wanted


@pytest.mark.parametrize("options", [{}, FULL], ids=["sketched", "full"])
def test_a_step_computes_with_as_many_ranks_as_without(tiny_llama, options):
    _, plain, state, client = world(tiny_llama, RATIOS, SGD, **options)
    _, redrawn, _, _ = world(tiny_llama, RATIOS, SGD, redraw="step", **options)
    flops = step_counter(client, examples("one"))
    tasks = redrawn.assign(state, CLIENTS)
    for one, other in zip(plain.assign(state, CLIENTS), tasks, strict=True):
        assert flops(one) == flops(other)
    again = redrawn.assign(replace(state, round=9), CLIENTS)
    assert [flops(task) for task in again] == [flops(task) for task in tasks], "whatever is drawn"


def test_the_record_says_what_a_step_trains_and_which_ranks_were(tiny_llama):
    _, strategy, state, client = world(tiny_llama, (1 / 4,) * 4, SGD, redraw="step")
    tasks = strategy.assign(state, CLIENTS)
    _, record = run_round(state, strategy, sequential, client, CLIENTS)
    assert [one.ratio for one in record.clients] == [1 / 4] * 4
    held = torch.zeros(RANK)
    for task in tasks:
        for union in unions(task, state, 2).values():
            held[union] += 1 / len(tasks) / len(state.adapters)
    assert record.coverage == pytest.approx(held.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("forward", "averaging"),
    [
        *(("sketched", "participants"), ("sketched", "count")),
        *(("full", "participants"), ("full", "count"), ("full", "inverse")),
    ],
)
def test_a_monte_carlo_linear_step_moves_by_the_factor(forward, averaging):
    options = {"forward": forward, "averaging": averaging}
    exact = expected_step([*TEN.values()], 6, **options, draws=4)
    found = measured(TEN, 6, rounds=30, local=SGD, redraw="step", **options)
    assert found == pytest.approx(exact, rel=0.05)


def test_count_has_its_closed_forms():
    """One client moves a rank by its mean over the steps; many steps train every rank."""
    for forward, alone in (("sketched", 1.0), ("full", 0.25)):
        assert expected_step([0.25], 1, forward, "count", draws=5) == pytest.approx(alone)
        found = expected_step([0.25] * 7, 3, forward, "count", draws=500)
        assert found == pytest.approx(alone), "nothing is left out, so the mean is of all"


def test_what_does_not_go_together_is_refused():
    for sampler in ("balanced", "nested", "class-shared", "importance"):
        with pytest.raises(ValueError, match=r"--redraw step .* --sampler uniform with it"):
            SimulateConfig(model="m", data="d", redraw="step", sampler=sampler)
    for rule in ({"trainable": "b"}, {"penalty": 0.1}):
        with pytest.raises(ValueError, match="a new sketch for every step"):
            LocalRule(redrawn_ranks=2, **rule)


def test_the_warning_of_longer_steps_counts_the_union():
    with pytest.warns(UserWarning, match=r"--averaging count moves a rank 1\.\d+ times") as found:
        fslora(TEN, replace(SGD, steps=20), averaging="count", redraw="step", per_round=10)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fslora(TEN, SGD, redraw="step")
