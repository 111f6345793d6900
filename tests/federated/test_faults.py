from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fslora import checkpoint
from fslora.aggregation import averaged
from fslora.config import SimulateConfig
from fslora.engines import sequential
from fslora.faults import Faults, read_faults
from fslora.guard import Guarded
from fslora.presets import chaos
from fslora.protocol import LocalRule
from fslora.server import NoUsableUpdateError, run_round
from fslora.simulate import simulate

from .test_simulate import outcome
from .worlds import CLIENTS, assert_same_bits, world

RATIOS = (1 / 8, 1 / 4, 1 / 2, 1 / 2)
LOCAL = LocalRule(optimizer="sgd", lr=0.05, steps=3, batch_size=5, accumulation=2)


def one_round(folder, faults=None, client=None, local=LOCAL):
    """(record by client, next state, trainer, state) of a round of four clients."""
    _, strategy, state, trainer = world(folder, RATIOS, local)
    client = client or Guarded(trainer, 0, faults or Faults())
    new, record = run_round(state, strategy, sequential, client, CLIENTS)
    return {entry.id: entry for entry in record.clients}, new, trainer, state


class Raising:
    """A task whose loss raises the first ``times`` times it is asked, for one client's examples."""

    def __init__(self, task, error, times):
        self.task, self.error, self.left = task, error, times

    def supervised(self, batch):
        return self.task.supervised(batch)

    def loss(self, model, batch):
        if self.left:
            self.left -= 1
            raise self.error
        return self.task.loss(model, batch)


def test_faults_are_read_and_what_is_wrong_is_named():
    assert read_faults("crash=0.05, oom=1") == Faults(crash=0.05, oom=1)
    assert read_faults("") == Faults()
    for text in ("crush=0.1", "crash", "crash=often", "crash=0.1,crash=0.2"):
        with pytest.raises(ValueError, match="none of crash=P, nan=P, oom=P, slow=P"):
            read_faults(text)
    with pytest.raises(ValueError, match="nan is a probability"):
        read_faults("nan=1.5")


def test_a_slow_client_needs_a_clock(settings):
    with pytest.raises(ValueError, match="--faults slow needs a clock"):
        SimulateConfig(**{**settings, "faults": "slow=0.1"})


def test_without_faults_a_guarded_client_gives_the_bits_of_a_bare_one(tiny_llama):
    _, new, trainer, _ = one_round(tiny_llama)
    _, bare, *_ = one_round(tiny_llama, client=trainer)
    assert_same_bits(new, bare)


def assert_close(one, other):
    """But for rounding: the losses, and so the gradients, are float32's."""
    for name, pair in one.items():
        for a, b in zip(pair, other[name], strict=True):
            assert float((a - b).norm()) < 1e-6 * float(a.norm())


@pytest.mark.parametrize("pieces", [2, 3, 5, 9])
def test_a_batch_in_pieces_gives_the_same_update(tiny_llama, pieces):
    """Also where the pieces are unequal, weigh unlike, or are more than the examples."""
    _, strategy, state, trainer = world(tiny_llama, RATIOS, LOCAL)
    labels = trainer.data["three"].tensors["labels"] = (
        trainer.data["three"].tensors["labels"].clone()
    )
    labels[0, 3:], labels[4] = -100, -100  # most of one row, all of another
    (task,) = strategy.assign(state, ["three"])
    whole, apart = trainer(task), trainer(replace(task, local=replace(LOCAL, pieces=pieces)))
    assert whole.metrics["loss"] == pytest.approx(apart.metrics["loss"], rel=1e-6)
    assert_close(whole.delta, apart.delta)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_client_that_really_runs_out_of_memory_tries_again_in_pieces(tiny_llama, error):
    _, wanted, trainer, _ = one_round(tiny_llama)
    client = Guarded(replace(trainer, task=Raising(trainer.task, error, times=2)))
    found, new, *_ = one_round(tiny_llama, client=client)
    assert found["one"].rejected is None
    assert found["one"].fault == "it ran out of memory, and computed each batch in 4 pieces"
    assert found["one"].bytes_up > 0
    assert {found[c].fault for c in CLIENTS[1:]} == {None}
    assert_close(wanted.adapters, new.adapters)


def test_a_client_that_never_has_enough_memory_is_dropped(tiny_llama):
    _, _, trainer, _ = one_round(tiny_llama)
    error = torch.OutOfMemoryError("CUDA out of memory")
    client = Guarded(replace(trainer, task=Raising(trainer.task, error, times=4)))
    found, *_ = one_round(tiny_llama, client=client)  # 1, 2, 4 and 5 pieces
    assert found["one"].rejected == "it ran out of memory, even with one example at a time"
    assert found["one"].bytes_up == found["one"].examples == 0
    assert found["one"].bytes_down > 0
    assert found["two"].rejected is None


def test_a_mistake_of_the_program_is_no_fault(tiny_llama):
    _, _, trainer, _ = one_round(tiny_llama)
    for error in (RuntimeError("shape mismatch"), ValueError("wrong"), KeyError("x")):
        client = Guarded(replace(trainer, task=Raising(trainer.task, error, times=1)))
        with pytest.raises(type(error)):
            one_round(tiny_llama, client=client)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crash", "it crashed in step"),
        ("nan", "its training loss is not finite"),
        ("oom", "it ran out of memory, even with one example at a time"),
    ],
)
def test_a_round_of_nothing_but_faults_says_so_and_leaves_the_model_whole(tiny_llama, name, reason):
    _, _, trainer, _ = one_round(tiny_llama)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(NoUsableUpdateError, match=reason) as caught:
        one_round(tiny_llama, client=Guarded(trainer, 0, Faults(**{name: 1.0})))
    remedies = {"crash": "lower --faults crash", "nan": "Lower --lr", "oom": "Lower --max-length"}
    assert [n for n, remedy in remedies.items() if remedy in str(caught.value)] == [name]
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())
    assert not any(getattr(m, "restrictions", None) for m in trainer.model.modules())


def test_those_who_are_struck_are_left_out_and_the_others_unmoved(tiny_llama):
    """Seeded: the same clients each time; their round is that of the others alone."""
    found, new, trainer, state = one_round(tiny_llama, Faults(crash=0.3, nan=0.3))
    again, same, *_ = one_round(tiny_llama, Faults(crash=0.3, nan=0.3))
    assert_same_bits(new, same)
    assert [e.rejected for e in found.values()] == [e.rejected for e in again.values()]
    used = [client for client in CLIENTS if found[client].rejected is None]
    assert 0 < len(used) < len(CLIENTS)
    _, strategy, state, trainer = world(tiny_llama, RATIOS, LOCAL)
    tasks = strategy.assign(state, CLIENTS)
    of_used = [trainer(task) for task in tasks if task.client_id in used]
    assert_same_bits(new, averaged(state, tasks, of_used, "fedavg", 1.0))


def test_how_often_a_fault_strikes_is_its_probability(tiny_llama):
    """300 clients: 5 standard errors about 0.3, and a step anywhere in the middle."""
    _, strategy, state, trainer = world(tiny_llama, RATIOS, replace(LOCAL, accumulation=1))
    (task,) = strategy.assign(state, ["one"])
    steps = Counter()
    for number in range(300):
        client = f"client {number}"
        data = {client: trainer.data["one"]}
        guarded = Guarded(replace(trainer, data=data), 0, Faults(crash=0.3))
        update = guarded._struck(replace(task, client_id=client))
        if update is not trainer.task:
            steps[update.first] += 1
    assert abs(sum(steps.values()) / 300 - 0.3) < 0.13
    assert set(steps) == {0, 1, 2}


def test_a_straggler_takes_ten_times_the_compute_and_is_recorded(settings, tmp_path):
    clock = {"devices": "laptop:median=0.5,gpu:5g=0.5", "over_select": 2.0, "rounds": 2}
    slow, fast = (
        SimulateConfig(**{**settings, **clock, "faults": faults, "out": str(tmp_path / name)})
        for name, faults in (("slow", "slow=0.5"), ("fast", ""))
    )
    simulate(slow)
    simulate(fast)

    def rows_of(config):
        return checkpoint.read_records(Path(config.out))

    pairs = [
        (a, b)
        for one, other in zip(
            *(checkpoint.read_records(Path(c.out)) for c in (slow, fast)), strict=True
        )
        for a, b in zip(one["clients"], other["clients"], strict=True)
    ]
    slowed = [a["fault"] for a, _ in pairs if "fault" in a]
    assert 0 < len(slowed) < len(pairs)
    assert set(slowed) == {"it was 10 times as slow as its device"}
    for a, b in pairs:
        factor = 10 if "fault" in a else 1
        assert a["sim_compute_seconds"] == pytest.approx(factor * b["sim_compute_seconds"])


def test_a_run_with_faults_has_the_same_bits_after_an_interruption(settings, tmp_path):
    faults = {"faults": "crash=0.1,nan=0.1,oom=0.5", "rounds": 3, "per_round": 6}
    whole = SimulateConfig(**{**settings, **faults, "out": str(tmp_path / "whole")})
    part = replace(whole, rounds=1, out=str(tmp_path / "part"))
    simulate(whole)
    simulate(part)
    simulate(replace(part, rounds=3, resume=True))
    rows, other = (checkpoint.read_records(tmp_path / name) for name in ("whole", "part"))
    assert [row["clients"] for row in rows] == [row["clients"] for row in other]
    assert outcome(tmp_path / "whole")[1] == outcome(tmp_path / "part")[1]
    reasons = {c["rejected"] for row in rows for c in row["clients"]}
    assert any("crashed in step" in (reason or "") for reason in reasons)
    assert any("pieces" in c.get("fault", "") for row in rows for c in row["clients"])


def kinds(folder):
    """How often what went wrong in a run, by its words."""
    words = ("not available", "mid-round", "deadline", "crashed", "finite", "pieces", "slow")
    rows = checkpoint.read_records(Path(folder))
    texts = [f"{c['rejected']} {c.get('fault')}" for row in rows for c in row["clients"]]
    texts += ["not available" for row in rows for _ in row["unavailable"]]
    return Counter(word for text in texts for word in words if word in text)


def check_chaos(config):
    summary = simulate(config)
    assert min(kinds(config.out)[word] for word in ("not available", "crashed", "finite")) > 0
    assert min(kinds(config.out)[word] for word in ("pieces", "slow", "deadline")) > 0
    assert kinds(config.out)["mid-round"] > 0
    assert summary["eval_loss_after"] < summary["eval_loss_before"]


def test_the_chaos_preset_in_small(tmp_path):
    check_chaos(
        replace(
            chaos(),
            local_steps=2,
            batch_size=2,
            max_length=16,
            eval_examples=16,
            deadline=1.0,
            out=str(tmp_path / "chaos"),
        )
    )


@pytest.mark.slow
def test_the_chaos_preset(tmp_path):
    check_chaos(replace(chaos(), out=str(tmp_path / "chaos")))
