"""The commands around the planner's costs: names, flags, and processes that fail."""

import subprocess
import sys
from contextlib import suppress

import pytest

from benchmarks import allocator, plan, plan_fleets, scale
from fslora.config import SimulateConfig
from fslora.errors import StoppedRunError

KNOWN = {
    name: SimulateConfig(model="docs-base", data="python-docs") for name in ("llama-768", "MiniLM")
}


def test_all_that_is_at_hand_or_what_is_named():
    assert plan.chosen_of(KNOWN, None) == KNOWN
    assert list(plan.chosen_of(KNOWN, "MiniLM")) == ["MiniLM"]


@pytest.mark.parametrize("module", [plan, allocator])
def test_a_model_that_is_not_there_is_refused(module, monkeypatch):
    monkeypatch.setattr(module, "workloads", lambda _: dict(KNOWN))
    with pytest.raises(ValueError, match="there is no 'llama-9' here, only llama-768, MiniLM"):
        module.main(["--models", "MiniLM,llama-9"])


def row(bytes_up):
    return plan.CostRow("m", 4, (1, 1), (1,), (0,), (1, 1), (5, 5), (6, bytes_up), (1, 1))


@pytest.mark.parametrize("bytes_up", [6, 7])
def test_bytes_that_are_predicted_wrongly_are_said_and_no_success(bytes_up, monkeypatch, capsys):
    monkeypatch.setattr(plan, "workloads", lambda _: {"m": None})
    monkeypatch.setattr(plan, "measure", lambda *_, **__: [row(bytes_up)])
    assert plan.main([]) == bytes_up - 6
    assert ("WRONG" in capsys.readouterr().out) == (bytes_up == 7)


@pytest.mark.parametrize("text", ["1024,0", "0,many", ""])
def test_quotients_are_over_the_allocators_own_habits(text, capsys):
    with pytest.raises(SystemExit):
        allocator.main(["--thresholds", text])
    assert "the first 0" in capsys.readouterr().err


def test_a_process_that_has_ended_is_told_of():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], **pipes)
    ended.wait()
    with pytest.raises(StoppedRunError, match="ended with code 3"):
        allocator._ask(ended)
    ended.stdout.close()
    with suppress(BrokenPipeError):
        ended.stdin.close()


def test_a_cell_that_fails_is_told_of(monkeypatch):
    monkeypatch.setattr(scale.sys, "executable", "/bin/false")
    with pytest.raises(StoppedRunError, match="ended with code 1"):
        scale.apart({"clients": 1})


def test_a_plan_that_never_arrives_is_said_to():
    planned = plan_fleets.Result("toy", "planned", (1, 4), (9, None), (30.0, None))
    others = [
        plan_fleets.Result("toy", c, (4, 4), (6, 6), (9.0, 11.0)) for c in ("uniform", "most")
    ]
    over, line = plan_fleets.verdict([planned, *others])
    assert over == float("inf")
    assert "planned (1, 4) never [9, None]" in line
    assert "uniform (4, 4) 10.0 s [6, 6]" in line


def test_a_fleet_that_is_not_there_is_missed_at_once(capsys):
    with pytest.raises(SystemExit):
        plan_fleets.main(["--fleets", "equal,poor"])
    assert "there is no fleet poor" in capsys.readouterr().err
