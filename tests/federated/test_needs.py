"""Settings outside their list, and settings that do nothing, are refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from fslora.config import SimulateConfig
from fslora.plan.settings import PlanConfig
from fslora.presets import chaos

BASE = SimulateConfig(model="m", data="d")


@pytest.mark.parametrize(
    "given",
    [
        *({"server_opt": "adam"}, {"optimizer": "adam"}, {"metric": "acc"}, {"attack": "foo"}),
        *({"robust": "foo"}, {"forward": "half"}, {"averaging": "mean"}, {"sampler": "random"}),
        *({"redraw": "epoch"}, {"reader": "csv"}, {"device_order": "slow"}, {"task": "lm"}),
        *({"dtype": "float64"}, {"strategy": "fslroa"}, {"implementation": "cuda"}),
    ],
)
def test_what_is_not_in_a_list_is_refused_with_the_list(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} = '.*'; choose .*, "):
        replace(BASE, **given)


@pytest.mark.parametrize(
    "given",
    [
        *({"lr": "x"}, {"rank": 8.0}, {"clients": "4"}, {"header": "no"}, {"seed": True}),
        *({"ratios": [0.5, 1]}, {"model": Path("m")}, {"out": None}, {"robust_clip": True}),
    ],
)
def test_what_is_not_of_a_setting_s_type_is_refused_with_its_name(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} = .* is not of type "):
        replace(BASE, **given)
    replace(BASE, lr=1)


def test_a_plan_s_goal_is_checked_too():
    run = replace(chaos(), over_select=1.0, deadline=0.0, faults="", targets="loss:3", seed=0)
    PlanConfig(run, goal="bytes")
    with pytest.raises(ValueError, match="--goal = 'money'; choose time, bytes, energy"):
        PlanConfig(run, goal="money")


CLASSES = {"task": "classification"}
IDLE = [
    ({"metric": "f1"}, CLASSES),
    ({"label_column": "topic"}, {"partition": "dirichlet:1"}),
    ({"text_column": "words"}, None),
    ({"prompt_columns": "question"}, {"task": "instruction"}),
    ({"response_column": "answer"}, {"task": "instruction"}),
    (
        {"depth_min_probability": 0.2},
        {"depth": "uniform", "forward": "full", "averaging": "inverse"},
    ),
    ({"momentum": 0.9}, {"optimizer": "sgd"}),
    ({"device_order": "random"}, {"devices": "phone:poor"}),
    ({"robust_clip": 1.0}, {"robust": "clip"}),
    ({"trim": 0.1}, {"robust": "trimmed"}),
    ({"min_coverage": 2}, {"robust": "median"}),
    ({"attackers": 0.9}, {"attack": "wrong-ranks"}),
    ({"attack_strength": 2.0}, {"attack": "noise"}),
    ({"dp_delta": 1e-6}, {"dp_clip": 1.0, "dp_noise": 1.0}),
]


@pytest.mark.parametrize(("given", "needed"), IDLE)
def test_a_setting_that_does_nothing_is_refused_with_what_it_needs(given, needed):
    (name,) = given
    if needed is None:  # as it is by default
        base, needed = replace(BASE, task="instruction"), {"task": "causal-lm"}
    else:
        base = BASE
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} .* does nothing without --"):
        replace(base, **given)
    replace(base, **given, **needed)


@pytest.mark.parametrize("name", ["text_column", "target_modules", "prompt_columns"])
@pytest.mark.parametrize("empty", ["", " , "])
def test_a_list_of_nothing_is_refused(name, empty):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} names nothing"):
        replace(BASE, **{name: empty})
