import json

import pytest

from benchmarks import timing
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.timing import (
    LEAST_ROUNDS,
    Pairs,
    append_record,
    bootstrap,
    clock,
    provenance,
    ratio_of_medians,
    take_turns,
)


def test_the_interval_holds_the_median_and_narrows_with_more_samples():
    few = bootstrap([1.0, 2.0, 3.0])
    many = bootstrap([1.0, 2.0, 3.0] * 40)
    assert few.median == many.median == 2.0
    assert 1.0 <= few.low < few.median < few.high <= 3.0
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [(0.8, "ours is faster"), (1.01, "no difference that the noise allows"), (1.1, "ours is slow")],
)
def test_the_verdict_follows_the_interval(ours, verdict):
    pairs = Pairs([ours, ours * 1.001, ours, ours, ours], [1.0] * 5)
    assert pairs.ratio.median == pytest.approx(ours)
    assert pairs.verdict.startswith(verdict)


def test_the_spread_is_that_of_our_runs_alone():
    steady = Pairs([1.0, 1.0, 1.0, 1.0], [1.0, 5.0, 1.0, 5.0])
    assert (steady.spread.low, steady.spread.high) == (1.0, 1.0)
    assert Pairs([1.0, 2.0], [1.0, 1.0]).spread.median == 2.0


def test_every_peer_runs_beside_ours_in_both_orders():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in ("ours", "a", "b", "c")}
    ours = runs.pop("ours")
    numbers = iter(range(100))

    def measure(function):
        function()
        return float(next(numbers))

    turns = take_turns(ours, runs, measure, seconds=0.0, rounds=2)
    rounds = ["a", "ours", "b", "c", "ours"], ["b", "ours", "a", "c", "ours"]
    assert order == ["ours", "a", "b", "c", *rounds[0], *rounds[1]]
    assert turns.rounds == 2
    assert turns.peer_s == {"a": [0.0, 7.0], "b": [2.0, 5.0], "c": [3.0, 8.0]}
    assert turns.beside_s == {"a": [1.0, 6.0], "b": [1.0, 6.0], "c": [4.0, 9.0]}
    assert turns.ours_s == [1.0, 4.0, 6.0, 9.0]
    assert turns.pairs("c").ratio.median == pytest.approx((4 / 3 + 9 / 8) / 2)
    assert turns.spread.median == 1.5  # of 4, 6/4, 9/6


def test_time_is_spent_and_a_few_rounds_are_always_run():
    measure = clock("cpu")
    few = take_turns(lambda: None, {"peer": lambda: None}, measure, seconds=0.0)
    many = take_turns(lambda: None, {"peer": lambda: None}, measure, seconds=0.05)
    assert few.rounds == LEAST_ROUNDS < many.rounds


def test_the_clock_counts_work():
    measure = clock("cpu")
    assert measure(lambda: sum(range(300_000))) > 10 * measure(lambda: None)


def test_a_ratio_of_small_differences():
    found = ratio_of_medians([1.0, 1.1, 0.9, -5.0, 1.0], [4.0, 4.0, 0.0, 4.0, 4.0])
    assert found.median == 0.25
    assert found.low < 0.25 <= found.high


def test_records_are_lines_of_json_with_their_circumstances(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    for number in (1, 2):
        append_record(path, {"number": number, **provenance()})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["number"] for record in records] == [1, 2]
    assert {"commit", "device", "versions", "date"} <= records[0].keys()
    assert records[0]["versions"]["torch"] != "not installed"


def test_names_are_listed_and_a_wrong_one_is_refused(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in BENCHMARKS)
    assert main(["fast"]) == 2
    assert "no benchmark 'fast'" in capsys.readouterr().err


def test_a_copy_without_history_is_told_which_commit_it_is(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(timing.subprocess, "run", no_git)
    monkeypatch.delenv("FSLORA_COMMIT", raising=False)
    assert timing.git_commit() == "unknown"
    monkeypatch.setenv("FSLORA_COMMIT", "abc1234")
    assert timing.git_commit() == "abc1234"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["memory", "--device", "cuda"], "torch sees no GPU here; leave out --device cuda"),
        (["model", "--device", "cuda"], "torch sees no GPU here"),
        (["cost", "--model", "/no/model"], "there is no model folder /no/model"),
        (["round", "--model", "docs-base", "--ratios", "3"], "--ratios must be in (0, 1], got 3"),
    ],
)
def test_what_a_user_can_mend_is_one_line(flags, said, capsys, monkeypatch):
    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: False)
    threads = timing.torch.get_num_threads()
    try:
        assert main(flags) == 2
    finally:
        timing.torch.set_num_threads(threads)
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks {flags[0]}: {said}")
    assert error.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("benchmarks.kernels.main", json.loads)
    with pytest.raises(TypeError):
        main(["kernels"])


def test_what_ran_on_the_processor_is_said_to_have(monkeypatch):
    monkeypatch.setattr(timing.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing.torch.cuda, "get_device_name", lambda: "a GPU")
    assert provenance()["device"] == provenance("cuda")["device"] == "a GPU"
    assert provenance("cpu")["device"] != "a GPU"


def test_too_few_pairs_have_no_verdict():
    assert "say nothing" in Pairs([2.0, 2.0], [1.0, 1.0]).verdict


@pytest.mark.parametrize("text", ["1", "-3", "two", "2.5"])
def test_a_number_that_is_too_small_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        main(["round", "--repeats", text])
    assert f"a whole number from 2 on, not '{text}'" in capsys.readouterr().err
