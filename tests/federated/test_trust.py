import json
import math

import pytest
import torch

from fslora import checkpoint, trust
from fslora.__main__ import main
from fslora.config import SimulateConfig
from fslora.simulate import simulate
from fslora.strategies import STRATEGIES
from fslora.trust import PRIVATE, ROBUST, Rule, idle_attack, thin_coverage

from .test_cli import flags as as_flags
from .worlds import tensors_of

BASE = {"model": "m", "data": "d"}
DP = {"dp_clip": 1.0, "dp_noise": 1.0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_norm": -1.0}, "--max-norm must be at least 0"),
        ({"max_norm": math.inf}, "--max-norm must be a finite number"),
        ({"targets": "loss:nan"}, "is neither a score"),
        ({"quarantine": -1}, "--quarantine must be at least 0"),
        ({"trim": 0.5}, "--trim must be in"),
        ({"min_coverage": 0}, "--min-coverage must be at least 1"),
        ({"robust_clip": -1.0}, "--robust-clip must be at least 0"),
        ({"attackers": 1.5}, "--attackers must be a share"),
        ({"attack_strength": 0.0}, "--attack-strength must be positive"),
        ({"attack": "label-flip"}, "needs classes; use it with --task classification"),
        ({"dp_clip": 1.0}, "without noise use --robust clip"),
        ({"dp_noise": 1.0}, "--dp-clip and --dp-noise go together"),
        ({**DP, "dp_noise": 1e9}, "--dp-noise is in units of --dp-clip"),
        ({**DP, "dp_noise": 1e-155}, "--dp-noise is in units of --dp-clip"),
        ({**DP, "dp_delta": 0.0}, "--dp-delta must be in"),
        ({**DP, "averaging": "count"}, "--averaging count divides by what clients trained"),
        ({**DP, "sampler": "importance"}, "--sampler importance weighs a client's ranks"),
        ({**DP, "sampler": "balanced"}, "--sampler balanced lets who takes part decide"),
        (
            {**DP, "forward": "full", "averaging": "inverse", "depth": "uniform"},
            "--averaging inverse divides",
        ),
        ({**DP, "forward": "full", "averaging": "inverse"}, "--averaging inverse"),
        ({"robust": "median", "per_round": 2}, "--min-coverage 3 is more than the --per-round 2"),
        ({**DP, "robust": "median"}, "--robust median releases no sum"),
        ({**DP, "quarantine": 2}, "--quarantine makes the draw"),
        (
            {**DP, "over_select": 1.5, "devices": "phone:poor=1"},
            "--over-select lets one client's answer decide",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_its_flag(flags, message):
    with pytest.raises(ValueError, match=message):
        SimulateConfig(**BASE, **flags)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rules_and_privacy_are_for_the_strategies_they_suit(strategy):
    for allowed, flags, word in ((ROBUST, {"robust": "median"}, "median"), (PRIVATE, DP, "noise")):
        if strategy in allowed:
            SimulateConfig(**BASE, strategy=strategy, **flags)
        else:
            with pytest.raises(ValueError, match=f"{word}.* use --strategy fslora, "):
                SimulateConfig(**BASE, strategy=strategy, **flags)


def test_the_default_is_no_rule_no_attack_no_privacy():
    config = SimulateConfig(**BASE)
    assert config.rule.name == config.threat.attack == "none"
    assert config.privacy(20) is None


def test_privacy_is_among_the_clients_there_are():
    privacy = SimulateConfig(**BASE, **DP, clients=50, per_round=7).privacy(40)
    assert (privacy.clients, privacy.cohort) == (40, 7)


def test_a_missing_accountant_is_missed_before_any_training(monkeypatch):
    monkeypatch.setattr(trust, "find_spec", lambda _: None)
    SimulateConfig(**BASE)
    with pytest.raises(ValueError, match="needs an accountant: pip install"):
        SimulateConfig(**BASE, **DP)


@pytest.mark.parametrize(
    ("strategy", "rule", "ratio", "warned"),
    [
        ("fslora", Rule("median"), 0.29, True),
        ("fed-plora", Rule("trimmed"), 0.29, True),
        ("fslora", Rule("median"), 0.3, False),
        ("fslora", Rule("clip"), 0.1, False),
        ("fedit", Rule("median"), 0.29, False),
    ],
)
def test_ranks_that_too_few_clients_train_are_a_warning(strategy, rule, ratio, warned):
    warning = thin_coverage(strategy, rule, 10, ratio)
    assert bool(warning) == warned
    assert not warned or "by 2.9 clients" in warning


@pytest.mark.parametrize("strategy", ["centralised", "zero-shot", "head-only"])
def test_an_attack_is_called_idle_where_it_changes_nothing(settings, tiny_bert, tmp_path, strategy):
    """With everybody hostile."""
    few = {"per_round": 1, "rounds": 1, "eval_sketched": False, "strategy": strategy}
    given = {**settings, "model": str(tiny_bert), "task": "classification", **few}
    ends = {}
    for attack in ("none", "sign-flip", "wrong-ranks", "label-flip"):
        own = {} if attack == "none" else {"attack": attack, "attackers": 1.0}
        simulate(SimulateConfig(**{**given, **own, "out": str(tmp_path / attack)}))
        ends[attack] = tensors_of(checkpoint.load_state(tmp_path / attack))
    clean = ends.pop("none")
    for attack, end in ends.items():
        same = all(torch.equal(tensor, end[entry]) for entry, tensor in clean.items())
        assert bool(idle_attack(strategy, attack)) == same


def test_an_idle_attack_is_a_warning(settings, capsys):
    given = as_flags(settings, strategy="zero-shot", rounds=1)
    assert main(["simulate", *given, "--attack=scale"]) == 0
    assert "--attack scale does nothing with --strategy zero-shot" in capsys.readouterr().err
    given = [flag for flag in given if not flag.startswith(("--strategy", "--out"))]
    named = [f"--out={settings['out']}-compared", "--strategies=zero-shot,fedit", "--seeds=0"]
    assert main(["compare", *given, *named, "--attack=scale"]) == 0
    said = capsys.readouterr().err
    assert "fslora: zero-shot: --attack scale does nothing" in said
    assert "fslora: fedit" not in said
    assert not any(idle_attack(name, "none") for name in STRATEGIES)


def test_the_mean_coverage_weighs_the_devices_and_counts_every_draw():
    tables = [
        {"compute": "phone", "network": "poor", "share": 0.75, "ratio": 0.25},
        {"compute": "gpu", "network": "5g", "share": 0.25, "ratio": 1.0},
    ]
    assert SimulateConfig(**BASE, devices=json.dumps(tables)).mean_coverage == pytest.approx(0.4375)
    assert SimulateConfig(**BASE, ratios="1/4,1/2").mean_coverage == 0.375
    often = SimulateConfig(**BASE, ratios="1/4,1/2", redraw="step", local_steps=2)
    assert often.mean_coverage == pytest.approx((7 / 16 + 3 / 4) / 2)
