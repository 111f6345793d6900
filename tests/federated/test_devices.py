"""Devices and their clock: seconds by hand, who is late, who is not asked, what a target costs."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from fslora import checkpoint
from fslora.client import LocalTrainer, download_bytes, head_bytes, upload_bytes
from fslora.clock import Clock, Plan, lognormal, step_counter, uniform
from fslora.config import SimulateConfig, Target
from fslora.devices import Device
from fslora.engines import sequential
from fslora.faults import Faults
from fslora.guard import Guarded
from fslora.protocol import POOLED, ClientTask, LocalRule, LoRAWeights
from fslora.report.plots import draw_time
from fslora.report.records import read_run
from fslora.server import NoUsableUpdateError, rounds, run_round
from fslora.simulate import Watcher, simulate
from fslora.summary import cost_of, device_classes

from .test_simulate import outcome, records
from .worlds import CLIENTS, examples, tensors_of, world

NEW_FIELDS = {"sim_seconds", "sim_seconds_total", "unavailable"}
NEW_CLIENT_FIELDS = {"device", "sim_seconds", "sim_down_seconds", "sim_compute_seconds"}
NEW_CLIENT_FIELDS |= {"sim_up_seconds"}
FLEET = "phone:poor=0.5,laptop:median=0.3,gpu:5g=0.2"


def device(name="d", **figures):
    basic = {"share": 1.0, "flops_per_second": 1000.0, "memory_bytes": 1e9, "rtt_seconds": 0.5}
    basic |= {"down_bits_per_second": 64.0, "up_bits_per_second": 32.0}
    return Device(name, **{**basic, **figures})


def task(client, **changes):
    """80 bytes each way, four steps of two batches."""
    made = ClientTask(
        round=3,
        client_id=client,
        adapters={"m": LoRAWeights(torch.zeros(2, 3), torch.zeros(2, 5))},
        extras={"head": torch.zeros(4)},
        sketches={},
        local=LocalRule(steps=4, accumulation=2, batch_size=3),
        key=1,
        nonce=2,
    )
    return replace(made, **changes)


def clock(seconds_of, per_round=4, deadline=0.0, **device_figures):
    """A clock on which each client computes for as many seconds as asked, and nothing else."""
    free = {"down_bits_per_second": 1e15, "up_bits_per_second": 1e15, "rtt_seconds": 0.0}
    devices = {
        client: device(flops_per_second=1 / seconds, **free, **device_figures)
        for client, seconds in seconds_of.items()
    }
    return Clock(0, devices, lambda task: 1 / task.local.steps, per_round, deadline)


def test_seconds_by_hand():
    devices = {"a": device("slow"), "b": device("fast", flops_per_second=8e3, rtt_seconds=0.0)}
    made = Clock(0, devices, lambda task: 250.0 if task.client_id == "a" else 4000.0, 2)
    assert [sum(size(task("a"))) for size in (download_bytes, upload_bytes)] == [80, 80]
    slow, fast = made.times(task("a")), made.times(task("b"))
    # 640 bits at 64 and 32 bit/s; 4 · 2 · 250 operations at 1000 a second, 8 · 4000 at 8000.
    assert (slow.down_seconds, slow.compute_seconds, slow.up_seconds) == (10.0, 2.0, 20.0)
    assert slow.seconds == 32.5
    assert (fast.compute_seconds, fast.seconds) == (4.0, 34.0)
    assert made.plan([task("a"), task("b")]) == Plan(
        {"a": slow, "b": fast}, {}, frozenset(), seconds=34.0
    )
    half = task("a", local=replace(task("a").local, trainable="b"))
    assert made.times(half).up_seconds == 8 * (40 + 16) / 32, "only what travels is charged"
    private = made.times(task("a", private=True))
    assert private.seconds == private.compute_seconds == 2.0, "nothing travels"
    assert (head_bytes(task("a")), head_bytes(task("a", private=True))) == (16, 0)
    hasty = replace(made, deadline=1.0)
    assert "a" in hasty.plan([task("a")]).unused
    assert not hasty.plan([task("a", private=True)]).unused, "nobody waits for what stays"
    assert made.plan([]).seconds == 0.0


def test_jitter_has_mean_one_and_a_seed():
    draws = [lognormal(0.5, 7, "jitter", number, "a") for number in range(20000)]
    logs = [math.log(draw) for draw in draws]
    mean = sum(logs) / len(logs)
    assert sum(draws) / len(draws) == pytest.approx(1, abs=5 * 0.53 / 20000**0.5)
    assert sum((log - mean) ** 2 for log in logs) / len(logs) == pytest.approx(0.25, rel=0.05)
    assert lognormal(0.0, 7, "jitter") == 1.0
    assert draws[1] == lognormal(0.5, 7, "jitter", 1, "a") != lognormal(0.5, 8, "jitter", 1, "a")
    shaky = Clock(0, {"a": device(jitter=0.5)}, lambda _: 250.0, 1)
    times = [shaky.times(task("a", round=number)) for number in range(50)]
    assert {time.down_seconds for time in times} == {10.0}
    assert len({time.compute_seconds for time in times}) == 50


def test_who_is_available_and_who_fails_by_their_probabilities():
    flaky = Clock(0, {c: device(availability=0.7, dropout=0.2) for c in "ab"}, lambda _: 1.0, 2)
    came = [flaky.available(number, ["b", "a"]) for number in range(3000)]
    for client in "ab":
        assert sum(client in present for present in came) == pytest.approx(2100, abs=5 * 25.1)
    both = sum(present == ["b", "a"] for present in came)
    assert both == pytest.approx(1470, abs=5 * 27.4), "independently, and in the cohort's order"
    failed = [flaky.plan([task("a", round=number)]).unused for number in range(3000)]
    assert sum("a" in unused for unused in failed) == pytest.approx(600, abs=5 * 21.9)
    assert all(0 < uniform(0, number) < 1 for number in range(1000))
    sure = Clock(0, {"a": device()}, lambda _: 1.0, 1)
    assert all(sure.available(number, ["a"]) == ["a"] for number in range(300))
    assert all(not sure.plan([task("a", round=number)]).unused for number in range(300))


def test_a_deadline_drops_exactly_the_late(tiny_llama):
    _, strategy, state, client = world(tiny_llama, (1 / 8, 1 / 4, 1 / 2, 1.0))
    timed = clock(dict(zip(CLIENTS, (1.0, 3.0, 2.0, 9.0), strict=True)), deadline=2.5)
    trained, noted = [], []

    def watched(task):
        trained.append(task.client_id)
        return client(task)

    new, record = run_round(
        state, strategy, sequential, watched, CLIENTS, lambda r: noted.append(r.id), timed
    )
    by_id = {entry.id: entry for entry in record.clients}
    assert trained == ["one", "three"], "who will be late does not train"
    assert sorted(noted) == sorted(CLIENTS)
    for late in ("two", "four"):
        assert by_id[late].rejected == "it missed the deadline of 2.5 s"
        assert by_id[late].bytes_up == 0 < by_id[late].bytes_down
    assert by_id["four"].sim_seconds == pytest.approx(9.0)
    assert by_id["one"].rejected is by_id["three"].rejected is None
    assert record.sim_seconds == 2.5
    assert record.bytes_up == by_id["one"].bytes_up + by_id["three"].bytes_up
    wanted, _ = run_round(state, strategy, sequential, client, ["one", "three"])
    for name, pair in wanted.adapters.items():
        assert torch.equal(new.adapters[name].lora_a, pair.lora_a)
        assert torch.equal(new.adapters[name].lora_b, pair.lora_b)
    timed = replace(timed, deadline=100.0)
    _, early = run_round(state, strategy, sequential, client, CLIENTS, clock=timed)
    assert early.sim_seconds == pytest.approx(9.0), "nobody is late: nobody waits for the deadline"


def test_over_selection_takes_the_fastest(tiny_llama):
    _, strategy, state, client = world(tiny_llama, (1 / 8, 1 / 4, 1 / 2, 1.0))
    timed = clock(dict(zip(CLIENTS, (3.0, 2.0, 1.0, 2.0), strict=True)), per_round=2)
    _, record = run_round(state, strategy, sequential, client, CLIENTS, clock=timed)
    used = [entry.id for entry in record.clients if entry.rejected is None]
    assert used == ["two", "three"], "of two at the same time the first in task order"
    assert record.sim_seconds == pytest.approx(2.0)
    for wasted in (record.clients[0], record.clients[3]):
        assert wasted.rejected == "the first 2 answers were in before it"
        assert wasted.bytes_up == wasted.bytes_down > 0, "wasted work is charged"
    assert record.bytes_up == sum(entry.bytes_up for entry in record.clients)


def test_who_will_crash_is_not_among_the_first_answers(tiny_llama):
    """It is known to the plan as a device's failure is; honest work is not thrown away for it."""
    _, strategy, state, client = world(tiny_llama, (1 / 8, 1 / 4, 1 / 2, 1.0))
    timed = clock(dict(zip(CLIENTS, (1.0, 2.0, 3.0, 4.0), strict=True)), per_round=2)
    drawn = {c: uniform(0, "fault", "crash", 1, c) for c in CLIENTS}
    assert min(drawn, key=drawn.get) == "one"
    share = drawn["one"] + 1e-9
    timed, faulty = replace(timed, crash=share), Guarded(client, 0, Faults(crash=share))
    _, record = run_round(state, strategy, sequential, faulty, CLIENTS, clock=timed)
    reasons = {entry.id: entry.rejected for entry in record.clients}
    assert reasons["one"] == "it crashed before it answered"
    assert reasons["two"] is reasons["three"] is None
    assert record.sim_seconds == pytest.approx(3.0), "nobody waits for an answer that never comes"


def test_unavailable_clients_are_not_asked(tiny_llama):
    _, strategy, state, client = world(tiny_llama, (1.0, 1.0, 1.0, 1.0))
    timed = clock(dict.fromkeys(CLIENTS, 1.0))
    timed = replace(
        timed, device_of={**timed.device_of, "two": device(availability=1e-9), POOLED: device()}
    )
    _, record = run_round(state, strategy, sequential, client, CLIENTS, clock=timed)
    assert record.unavailable == ["two"]
    assert [entry.id for entry in record.clients] == ["one", "three", "four"]
    assert record.bytes_down == 3 * record.clients[0].bytes_down


@pytest.mark.parametrize(
    ("figures", "deadline", "message"),
    [
        # A little above 1 s, for what travels: 1 s would not do.
        ({}, 0.5, r"Raise --deadline: the fastest of the late needed 1.01 s"),
        ({"availability": 1e-9}, 0.0, r"not available.*Raise --per-round or --over-select"),
        ({"dropout": 1 - 1e-9}, 0.0, r"failed in mid-round.*Raise --per-round"),
    ],
)
def test_a_round_that_nobody_makes_says_why(tiny_llama, figures, deadline, message):
    _, strategy, state, client = world(tiny_llama, (1.0, 1.0, 1.0, 1.0))
    timed = clock(dict.fromkeys(CLIENTS, 1.0), deadline=deadline, **figures)
    with pytest.raises(NoUsableUpdateError, match=message):
        run_round(state, strategy, sequential, client, CLIENTS, clock=timed)


def test_a_lost_round_is_recorded_and_five_in_a_row_stop_also_a_resumed_run(tiny_llama):
    _, strategy, state, client = world(tiny_llama, (1.0, 1.0, 1.0, 1.0))
    rare = clock(dict.fromkeys(CLIENTS, 1.0), availability=0.2)
    steps = partial(rounds, state, strategy, sequential, client, CLIENTS, per_round=2)
    seen = list(steps(until=12, clock=rare))
    lost = [record for _, record in seen if not record.clients]
    assert [record.round for _, record in seen] == list(range(1, 13))
    assert 0 < len(lost) < 12
    states = [state, *(after for after, _ in seen)]
    for before, (after, record) in zip(states, seen, strict=False):
        assert after.round == record.round == before.round + 1
        old, new = tensors_of(before), tensors_of(after)
        assert all(torch.equal(old[name], new[name]) for name in old) == (record in lost)
    assert all(len(record.unavailable) == 2 and record.train_loss is None for record in lost)
    never = clock(dict.fromkeys(CLIENTS, 1.0), availability=1e-9)
    seen = []
    with pytest.raises(NoUsableUpdateError, match="round 5: no client's"):
        seen.extend(steps(until=12, clock=never))
    assert [record.round for _, record in seen] == [1, 2, 3, 4]
    resumed = partial(rounds, seen[-1][0], *steps.args[1:], per_round=2)
    with pytest.raises(NoUsableUpdateError, match="round 5: no client's"):
        list(resumed(until=12, clock=never))
    assert [after.lost for after, _ in resumed(until=5)] == [0]

    def diverged(task):
        return replace(client(task), metrics={"loss": math.nan})

    with pytest.raises(NoUsableUpdateError, match=r"round 1: .*training loss is not finite"):
        list(rounds(state, strategy, sequential, diverged, CLIENTS, per_round=2, until=2))


def test_operations_are_those_of_one_real_step(tiny_llama):
    _, strategy, state, client = world(tiny_llama, (1 / 8, 1 / 4, 1 / 2, 1.0))
    calls = []

    class Counted(LocalTrainer):
        def __call__(self, task):
            calls.append(task.local.steps)
            return super().__call__(task)

    trainer = Counted(client.model, client.task, client.data)
    flops = step_counter(trainer, examples("one"))
    tasks = strategy.assign(state, CLIENTS)
    before = client(tasks[1])
    counts = [flops(task) for task in tasks]
    assert counts == [flops(task) for task in strategy.assign(replace(state, round=5), CLIENTS)]
    assert calls == [1, 1, 1, 1], "once for each size, one step"
    # 3 examples of 12 tokens. Products with S: h, y, dh, dA, dB, and dx where a layer has an
    # input to differentiate, which the first layer's q and v (E = 16 and 8, D = 16) have not.
    tokens, first = 36, 2 * 16
    both = sum(pair.lora_a.shape[1] for pair in state.adapters.values())
    outputs = sum(pair.lora_b.shape[1] for pair in state.adapters.values())
    each_rank = 2 * tokens * (3 * both + 3 * outputs - first)
    assert [counts[0] + each_rank * (size - 1) for size in (1, 2, 4, 8)] == counts
    # The same tokens in shorter texts: less attention. Five products in the first layer, whose
    # keys need no gradient, six in the second, each of 2 · 2 heads · 8 · texts · length².
    short = replace(tasks[0], local=replace(tasks[0].local, batch_size=6))
    fewer = step_counter(trainer, examples("one", count=6, length=6))(short)
    assert counts[0] - fewer == 11 * 2 * 2 * 8 * (3 * 12**2 - 6 * 6**2)
    few = replace(trainer, data={c: examples(c, count=1) for c in CLIENTS})
    assert step_counter(few, examples("one"))(tasks[0]) == counts[0] / 3, "a third of a batch"
    after = client(tasks[1])
    for name, pair in before.delta.items():
        assert torch.equal(after.delta[name].lora_b, pair.lora_b), "counting leaves no trace"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deadline": 3.0}, "give --devices"),
        ({"over_select": 1.3}, "give --devices"),
        ({"over_select": 0.5, "devices": "gpu:5g"}, "--over-select must be at least 1"),
        ({"over_select": 2.5, "devices": "gpu:5g"}, "asks 8 clients a round, and there are 6"),
        ({"over_select": 1e308, "devices": "gpu:5g"}, "--over-select must be positive and at most"),
        ({"server_lr": 1e300}, "--server-lr must be positive and at most"),
        ({"deadline": -1.0, "devices": "gpu:5g"}, "--deadline must be at least 0"),
        ({"targets": "0.5,good"}, "'good' is neither a score"),
        ({"targets": "f1:0.5"}, "'f1:0.5' is neither a score"),
    ],
)
def test_bad_settings_are_refused_by_their_flag(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        SimulateConfig(**{**settings, **changes})


def test_a_run_without_devices_is_what_it_was(settings, tmp_path):
    """Its records have the same values as on devices that never fail, and no time."""
    config = SimulateConfig(**settings)
    simulate(config)
    fleet = tmp_path / "sure.toml"
    sure = "availability = 1\ndropout = 0\n"
    fleet.write_text(f"[[device]]\ncompute = 'gpu'\nnetwork = '5g'\nshare = 1\n{sure}")
    timed = replace(config, devices=str(fleet), out=str(tmp_path / "timed"))
    simulate(timed)
    (plain, bits), (with_clock, same_bits) = outcome(config.out), outcome(timed.out)
    assert bits == same_bits
    totals = [row["sim_seconds_total"] for row in with_clock]
    assert totals[0] == 0 < totals[1] < totals[2]
    for row, other in zip(plain, with_clock, strict=True):
        assert (row["sim_seconds"], row["sim_seconds_total"], row["unavailable"]) == (
            None,
            None,
            [],
        )
        assert (other["sim_seconds"] is None) is False
        for client in row["clients"]:
            assert all(client[name] is None for name in NEW_CLIENT_FIELDS)
        for record in (row, other):
            record["clients"] = [
                {k: v for k, v in client.items() if k not in NEW_CLIENT_FIELDS}
                for client in record["clients"]
            ]
        old = [{k: v for k, v in r.items() if k not in NEW_FIELDS} for r in (row, other)]
        assert old[0] == old[1]
        assert len(old[0]) == len(row) - 3


def test_a_resumed_run_on_devices_has_the_bits_of_an_uninterrupted_one(settings, tmp_path):
    changes = {"devices": FLEET, "over_select": 1.7, "rounds": 4, "deadline": 0.5}
    whole = SimulateConfig(**{**settings, **changes})
    simulate(replace(whole, out=str(tmp_path / "whole")))

    class StopError(Exception):
        pass

    def stop(record):
        if record.round == 2:
            raise StopError

    part = replace(whole, out=str(tmp_path / "part"))
    with pytest.raises(StopError):
        simulate(part, Watcher(on_round=stop))
    summary = simulate(replace(part, resume=True, targets="0.0,loss:0.1"))
    assert outcome(tmp_path / "part") == outcome(tmp_path / "whole")
    rows = records(tmp_path / "part")
    reasons = {c["rejected"] for row in rows for c in row["clients"]}
    assert len(reasons) > 1, "the clock had something to say"
    assert rows[-1]["sim_seconds_total"] == pytest.approx(sum(row["sim_seconds"] for row in rows))
    assert summary["sim_seconds"] == rows[-1]["sim_seconds_total"]
    assert [row["round"] for row in summary["targets"]] == [0, None]
    entries = [c for row in rows for c in row["clients"]]
    assert sum(row["asked"] for row in summary["devices"]) == len(entries)
    assert sum(row["used"] for row in summary["devices"]) == sum(
        entry["rejected"] is None for entry in entries
    )
    assert summary == json.loads((tmp_path / "part/summary.json").read_text())
    axes = draw_time(read_run(tmp_path / "part")).axes[0]
    assert list(axes.lines[0].get_xdata()) == [row["sim_seconds_total"] for row in rows]
    assert list(axes.lines[0].get_ydata()) == [row["eval_metric"] for row in rows]


def test_what_a_target_costs():
    def row(number, metric, loss, total=None):
        ways = {"adapter_bytes_up": 3, "adapter_bytes_down": 5, "head_bytes_up": 1}
        ways |= {"head_bytes_down": 2, "bytes_up": 4, "bytes_down": 7}
        paid = {way: size * (number > 0) for way, size in ways.items()}
        figures = {"eval_metric": metric, "eval_loss": loss, "sim_seconds_total": total}
        return {"round": number, **figures, **paid}

    rows = [row(0, 0.1, 3.0, 0.0), row(1, None, None, 1.5), row(2, 0.7, 2.0, 4.0), row(3, 0.6, 2.5)]
    got = cost_of(Target("metric", 0.6), rows)
    wanted = {"figure": "metric", "value": 0.6, "round": 2, "sim_seconds": 4.0}
    wanted |= {"adapter_bytes_up": 6, "adapter_bytes_down": 10, "head_bytes_up": 2}
    assert got == wanted | {"head_bytes_down": 4, "bytes_up": 8, "bytes_down": 14}
    assert cost_of(Target("loss", 2.5), rows)["round"] == 2
    assert cost_of(Target("loss", 3.0), rows)["round"] == 0
    never = cost_of(Target("metric", 0.71), rows)
    assert (never["round"], never["bytes_up"], never["sim_seconds"]) == (None, None, None)
    assert device_classes([{"id": "a"}]) == []


def test_zero_shot_and_centralised_have_a_clock_too(settings, tmp_path):
    for strategy in ("zero-shot", "centralised"):
        changes = {"strategy": strategy, "devices": FLEET, "out": str(tmp_path / strategy)}
        config = SimulateConfig(**{**settings, **changes, "deadline": 1e-9})
        summary = simulate(config)
        assert summary["bytes_up"] == summary["bytes_down"] == 0
        assert (summary["sim_seconds"] > 0) is (strategy == "centralised")
    assert checkpoint.read_records(tmp_path / "centralised")[1]["clients"][0]["id"] == POOLED
