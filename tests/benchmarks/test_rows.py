import dataclasses
import statistics

import pytest
import torch

from benchmarks import peers
from benchmarks.checks import Referee
from benchmarks.compare import compare, record
from benchmarks.peers import kernel_rows, layer_rows
from benchmarks.problem import make_problem
from benchmarks.roofline import Ceilings, ceilings, least_time
from benchmarks.shapes import Cell
from benchmarks.table import cell_table, summary
from benchmarks.timing import Interval, clock
from fslora_kernels import _onednn
from fslora_kernels.ops.sketched_linear import cost

CEILINGS = Ceilings(1e11, 1e10)


def cell(size=4, dtype="float32", **changes):
    return dataclasses.replace(
        Cell("tiny", 32, 24, 40, 16, size, dtype, "cpu", tuned=False), **changes
    )


def built(shape, rows=layer_rows):
    problem = make_problem(shape)
    return problem, {row.name: row for row in (b(problem) for b in rows(shape, compiled=False))}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [4, 16])
def test_every_row_is_right(dtype, size):
    shape = cell(size, dtype)
    problem, rows = built(shape)
    for row in [*rows.values(), *built(shape, kernel_rows)[1].values()]:
        assert Referee(problem).error(row) is None, row.name
    sketched = {"PEFT at S", "dense mask", "index_select", "ours, view", "ours at R"} <= set(rows)
    assert sketched == (size < 16)
    assert ("PEFT at R, autocast" in rows) == (dtype == "bfloat16")


@pytest.mark.parametrize("name", ["ours", "PEFT at R", "PEFT at S", "dense mask", "Unsloth style"])
def test_a_wrong_scale_is_seen(name):
    problem, rows = built(cell())
    row = rows[name]
    wrong = dataclasses.replace(row, call=lambda: row.call() * 1.001)
    assert "exceeds its budget" in Referee(problem).error(wrong)


def test_a_mask_that_is_not_applied_is_seen(monkeypatch):
    right = peers.Problem.selected
    problem, rows = built(cell())
    every = dataclasses.replace(problem, index=torch.arange(16))
    unmasked = peers.dense_mask(every)
    assert Referee(problem).error(unmasked) is not None
    monkeypatch.setattr(peers.Problem, "selected", lambda self: tuple(2 * t for t in right(self)))
    assert Referee(problem).error(rows["ours"]) is not None


def measured(shape=None, rounds=6):
    shape = shape or cell()
    rows = layer_rows(shape, compiled=False)
    return compare(shape, rows, CEILINGS, clock("cpu"), seconds=0, rounds=rounds)


def test_figures_of_a_cell():
    shape = cell(tokens=64, in_features=160, out_features=144)
    result = measured(shape)
    rows = {row.name: row for row in result.rows}
    assert result.red == []
    assert all(len(row.seconds) >= 6 for row in result.rows)
    assert len(rows["ours"].seconds) > 6  # it stands beside every peer
    forward, backward = (cost(64, 160, 144, 4, backward=b) for b in (False, True))
    useful = 2 * forward.base_flops + forward.lora_flops + backward.lora_flops
    assert result.useful_flops == useful
    assert rows["ours"].counted.flops == rows["PEFT at S"].counted.flops == useful
    extra = (useful - rows["base"].counted.flops) * 4
    assert rows["dense mask"].counted.flops - rows["base"].counted.flops == extra
    assert rows["Unsloth style"].counted.flops > useful
    # x, and the hidden ranks; the weight and the factors are not counted.
    assert rows["ours"].counted.saved_bytes == 4 * 64 * (160 + 4)
    assert rows["base"].counted.saved_bytes == 0
    # Hooks would make it add the delta afterwards: more memory, more traffic.
    assert rows["ours"].counted.peak_bytes == rows["delta first"].counted.peak_bytes
    assert rows["ours"].counted.bytes_moved <= rows["delta first"].counted.bytes_moved
    assert rows["dense mask"].counted.peak_bytes > rows["ours"].counted.peak_bytes
    assert rows["base"].over_base.median == 1.0
    assert rows["PEFT at R"].over_peft.median == 1.0
    assert rows["ours"].adapter_s.median == pytest.approx(
        rows["ours"].over_base.median * statistics.median(rows["base"].seconds)
        - statistics.median(rows["base"].seconds),
        abs=statistics.median(rows["base"].seconds),
    )
    assert result.least_s == pytest.approx(
        (2 * forward.base_flops) / 1e11
        + sum(max(c.lora_flops / 1e11, c.lora_bytes / 1e10) for c in (forward, backward))
    )
    assert rows["ours"].roofline < 1.0
    printed = cell_table(result)
    assert "unseen by tuning" in printed
    assert "dense mask" in printed
    kept = record(result, rows["ours"])
    assert kept["row"] == "ours"
    assert kept["cell"]["ratio"] == 0.25
    assert kept["over_base"]["median"] == rows["ours"].over_base.median


@pytest.mark.skipif(_onednn.operator() is None, reason="this torch has no oneDNN")
def test_where_ours_takes_onednn_the_bare_layer_is_shown_by_it_too(monkeypatch):
    monkeypatch.setattr(_onednn, "LEAST", 1)
    monkeypatch.setattr(_onednn, "TOKENS", 1)
    monkeypatch.setattr(_onednn, "faster", lambda: False)
    assert "base, oneDNN" not in built(cell())[1]
    monkeypatch.setattr(_onednn, "faster", lambda: True)
    assert "base, oneDNN" not in built(cell(dtype="bfloat16"))[1]
    problem, rows = built(cell())
    assert Referee(problem).error(rows["base, oneDNN"]) is None
    result = measured()
    by_name = {row.name: row for row in result.rows}
    assert by_name["base, oneDNN"].counted.flops == by_name["base"].counted.flops
    assert not by_name["base, oneDNN"].ours
    fastest = Interval(9.0, 9.0, 9.0)  # a bare layer faster than ours makes ours no slower
    rows = [
        dataclasses.replace(row, ours_over=fastest) if row.name == "base, oneDNN" else row
        for row in result.rows
    ]
    assert dataclasses.replace(result, rows=rows).best_peer.name == result.best_peer.name


def test_a_red_row_has_no_figures(monkeypatch):
    right = peers._DeltaFirst.backward

    def wrong(ctx, dy):
        dx, _, da, db, _ = right(ctx, dy)
        return dx, None, da * 1.1, db, None

    monkeypatch.setattr(peers._DeltaFirst, "backward", staticmethod(wrong))
    result = measured(rounds=1)
    assert [row.name for row in result.red] == ["delta first"]
    assert result.red[0].seconds == ()
    line = next(x for x in cell_table(result).splitlines() if "delta first" in x)
    assert "red: AssertionError: dA" in line


def test_nothing_is_timed_while_ours_is_red(monkeypatch):
    monkeypatch.setattr(peers.fslora_kernels, "bind", lambda model, leaves: None)
    result = measured(rounds=1)
    assert result.rows[0].error is not None
    assert all(row.seconds == () for row in result.rows)
    assert "red:" in summary([result])


def test_slower_is_what_the_interval_says():
    result, hasty = measured(rounds=5), measured(rounds=4)

    def with_ratios(ratios, result=result):
        rows = [
            dataclasses.replace(r, ours_over=ratios.get(r.name, Interval(0.5, 0.4, 0.6)))
            for r in result.rows
        ]
        return dataclasses.replace(result, rows=rows)

    noisy = with_ratios({"delta first": Interval(1.08, 1.02, 1.2)})
    slower = with_ratios({"delta first": Interval(1.08, 1.04, 1.2)})
    base = with_ratios({"base": Interval(1.3, 1.2, 1.4), "ours at R": Interval(2.0, 1.9, 2.1)})
    assert (noisy.slower, slower.slower, base.slower) == (False, True, False)
    assert slower.best_peer.name == "delta first"
    assert not with_ratios({"delta first": Interval(1.08, 1.04, 1.2)}, hasty).slower
    tuned = dataclasses.replace(noisy, cell=cell(tuned=True))
    text = summary([tuned, slower])
    seen, unseen = text.split("cells never tuned on")
    assert "slower than the best peer in 0 of 1 cells" in seen
    assert "delta first   SLOWER" in unseen
    assert "slower than the best peer in 1 of 1 cells" in unseen


def test_ceilings_are_measured_and_the_least_time_follows_them():
    found = ceilings("cpu", torch.float32, clock("cpu"), shrink=16)
    assert found.flops_per_s > 0
    assert found.bytes_per_s > 0
    fixed = {"itemsize_bytes": 4, "flop_rate": 1e12}
    slow, fast = (least_time(64, 24, 40, 4, byte_rate=rate, **fixed) for rate in (1e9, 2e9))
    base = least_time(64, 24, 40, 0, byte_rate=1e9, **fixed)
    assert base == pytest.approx(2 * 2 * 64 * 24 * 40 / 1e12)
    assert (slow - base) == pytest.approx(2 * (fast - base))
