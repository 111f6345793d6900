import json
from dataclasses import replace

import pytest
import torch

from fslora import checkpoint
from fslora.config import SimulateConfig
from fslora.engines import sequential
from fslora.prepare import limits_of, prepare
from fslora.protocol import LoRAWeights
from fslora.robust import update_norm
from fslora.server import NoUsableUpdateError, rounds, run_round
from fslora.simulate import Watcher, simulate
from fslora.trust import Limits
from fslora.validate import quarantined, rejection

from .hostile import CLIENTS, honest, small_state
from .worlds import assert_same_bits


def pair_of(client="two"):
    strategy, state = small_state()
    (task,) = strategy.assign(state, [client])
    return task, honest(task)


def test_the_norm_is_bounded_where_a_bound_is_set():
    task, update = pair_of()
    norm = update_norm(update)
    assert rejection(task, update, Limits(max_norm=norm)) is None
    reason = rejection(task, update, Limits(max_norm=norm * 0.999))
    assert reason == f"its norm is {norm:.3g}, above {norm * 0.999:.3g}"
    assert rejection(task, update, Limits(max_norm=norm * (1 - 1e-12))), "to the last digits"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bound_is_held_to_where_the_changes_own_type_sums_badly(dtype):
    """Equal numbers, many: in float32 their squares' sum falls behind, in halves it is rounded."""
    count = 30_000_000 if dtype is torch.float32 else 1000
    head = torch.full((count,), 1e-3 if dtype is torch.float32 else 0.7, dtype=dtype)
    task, update = pair_of()
    task = replace(task, adapters={}, sketches={}, extras={"head": torch.zeros_like(head)})
    update = replace(update, delta={}, extras={"head": head})
    norm, own = update_norm(update), float(torch._foreach_norm([head], 2)[0])
    assert own != norm
    for most in (own / (1 - 5e-3), norm * (1 - 1e-6), norm):
        reason = rejection(task, update, Limits(max_norm=most))
        assert (reason is None) == (norm <= most)


def test_finite_numbers_whose_sum_is_not_are_refused_without_a_bound():
    task, update = pair_of()
    huge = replace(update, extras={n: torch.full_like(t, 3e38) for n, t in update.extras.items()})
    assert "its norm is" in rejection(task, huge)


@pytest.mark.parametrize("loss", [1.7e308, -1.7e308, float("inf"), float("nan")])
def test_losses_whose_sum_is_not_finite_are_refused(loss):
    strategy, state = small_state()

    def boasting(task):
        return replace(honest(task), metrics={"loss": loss if task.client_id != "two" else 2.0})

    _, record = run_round(state, strategy, sequential, boasting, CLIENTS)
    assert json.loads(json.dumps(record.to_json(), allow_nan=False))["train_loss"] == 2.0
    refused = [client.id for client in record.clients if client.rejected]
    assert refused == ["one", "three", "four"]


def test_examples_are_those_that_the_server_knows_of_or_bounded():
    task, update = pair_of()
    assert rejection(task, update, Limits(examples={"two": 5})) is None
    assert rejection(task, update, Limits(examples={"two": 4})) == (
        "it claims 5 examples and can have 4"
    )
    assert "can have 1000000000" in rejection(task, replace(update, num_examples=10**9 + 1))


def test_heads_are_those_that_were_given():
    task, update = pair_of()
    for heads in ({}, {**update.extras, "another": torch.ones(1)}):
        reason = rejection(task, replace(update, extras=heads))
        assert reason == "its modules are not those that it was given"


def test_tensors_of_another_kind_are_refused():
    task, update = pair_of()
    for other in (torch.ones(2, 3).to_sparse(), torch.ones(2, 3, device="meta")):
        bent = replace(update, extras={"head.weight": other})
        assert "is not a plain tensor" in rejection(task, bent)


@pytest.mark.parametrize("step", [1, -1], ids=["in order", "the last first"])
def test_a_late_or_second_or_strange_answer_counts_for_nothing(step):
    strategy, state = small_state()
    state, _ = run_round(state, strategy, sequential, honest, CLIENTS)
    old = small_state()[0].assign(small_state()[1], CLIENTS)

    def engine(client, tasks):
        """Each client's answer, then somebody's, a replay of the first round's and a second one."""
        for task, before in list(zip(tasks, old, strict=True))[::step]:
            update = client(task)
            yield update
            yield replace(update, client_id="somebody")
            yield replace(honest(before), nonce=update.nonce)
            yield replace(update, extras={n: t * 100 for n, t in update.extras.items()})

    got, record = run_round(state, strategy, engine, honest, CLIENTS)
    wanted, _ = run_round(state, strategy, sequential, honest, CLIENTS)
    assert_same_bits(got, wanted)
    assert len(record.clients) == 4

    def replaying(client, tasks):
        return (
            honest(before) if before.client_id == "two" else client(task)
            for task, before in zip(tasks, old, strict=True)
        )

    got, record = run_round(state, strategy, replaying, honest, CLIENTS)
    assert record.clients[1].rejected == "it answers another task"


def liar(task):
    update = honest(task)
    if task.client_id != "two":
        return update
    return replace(
        update,
        delta={n: LoRAWeights(*(t / 0 for t in p)) for n, p in update.delta.items()},
    )


def all_rounds(state, strategy, client, until, limits):
    return list(
        rounds(
            state, strategy, sequential, client, CLIENTS, per_round=3, until=until, limits=limits
        )
    )


def test_after_so_many_rejections_a_client_is_asked_no_more():
    strategy, state = small_state()
    limits = Limits(quarantine=2)
    steps = all_rounds(state, strategy, liar, 12, limits)
    rejected = [n for n, (_, r) in enumerate(steps) for c in r.clients if c.rejected]
    assert len(rejected) == 2
    for number, (after, record) in enumerate(steps):
        asked = {entry.id for entry in record.clients}
        out = number > rejected[1]
        assert record.quarantined == (["two"] if out else [])
        assert len(asked) == 3, "others take its place"
        assert not (out and "two" in asked)
        assert after.rejections.get("two", 0) == sum(at <= number for at in rejected)
    free = all_rounds(state, strategy, liar, 12, Limits())
    assert sum(c.rejected is not None for _, r in free for c in r.clients) > 2
    assert quarantined(steps[-1][0], CLIENTS, limits) == {"two"}


def test_when_all_are_in_quarantine_the_run_stops_and_says_so():
    strategy, state = small_state()
    state = replace(state, rejections=dict.fromkeys(CLIENTS, 3))
    with pytest.raises(NoUsableUpdateError, match="every client is in quarantine"):
        all_rounds(state, strategy, honest, 1, Limits(quarantine=3))


def test_fewer_than_a_cohort_go_on_without_it():
    strategy, state = small_state()
    state = replace(state, rejections={"one": 1, "two": 1})
    ((_, record),) = all_rounds(state, strategy, honest, 1, Limits(quarantine=1))
    assert [entry.id for entry in record.clients] == ["three", "four"]


def test_a_checkpoint_remembers_who_was_rejected(tmp_path):
    _, state = small_state()
    state = replace(state, rejections={"a/b": 2, "two": 1})
    checkpoint.save_state(tmp_path, state)
    assert checkpoint.load_state(tmp_path).rejections == state.rejections


def test_quarantine_survives_a_resume_with_the_same_bits(settings, tmp_path):
    """Every update is too large for two of six clients, which the norm bound finds out."""
    probe = SimulateConfig(**{**settings, "rounds": 1, "per_round": 6, "out": str(tmp_path / "p")})
    config = replace(
        probe,
        rounds=5,
        attack="scale",
        attackers=0.34,
        attack_strength=1e6,
        max_norm=100.0,
        quarantine=1,
        out=str(tmp_path / "whole"),
        per_round=5,
    )
    simulate(config)
    part = replace(config, out=str(tmp_path / "part"))

    class StopError(Exception):
        pass

    def stop(record):
        if record.round == 2:
            raise StopError

    with pytest.raises(StopError):
        simulate(part, Watcher(on_round=stop))
    simulate(replace(part, resume=True))
    states = [checkpoint.load_state(tmp_path / name) for name in ("whole", "part")]
    assert_same_bits(*states)
    assert states[0].rejections == states[1].rejections != {}
    rows = [checkpoint.read_records(tmp_path / name) for name in ("whole", "part")]
    assert [r["quarantined"] for r in rows[0]] == [r["quarantined"] for r in rows[1]]
    assert len(rows[0][-1]["quarantined"]) == 2
    reasons = {c["rejected"] for r in rows[0] for c in r["clients"] if c["rejected"]}
    assert all("above 100" in reason for reason in reasons)


def test_the_simulator_knows_how_many_examples_everybody_has(settings):
    run = prepare(SimulateConfig(**settings, max_norm=3.0, quarantine=2))
    limits = limits_of(run)
    sizes = {name: len(own) for name, own in zip(run.data.names, run.data.clients, strict=True)}
    assert limits.examples == sizes
    assert (limits.max_norm, limits.quarantine) == (3.0, 2)
