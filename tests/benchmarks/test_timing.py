import json

import pytest

from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.timing import Pairs, append_record, bootstrap, provenance


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
    pairs = Pairs([ours, ours * 1.001, ours], [1.0, 1.0, 1.0])
    assert pairs.ratio.median == pytest.approx(ours)
    assert pairs.verdict.startswith(verdict)


def test_the_spread_is_that_of_our_runs_alone():
    steady = Pairs([1.0, 1.0, 1.0, 1.0], [1.0, 5.0, 1.0, 5.0])
    assert (steady.spread.low, steady.spread.high) == (1.0, 1.0)
    assert Pairs([1.0, 2.0], [1.0, 1.0]).spread.median == 2.0


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
