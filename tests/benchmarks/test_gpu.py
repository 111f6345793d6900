import dataclasses
import json

import pytest
import torch

from benchmarks import (
    compare,
    gpu,
    gpu_checks,
    gpu_layer,
    gpu_targets,
    gpu_tools,
    gpu_tuning,
    peers,
)
from benchmarks.gpu import STAGES
from benchmarks.gpu_layer import DRY_EXTENT, Cells
from benchmarks.shapes import GPU_TARGETS
from benchmarks.timing import clock
from fslora_kernels._dispatch import interpreting

from .test_gpu_operations import wrong_projections, wrong_scale

interpreted = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1 from the start"),
]


# -- the script ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("dry")
def test_the_dry_run_passes_says_so_and_writes_every_stage(capsys, tmp_path):
    code = gpu.main(["--dry", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert printed.startswith("DRY (as asked)")
    for name in STAGES:
        result = json.loads((tmp_path / f"{name}.json").read_text())
        assert (result["stage"], result["status"], result["dry"]) == (name, "ok", True)
        assert result["rows"]
        assert {"commit", "device", "versions"} <= result.keys()
    assert (tmp_path / "table.txt").read_text().strip() in printed
    lines = (tmp_path / "layer.jsonl").read_text().splitlines()
    measured = {json.loads(line)["cell"]["name"] for line in lines}
    assert measured == set(gpu_targets.PROJECTIONS)
    assert (tmp_path / "layer.png").read_bytes()[:4] == b"\x89PNG"
    for figure in ("8B layer in one step", "8B layer, sum of seven", "2 adapters × 8 tokens"):
        assert figure in printed


def test_everything_takes_less_than_ten_minutes():
    assert sum(limit for _, limit in STAGES.values()) <= 590


def broken(setting):
    yield {"what": "a finding", "ok": True}
    raise RuntimeError("the device is gone")


@pytest.mark.usefixtures("dry")
def test_a_failing_stage_is_recorded_and_the_next_goes_on(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_checks, "broken", broken, raising=False)
    monkeypatch.setitem(STAGES, "broken", ("benchmarks.gpu_checks", 60))
    assert gpu.main(["--dry", "--only", "broken", "environment", "--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "broken.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "RuntimeError: the device is gone")
    assert len(result["rows"]) == 1
    assert json.loads((tmp_path / "environment.json").read_text())["status"] == "ok"
    assert "FAILED broken: RuntimeError: the device is gone" in capsys.readouterr().out


def test_a_stage_runs_in_its_own_process_and_is_killed_when_late(dry, tmp_path):
    late = gpu.run_apart("environment", dry, 0.05)
    assert (late["status"], late["error"]) == ("failed", "killed after 0.05 s")
    assert json.loads((tmp_path / "environment.json").read_text())["status"] == "failed"
    assert gpu.run_apart("environment", dry, 120)["status"] == "ok"
    assert json.loads((tmp_path / "environment.json").read_text())["status"] == "ok"


def test_fuse_sees_a_sketch_that_is_not_applied(monkeypatch, dry):
    monkeypatch.setattr(gpu_checks.fslora_kernels, "bind", lambda model, leaves: None)
    result = gpu.run_stage("fuse", dry)
    wrong = [row["what"] for row in result["rows"] if not row["ok"]]
    assert result["status"] == "failed"
    assert wrong
    assert all("S=4" in what for what in wrong)


# -- tuning ----------------------------------------------------------------------------------------


@pytest.mark.skipif(interpreting(), reason="there Triton can run")
def test_without_triton_tuning_says_why_it_is_left_out(dry):
    (row,) = gpu_tuning.tuning(dry)
    assert row["ok"]
    assert "need a GPU" in row["refused"]


# -- layer and memory ------------------------------------------------------------------------------


def test_the_targets_hold_every_projection_of_the_layer():
    assert set(gpu_targets.PROJECTIONS) < {cell.name for cell in GPU_TARGETS}
    by_name = {cell.name: (cell.in_features, cell.out_features) for cell in GPU_TARGETS}
    products = sum(
        count * torch.tensor(by_name[n]).prod().item()
        for n, count in gpu_targets.PROJECTIONS.items()
    )
    assert products == sum(size * out for size, outs in gpu_targets.INPUTS for out in outs)
    assert {(c.tokens, c.sketch_size, c.dtype) for c in GPU_TARGETS} == {(8192, 16, "bfloat16")}


def measured(dry):
    cells = Cells(dry)
    rows = list(cells.rows(gpu_layer._targets(dry), 0.0, float("inf")))
    return cells.results, rows


def test_the_sum_counts_every_projection_as_often_as_a_layer_has_it(dry):
    results, rows = measured(dry)
    assert all(row["ok"] for row in rows)
    seconds = {"base": 1.0, "ours": 1.25}
    fixed = [
        dataclasses.replace(
            result,
            rows=[
                dataclasses.replace(row, seconds=(seconds[row.name],), graph_s=0.5)
                for row in result.rows
                if row.name in seconds
            ],
        )
        for result in results
    ]
    row = gpu_targets.layer_sum(fixed)
    assert row["ms"] == {"ours": 8750.0, "base": 7000.0}
    assert "ours +25.0% (in a graph +0.0%)" in row["line"]
    missing = gpu_targets.layer_sum(fixed[1:])
    assert not missing["ok"]
    assert "8b-q" in missing["error"]


def test_a_wrong_layer_is_red_and_no_sum_is_made_of_it(monkeypatch, dry):
    monkeypatch.setattr(peers.fslora_kernels, "bind", lambda model, leaves: None)
    results, rows = measured(dry)
    assert not any(row["ok"] for row in rows)
    assert all("ours:" in row["error"] and "line" not in row for row in rows)
    assert not gpu_targets.layer_sum(results)["ok"]


@pytest.mark.parametrize(
    ("comparison", "operation", "change"),
    [
        ("decoder_layer", "sketched_linear", wrong_scale),
        ("decoder_layer", "shared_sketched_linear", wrong_projections),
        ("grouped", "grouped_sketched_linear", wrong_scale),
    ],
)
def test_nothing_is_timed_while_a_comparison_is_wrong(monkeypatch, comparison, operation, change):
    timed = getattr(gpu_targets, comparison)
    right = timed(DRY_EXTENT, clock("cpu"))
    assert min(right["ms"].values()) > 0
    monkeypatch.setattr(gpu_targets, operation, change(getattr(gpu_targets, operation)))
    row = gpu_layer._guarded(comparison, lambda: timed(DRY_EXTENT, clock("cpu")))
    assert not row["ok"]
    assert "exceeds its budget" in row["error"]
    assert "ms" not in row


def test_cells_that_the_time_does_not_allow_are_counted(dry):
    (row,) = Cells(dry).rows(gpu_layer._targets(dry), 0.0, 0.0)
    assert row["ok"]
    assert "0 of 4 cells" in row["refused"]


def test_a_step_that_cannot_be_captured_says_why(monkeypatch):
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench_cudagraph", lambda step, **_: 2.0)
    assert compare.graph_seconds(list) == {"graph_s": 0.002}

    def refuse(step, **_):
        raise RuntimeError("copies to the device")

    monkeypatch.setattr(testing, "do_bench_cudagraph", refuse)
    assert compare.graph_seconds(list) == {"graph_error": "copies to the device"}


def test_memory_of_a_wrong_layer_is_red(monkeypatch, dry):
    monkeypatch.setattr(gpu_layer.decoder, "errors", lambda *_: {"ours at S": "wrong"})
    rows = {row["what"]: row for row in gpu_layer.memory(dry)}
    assert {what for what, row in rows.items() if not row["ok"]} == {
        "ours at S, dropout 0",
        "ours at S, dropout 0.1",
    }
    assert "line" not in rows["ours at S, dropout 0.1"]


# -- in the interpreter ----------------------------------------------------------------------------


class TestInterpreter:
    pytestmark = interpreted

    @pytest.mark.parametrize("stage", ["correctness", "operations", "fuse"])
    def test_the_kernels_take_part(self, stage, dry):
        result = gpu.run_stage(stage, dry)
        assert result["status"] == "ok", result
        assert any(
            row["what"].startswith("triton") and "refused" not in row for row in result["rows"]
        )

    def test_tuning_writes_a_table_beside_the_results_only(self, dry, monkeypatch, tmp_path):
        monkeypatch.setattr(gpu_tuning.tables, "SHIPPED", tmp_path / "shipped")
        *rows, _ = gpu_tuning.tuning(dry)
        assert {row["what"].split()[0] for row in rows} == {"apply", "wgrad"}
        assert len(gpu_tuning.tables.load(tmp_path / "tuned.json")) == len(rows)
        assert not (tmp_path / "shipped").exists()

    def test_the_launches_that_a_tool_looks_at(self, dry, capsys):
        assert [row["what"] for row in gpu_tools.sanitizer(dry)] == ["memcheck", "racecheck"]
        assert gpu_tools.gpu_launches.DONE in capsys.readouterr().out
