"""``python -m benchmarks theory`` on the toy, smaller still than --quick."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.theory import command
from benchmarks.theory.effort import Effort

TINY = Effort(1, 200, 4, 2, 2, 6, 1, 2)


@pytest.fixture
def _tiny(monkeypatch):
    monkeypatch.setattr(command, "QUICK", TINY)


@pytest.mark.usefixtures("_tiny")
def test_rules_are_printed_first_and_every_claim_gets_a_verdict(capsys, tmp_path):
    assert main(["theory", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    rules, data = printed.split("\n\n", 2)[1:]
    records = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    on_the_toy = {c.name for c in command.CLAIMS} - {"P5c", "P5d"}
    assert {record["claim"]["name"] for record in records} == on_the_toy
    for claim in command.CLAIMS:
        assert claim.rule in rules
    for record in records:
        assert record["verdict"] in ("confirmed", "refuted", "undecided")
        assert f"{record['claim']['name']} on {record['setting']}: " in data
        assert record["predicted"] in data
        assert {"commit", "versions", "effort", "cpu_seconds"} <= record.keys()
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{name}.png" for name in ("p1c", "p2", "p3a", "p3b", "p3d", "p4a", "p4d", "p5a", "p6")
    }
    found = {record["claim"]["name"]: record["verdict"] for record in records}
    assert found["P1a"] == found["P1b"] == "confirmed"


@pytest.mark.usefixtures("_tiny")
def test_a_later_finding_replaces_an_earlier_one_in_the_pictures(tmp_path):
    for _ in range(2):
        assert main(["theory", "--quick", "--only", "P1", "--out", str(tmp_path)]) == 0
    assert len((tmp_path / "findings.jsonl").read_text().splitlines()) == 6
    assert len(command.read(tmp_path / "findings.jsonl")) == 3


def test_what_it_does_not_know_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["theory", "--only", "P9"])
    assert "unknown: P9" in capsys.readouterr().err


@pytest.mark.parametrize("settings", ["stories", "toy,agnews"])
def test_quick_is_of_the_toy_alone(settings, capsys):
    with pytest.raises(SystemExit):
        main(["theory", "--quick", "--settings", settings])
    assert f"not of {settings.rpartition(',')[2]}" in capsys.readouterr().err


def test_models_that_are_not_there_are_missed_before_the_toy_is_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("FSLORA_SHARED", str(tmp_path))
    monkeypatch.setattr(command, "on_toy", lambda *_: pytest.fail("run"))
    assert main(["theory", "--out", str(tmp_path)]) == 2
    assert "point FSLORA_SHARED at its parent" in capsys.readouterr().err


def test_settings_without_an_experiment(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command.models, "shared_folder", lambda: tmp_path)
    monkeypatch.setattr(command, "on_model", lambda *_: iter(()))
    assert main(["theory", "--only", "P2", "--settings", "agnews", "--out", str(tmp_path)]) == 2
    assert "these settings have no experiment for P2" in capsys.readouterr().err
