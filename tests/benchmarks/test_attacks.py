"""``python -m benchmarks attacks``: which runs it takes for done, and its table."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import attacks


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The settings of the runs that were asked for; nothing is trained."""
    seen = []

    def outcome_of(run, config, state):
        seen.append(config)
        return {"metric": 0.5, "loss": 1.0, "rejected": 0, "stopped": None, "cpu_seconds": 0.0}

    (tmp_path / "data/glue/SST-2").mkdir(parents=True)
    monkeypatch.setenv("FSLORA_SHARED", str(tmp_path))
    monkeypatch.setattr(attacks, "shared_model", lambda _: "docs-base")
    for name in ("deal", "warm", "prepare"):
        monkeypatch.setattr(attacks, name, lambda *_: None)
    monkeypatch.setattr(attacks, "score", lambda *_: SimpleNamespace(metric=0.25))
    monkeypatch.setattr(attacks, "outcome_of", outcome_of)
    threads = torch.get_num_threads()
    yield seen
    torch.set_num_threads(threads)


def test_a_run_is_done_once_for_each_schedule_and_strength(ran, capsys, tmp_path):
    flags = ["--seeds", "0", "--rules", "none", "--attacks", "none", "scale"]
    flags += ["--out", str(tmp_path / "out")]

    def new(*others):
        ran.clear()
        assert attacks.main([*flags, *others]) == 0
        return [(config.attack, config.rounds) for config in ran]

    assert new() == [("none", 6), ("scale", 6)]
    assert new() == []
    assert new("--strength", "100") == [("scale", 6)], "nobody's attack has no strength"
    assert new("--rounds", "7") == [("none", 7), ("scale", 7)]
    table = (tmp_path / "out/table.md").read_text()
    assert table.splitlines()[4:] == [
        "| none | 0.500 (0.500) ok | – | – | – |",
        "| scale × 10 | 0.500 (0.500) ok | – | – | – |",
    ]
    capsys.readouterr()


def test_the_committed_table_is_that_of_the_committed_runs():
    lines = attacks.read(attacks.RESULTS / "runs.jsonl")
    schedule = {name: lines[0][name] for name in attacks.SCHEDULE}
    assert attacks.of_schedule(lines, schedule) == lines
    written = (attacks.RESULTS / "table.md").read_text(encoding="utf-8")
    assert attacks.table(lines) == written


def test_data_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("FSLORA_SHARED", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="point FSLORA_SHARED at"):
        attacks.main(["--out", str(tmp_path)])
