"""The search of a comparison: equal for all, on validation rows, and used."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fslora import checkpoint
from fslora.compare.command import compare
from fslora.compare.search import search
from fslora.compare.settings import CompareConfig
from fslora.config import SimulateConfig
from fslora.prepare import prepare
from tests.federated.folders import tree

QUIET = Console(quiet=True)


def test_the_search_is_equal_never_sees_test_rows_and_is_used(track):
    track = replace(track, search="lr=1e-6,3e-2", search_rounds=1)
    found = compare(track, QUIET)["datasets"][0]
    trials = found["search"]["trials"]
    tried = [(t["label"], t["seed"], t["values"]["lr"]) for t in trials]
    grid = [(s, lr) for s in (0, 1) for lr in (1e-6, 3e-2)]
    assert tried == [(label, *at) for label in ("fslora", "fedit") for at in grid]
    best = {(t["label"], t["seed"]): t for t in trials if t["chosen"]}
    for trial in trials:
        assert best[trial["label"], trial["seed"]]["loss"] <= trial["loss"]
    for each in found["strategies"]:
        for run in each["runs"]:
            assert run["lr"] == best[each["label"], run["seed"]]["values"]["lr"]
    saved = json.loads(
        (Path(track.run.out) / "search/fedit/seed-1/lr=0.03/summary.json").read_text()
    )
    assert saved["split"]["evaluation"] != found["splits"]["1"]["evaluation"]


@pytest.mark.parametrize(
    ("figure", "chosen"), [("metric", [False, False, True]), ("loss", [True, False, False])]
)
def test_a_trial_is_judged_by_its_last_round(track, monkeypatch, figure, chosen):
    track = replace(track, strategies="fslora", seeds="0", search="lr=1e-3,1e-2,3e-2")
    ends = iter([(0.5, 2.0), (0.7, 3.0), (0.7, 2.5)])
    first = {"eval_metric": 0.1, "eval_loss": 9.0}

    def records(_):
        return [first, dict(zip(first, next(ends), strict=True))]

    monkeypatch.setattr(CompareConfig, "figure", figure)
    monkeypatch.setattr("fslora.compare.search.run_all", lambda *_: {})
    monkeypatch.setattr(checkpoint, "read_records", records)
    assert [record["chosen"] for record in search(track)] == chosen


def test_a_search_can_be_extended_with_the_comparison(track):
    first = replace(track, strategies="fslora", seeds="0", search="lr=1e-3,3e-2", search_rounds=1)
    compare(first, QUIET)
    longer = compare(replace(first, search_rounds=3), QUIET)["datasets"][0]
    assert len(longer["search"]["trials"]) == 2
    folder = Path(track.run.out) / "search/fslora/seed-0/lr=0.03"
    assert checkpoint.rounds_done(folder) == 3
    again = tree(track.run.out)
    compare(replace(first, search_rounds=3), QUIET)
    assert tree(track.run.out) == again
    worse = replace(first, search="lr=1e-6", search_rounds=1)
    with pytest.raises(ValueError, match=r"now chooses lr = 1e-06 for fslora.*begun with 0.03"):
        compare(worse, QUIET)


def test_with_eval_data_one_search_serves_all_seeds(track, texts):
    track = replace(
        track, search="lr=1e-3;server_lr=1,2", run=replace(track.run, eval_data=str(texts))
    )
    assert [track.search_seed(seed) for seed in (0, 1)] == [0, 0]
    assert list(track.trials) == [{"lr": 1e-3, "server_lr": 1.0}, {"lr": 1e-3, "server_lr": 2.0}]


@pytest.mark.parametrize("task", ["causal-lm", "instruction"])
def test_validation_rows_come_from_the_clients_own_and_leave_the_test_rows_out(
    settings, task, tmp_path
):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"text": f"row {n} " * 9, "instruction": f"{n}", "response": f"r{n}"} for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {**settings, "data": str(path), "partition": "iid", "task": task, "eval_examples": 0}
    test = prepare(SimulateConfig(**given)).data
    tune = prepare(SimulateConfig(**given, validation=True)).data

    def rows_of(*parts):
        return [tuple(row[row > 0].tolist()) for part in parts for row in part.tensors["input_ids"]]

    assert sorted(rows_of(*tune.clients, tune.evaluation)) == sorted(rows_of(*test.clients))
    assert not set(rows_of(*tune.clients, tune.evaluation)) & set(rows_of(test.evaluation))
    assert all(len(examples) for examples in tune.clients)
    for row, owner in zip(rows_of(tune.evaluation), tune.evaluation_groups, strict=True):
        assert row in rows_of(test.clients[owner])
    assert 0.05 < len(tune.evaluation) / sum(map(len, test.clients)) < 0.15
