"""The choice: who is waited for, scipy's search against enumeration, limits and their remedies."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fslora.clock import Clock
from fslora.config import SimulateConfig
from fslora.devices import Fleet
from fslora.plan.bound import Effort, Fit
from fslora.plan.cohorts import Cohorts, draw_cohorts
from fslora.plan.costs import Costs, Line
from fslora.plan.limits import InfeasibleFleetError, Limits, feasible_sizes
from fslora.plan.report import Plan, show
from fslora.plan.settings import PlanConfig
from fslora.plan.solve import Problem, Solution, solve

from .test_devices import device, task

RANK = 6


COSTS = Costs(
    rank=RANK,
    flops=Line(30.0, 10.0),
    down_bytes=Line(0.0, 10.0),
    up_bytes=Line(0.0, 10.0),
    memory_bytes=Line(1000.0, 10.0),
    memory_bytes_of_one=Line(700.0, 5.0),
    weight_bytes=600.0,
    weights_halve=True,
    layer_bytes=100.0,
    layers=5,
)
ADDING = Effort(0.8, -1.0)


def known(effort):
    levels = np.array([3.0, 2.0])
    full = np.array([5.0, 10.0])
    return Fit(effort, (effort,), levels, full, full[None], 4.0, 0.0)


def problem(fleet, effort=ADDING, goal="time", **cohort):
    drawn = {"cohort": 4, "per_round": 4, "deadline": 0.0, "key": 1} | cohort
    cohorts = draw_cohorts(fleet, 20, **drawn)
    feasible = tuple(feasible_sizes(COSTS, fleet, Limits()))
    return Problem(COSTS, fleet, cohorts, known(effort), goal, feasible)


def random_fleet(seed, classes):
    draw = np.random.default_rng(seed)
    figures = [
        {
            "flops_per_second": 10 ** draw.uniform(1, 2.5),
            "up_bits_per_second": 10 ** draw.uniform(1.5, 4),
            "down_bits_per_second": 10 ** draw.uniform(2, 4),
            "watts": draw.uniform(1, 9),
            "jitter": 0.2,
            "availability": 0.9,
            "dropout": 0.05,
        }
        for _ in range(classes)
    ]
    return Fleet(tuple(device(f"d{n}", share=1 / classes, **own) for n, own in enumerate(figures)))


def test_a_round_is_as_long_as_the_simulator_s_clock_says():
    seconds = np.array([3.0, 2.0, 1.0, 2.0])
    clients = ["one", "two", "three", "four"]
    for per_round, deadline in ((4, 0.0), (2, 0.0), (4, 2.5), (1, 0.5)):
        everybody = np.ones((1, 4), dtype=bool)
        even = np.ones((1, 4))
        member = np.arange(4)[None]
        cohorts = Cohorts(member, everybody, ~everybody, even, 4, per_round, deadline)
        found = cohorts.mean_round(seconds, np.zeros(4))
        free = {"down_bits_per_second": 1e15, "up_bits_per_second": 1e15, "rtt_seconds": 0.0}
        devices = {
            client: device(flops_per_second=1 / each, **free)
            for client, each in zip(clients, seconds, strict=True)
        }
        clock = Clock(0, devices, lambda task: 1 / 8, per_round, deadline)
        plan = clock.plan([task(client) for client in clients])
        used = [client not in plan.unused for client in clients]
        assert found.seconds == pytest.approx(plan.seconds)
        wanted = np.array(used) / max(sum(used), 1)
        assert found.shares.tolist() == pytest.approx(wanted.tolist())
        answered = [client not in plan.unused or client in plan.wasted for client in clients]
        assert found.answered.tolist() == [float(one) for one in answered]


def test_cohorts_are_drawn_by_shares_and_reliability():
    fleet = Fleet((device("a", share=0.75, availability=0.5), device("b", share=0.25, dropout=0.2)))
    drawn = draw_cohorts(fleet, 40, 8, 8, 0.0, 3)
    mean = drawn.mean_round(np.ones(2), np.zeros(2))
    assert mean.asked == pytest.approx([3.0, 2.0], rel=0.08)
    assert mean.answered == pytest.approx([3.0, 1.6], rel=0.08)
    assert mean.shares.sum() == pytest.approx(1.0)
    again = draw_cohorts(fleet, 40, 8, 8, 0.0, 3)
    assert (again.member == drawn.member).all()
    assert (again.jitter == drawn.jitter).all()


@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_what_enumeration_proves_best(seed):
    goal = ("time", "bytes", "energy")[seed % 3]
    effort = Effort((0.05, 0.4, 1.0)[seed // 2], (-1.0, 1.0)[seed % 2])
    made = problem(random_fleet(seed, 3), effort, goal)
    proved = min(map(made.cost, itertools.product(*made.feasible)))
    enumerated, searched = solve(made, 0), solve(made, 0, enumerated=0)
    assert (enumerated.exact, searched.exact) == (True, False)
    assert enumerated.outlook.cost(goal) == proved
    assert searched.outlook.cost(goal) == proved
    assert proved <= min(map(made.cost, made.uniform()))


def test_what_a_choice_costs_by_hand():
    free = dict.fromkeys(("flops_per_second", "up_bits_per_second", "down_bits_per_second"), 1e9)
    slow, fast = device("slow", share=0.5, watts=2.0), device("fast", share=0.5, **free)
    fleet = Fleet((slow, replace(fast, rtt_seconds=0.0)))
    made = problem(fleet, Effort(1.0, 1.0), cohort=20, per_round=20)
    outlook = made.outlook((1, 6))
    # 40 operations at 1000 a second, 80 bits at 64 and 32 bit/s, half a second of round trip.
    busy = 0.04 + 80 / 64 + 80 / 32
    assert outlook.round_seconds == pytest.approx(busy + 0.5)
    assert outlook.rounds == pytest.approx(10 * (6 + 1) / 2)
    assert outlook.seconds == pytest.approx(35 * (busy + 0.5))
    assert outlook.moved_bytes == pytest.approx(35 * (10 * 20 + 10 * 120))
    assert outlook.joules == pytest.approx(35 * 10 * 2.0 * busy)
    assert outlook.asked == pytest.approx((350, 350))


def test_limits_bind_and_are_kept():
    small = device("small", share=0.5, memory_bytes=1030.0)
    fleet = Fleet((small, device("large", share=0.5)))
    assert feasible_sizes(COSTS, fleet, Limits()) == [(1, 2, 3), (1, 2, 3, 4, 5, 6)]
    assert feasible_sizes(COSTS, fleet, Limits(traffic_bytes=85.0))[1] == (1, 2, 3, 4)
    slow = feasible_sizes(COSTS, fleet, Limits(deadline=10.0))[1]
    # 0.54 + 0.01 S + 3.75 S seconds.
    assert slow == (1, 2)
    made = problem(fleet, Effort(1.0, 1.0))
    assert made.limited_to(6) == (3, 6)
    assert made.uniform() == [(1, 1), (2, 2), (3, 3), (3, 4), (3, 5), (3, 6)]
    assert solve(made, 0).outlook.sizes[0] <= 3


REMEDIES = {
    800.0: "--batch-size",
    705.0: "--batch-size",
    704.0: "--layers 3 of 5",
    300.0: "--layers 1 of 5",
    250.0: "--dtype bfloat16 with --layers 1 of 5",
    10.0: "leave it out of --devices",
}


@pytest.mark.parametrize("memory", REMEDIES)
def test_an_infeasible_device_is_named_with_the_nearest_change(memory):
    fleet = Fleet((device("old phone", share=0.5, memory_bytes=memory), device("new", share=0.5)))
    with pytest.raises(InfeasibleFleetError) as error:
        feasible_sizes(COSTS, fleet, Limits())
    text = str(error.value)
    assert "old phone" in text
    assert "new" not in text.replace("nearest", "")
    assert REMEDIES[memory] in text
    assert ("frozen base alone" in text) is (memory < 600)


def test_bfloat16_is_no_remedy_for_a_base_that_is_in_it():
    fleet = Fleet((device("old phone", memory_bytes=250.0),))
    with pytest.raises(InfeasibleFleetError, match="nearest change: leave it out"):
        feasible_sizes(replace(COSTS, weights_halve=False), fleet, Limits())


def test_deadline_and_traffic_name_what_they_would_have_to_be():
    fleet = Fleet((device("slow"),))
    with pytest.raises(InfeasibleFleetError, match=r"slow: .* raise --deadline to 4.29"):
        feasible_sizes(COSTS, fleet, Limits(deadline=1.0))
    with pytest.raises(InfeasibleFleetError, match=r"slow: .* raise it to 2e-05"):
        feasible_sizes(COSTS, fleet, Limits(traffic_bytes=10.0))


@pytest.mark.parametrize("more", range(7))
def test_what_is_named_suffices(more):
    costs = replace(COSTS, flops=Line(30.0 + more, 10.0), up_bytes=Line(more * 1001.3, 10.0))
    fleet = Fleet((device("slow", up_bits_per_second=1e9),))
    for flag, unit, limit in (("deadline", 1, "deadline"), ("it", 1e6, "traffic_bytes")):
        with pytest.raises(InfeasibleFleetError) as error:
            feasible_sizes(costs, fleet, Limits(**{limit: 1e-3}))
        named = float(re.search(rf"raise (?:--)?{flag} to ([^,]+),", str(error.value)).group(1))
        assert feasible_sizes(costs, fleet, Limits(**{limit: named * unit}))


def test_a_terminal_shows_names_as_they_are_and_all_figures_beside_a_long_one(capsys):
    fleet = Fleet((device("phone [old]", share=0.25), device("s" * 90, share=0.75)))
    run = SimulateConfig(model="m", data="d", rank=6, devices="gpu:5g", targets="loss:2")
    config, made = PlanConfig(run, pilot_ratios="1/6,1/2,1"), problem(fleet)
    best = made.outlook((2, 5))
    plan = Plan(config, made, Solution(best, True), best, best, Limits())
    show(plan, Console(width=80))
    shown = capsys.readouterr().out
    assert "│ phone [old] " in shown
    for figure in ("25%", "75%", "5/6", "50 B", "1.1 kB"):
        assert f" {figure} │" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "how sure" not in shown
    few = replace(plan, config=replace(config, pilot_ratios="1/6,1"))
    show(few, Console(width=80))
    assert capsys.readouterr().out.count("nothing says how sure it is") == 2


def test_a_class_that_no_client_has_is_not_said_to_be_held_back_by_the_goal():
    fleet = Fleet((device("rare", share=0.01), device("common", share=0.99)))  # of 20 clients
    run = SimulateConfig(model="m", data="d", rank=6, devices="gpu:5g", targets="loss:2")
    made = problem(fleet)
    best = solve(made, 0).outlook
    plan = Plan(
        PlanConfig(run, pilot_ratios="1/6,1"), made, Solution(best, True), best, best, Limits()
    )
    assert plan.binding(0) == "nothing: its share of the clients is too small for it to be drawn"
    assert "drawn" not in plan.binding(1)


def test_nobody_in_time_is_refused():
    fleet = Fleet((device("flaky", dropout=1 - 1e-12),))
    with pytest.raises(ValueError, match="no answer would be used"):
        solve(problem(fleet), 0)


def test_a_round_without_an_answer_is_paid_for_and_brings_the_target_no_nearer():
    sure, flaky = (
        problem(Fleet((device("a", dropout=p),)), cohort=1, per_round=1) for p in (0.0, 0.5)
    )
    lost = 1 - flaky.cohorts.mean_round(np.ones(1), np.zeros(1)).useful
    assert lost == pytest.approx(0.5, abs=0.08)
    once, twice = sure.outlook((3,)), flaky.outlook((3,))
    for figure in ("rounds", "rounds_high", "seconds", "joules"):
        assert getattr(twice, figure) == pytest.approx(getattr(once, figure) / (1 - lost))
    assert twice.asked == pytest.approx((once.rounds / (1 - lost),))
