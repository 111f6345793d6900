from dataclasses import replace

import pytest
import torch

from fslora.engines import sequential
from fslora.protocol import LocalRule, LoRAWeights
from fslora.server import NoUsableUpdateError, draw_cohort, run_round
from fslora.validate import rejection

from .worlds import CLIENTS, world

RATIOS = (1 / 8, 1 / 4, 1 / 2, 1.0)


def first_pair(update, change):
    """The update with its first module's factors changed."""
    name = next(iter(update.delta))
    return replace(update, delta={**update.delta, name: LoRAWeights(*change(update.delta[name]))})


SPOILT = {
    "not finite": lambda u: first_pair(u, lambda p: (p.lora_a * float("nan"), p.lora_b)),
    "training loss is not finite": lambda u: replace(u, metrics={"loss": float("inf")}),
    "answers another task": lambda u: replace(u, nonce=u.nonce + 1),
    "no examples": lambda u: replace(u, num_examples=0),
    "modules are not those": lambda u: replace(u, delta=dict(list(u.delta.items())[1:])),
    "is torch.float64": lambda u: first_pair(u, lambda p: (p.lora_a[:, 1:], p.lora_b)),
    "is torch.float32": lambda u: first_pair(u, lambda p: (p.lora_a.float(), p.lora_b)),
}


@pytest.mark.parametrize("reason", SPOILT)
def test_a_bad_update_is_left_out_and_recorded(tiny_llama, reason):
    _, strategy, state, client = world(tiny_llama, RATIOS)

    def spoiling(task):
        update = client(task)
        return SPOILT[reason](update) if task.client_id == "two" else update

    got, record = run_round(state, strategy, sequential, spoiling, CLIENTS)
    others = [c for c in CLIENTS if c != "two"]
    wanted, _ = run_round(state, strategy, sequential, client, others)
    by_id = {entry.id: entry for entry in record.clients}
    assert reason in by_id["two"].rejected
    assert all(by_id[c].rejected is None for c in others)
    for name, pair in wanted.adapters.items():
        assert torch.equal(got.adapters[name].lora_a, pair.lora_a)
        assert torch.equal(got.adapters[name].lora_b, pair.lora_b)


def test_a_client_that_diverges_is_left_out(tiny_llama):
    """A learning rate that makes the loss overflow, in float32 as users train."""
    local = LocalRule(optimizer="sgd", lr=1e30, steps=4, batch_size=3)
    _, strategy, state, client = world(tiny_llama, RATIOS, local)
    with pytest.raises(NoUsableUpdateError, match=r"Lower --lr") as error:
        run_round(state, strategy, sequential, client, CLIENTS)
    assert all(f"{name}: " in str(error.value) for name in CLIENTS)


def test_a_client_that_never_answers_is_recorded(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS)

    def engine(client, tasks):
        return (client(task) for task in tasks if task.client_id != "three")

    new, record = run_round(state, strategy, engine, client, CLIENTS)
    silent = next(entry for entry in record.clients if entry.id == "three")
    assert silent.rejected == "it did not answer"
    assert silent.bytes_up == 0 < silent.bytes_down
    assert new.round == 1


def test_the_record_adds_up(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS)
    _, record = run_round(state, strategy, sequential, client, CLIENTS)
    assert record.bytes_up == sum(entry.bytes_up for entry in record.clients)
    assert record.bytes_down == record.adapter_bytes_down + record.head_bytes_down
    assert [entry.ratio for entry in record.clients] == list(RATIOS)
    assert [entry.bytes_up for entry in record.clients][3] == (8 * record.clients[0].bytes_up)
    assert record.train_loss == pytest.approx(sum(e.loss for e in record.clients) / 4)
    assert sum(record.coverage) == pytest.approx((1 + 2 + 4 + 8) / 4)


def test_cohorts_are_drawn_evenly_and_by_the_seed():
    names = [f"c{n}" for n in range(10)]
    counts = dict.fromkeys(names, 0)
    for number in range(2000):
        cohort = draw_cohort(0, number, names, 3)
        assert len(set(cohort)) == 3
        for name in cohort:
            counts[name] += 1
    assert all(abs(count - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5 for count in counts.values())
    assert draw_cohort(0, 1, names, 3) == draw_cohort(0, 1, names, 3)
    assert any(draw_cohort(0, n, names, 3) != draw_cohort(1, n, names, 3) for n in range(5))
    with pytest.raises(ValueError, match="between 1 and 10"):
        draw_cohort(0, 1, names, 11)


def test_a_rejection_names_nothing_when_all_is_well(tiny_llama):
    _, strategy, state, client = world(tiny_llama, RATIOS)
    (task,) = strategy.assign(state, ["one"])
    assert rejection(task, client(task)) is None
