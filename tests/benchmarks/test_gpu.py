import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import (
    gpu,
    gpu_checks,
    gpu_layer,
    gpu_targets,
    gpu_tools,
    gpu_tuning,
    graphs,
    peers,
)
from benchmarks.gpu import STAGES
from benchmarks.gpu_layer import DRY_EXTENT, Cells
from benchmarks.shapes import GPU_TARGETS
from benchmarks.timing import clock
from fslora_kernels._dispatch import interpreting

from .test_gpu_operations import wrong_projections, wrong_scale

FILES = {"results.json", "table.txt", "tuned.json", "layer.jsonl", "layer.png"}
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
    assert {path.name for path in tmp_path.iterdir()} <= FILES
    results = gpu.read(tmp_path)
    assert list(results) == list(STAGES)
    for name, result in results.items():
        assert (result["stage"], result["status"], result["dry"]) == (name, "ok", True)
        assert result["rows"]
        assert {"commit", "device", "versions"} <= result.keys()
    assert (tmp_path / "table.txt").read_text().strip() in printed
    lines = (tmp_path / "layer.jsonl").read_text().splitlines()
    measured = {json.loads(line)["cell"]["name"] for line in lines}
    assert measured == set(gpu_targets.PROJECTIONS)
    assert (tmp_path / "layer.png").read_bytes()[:4] == b"\x89PNG"
    figures = ("8B layer in one step", "8B layer, sum of seven", "2 adapters × 8 tokens")
    for figure in (*figures, "beside torch.compile"):
        assert figure in printed


def test_everything_takes_less_than_ten_minutes():
    assert sum(limit for _, limit in STAGES.values()) <= gpu.TOTAL_S <= 560


def broken(setting):
    yield {"what": "a finding", "ok": True}
    raise RuntimeError("the device is gone")


@pytest.mark.usefixtures("dry")
def test_a_failing_stage_is_recorded_and_the_next_goes_on(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_checks, "broken", broken, raising=False)
    monkeypatch.setitem(STAGES, "broken", ("benchmarks.gpu_checks", 60))
    assert gpu.main(["--dry", "--only", "broken", "environment", "--out", str(tmp_path)]) == 1
    result = gpu.read(tmp_path)["broken"]
    assert (result["status"], result["error"]) == ("failed", "RuntimeError: the device is gone")
    assert len(result["rows"]) == 1
    assert gpu.read(tmp_path)["environment"]["status"] == "ok"
    assert "FAILED broken: RuntimeError: the device is gone" in capsys.readouterr().out


def test_a_stage_runs_in_its_own_process_and_is_killed_when_late(dry, tmp_path):
    late = gpu.run_apart("environment", dataclasses.replace(dry, limit_s=0.05))
    assert (late["status"], late["error"]) == ("failed", "killed after 0.05 s")
    assert gpu.read(tmp_path)["environment"]["status"] == "failed"
    gpu.write(tmp_path, {"stage": "fuse", "status": "ok", "dry": True, "rows": []})
    assert gpu.run_apart("environment", dataclasses.replace(dry, limit_s=120))["status"] == "ok"
    assert {n: r["status"] for n, r in gpu.read(tmp_path).items()} == {
        "environment": "ok",
        "fuse": "ok",
    }


def told_to_end(setting):
    yield {"what": "a finding", "ok": True, "line": "the first line"}
    os.kill(os.getpid(), signal.SIGTERM)
    yield {"what": "never", "ok": True}


@pytest.mark.usefixtures("dry")
def test_the_table_is_written_when_the_script_is_told_to_end(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_checks, "told", told_to_end, raising=False)
    monkeypatch.setitem(STAGES, "told", ("benchmarks.gpu_checks", 60))
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "--only", "told", "environment", "--out", str(tmp_path)])
    text = (tmp_path / "table.txt").read_text()
    assert "the first line" in text
    assert "told          running" in text
    assert "without a result: environment" in text
    assert len(gpu.read(tmp_path)["told"]["rows"]) == 1


def test_what_a_stage_has_started_in_a_session_of_its_own_ends_with_it(tmp_path):
    started = tmp_path / "started"
    code = f"""if True:
        import subprocess, sys
        from benchmarks import gpu
        with gpu.ended_by_signals():
            tool = subprocess.Popen(["sleep", "60"], start_new_session=True)
            open({str(started)!r}, "w").write(str(tool.pid))
            gpu.finish(tool, 60)"""
    stage = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not (started.exists() and started.read_text()):
        assert stage.poll() is None
        time.sleep(0.05)
    assert gpu.finish(stage, 0.0) is None
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_what_a_stage_leaves_goes_to_the_next_and_all_to_the_last(monkeypatch, dry):
    limits = {}
    monkeypatch.setattr(gpu, "run_stage", lambda name, own: limits.update({name: own.limit_s}))
    gpu._run_all(["environment", "fuse", "memory"], dry, {"fuse": 7.0}, apart=False)
    first = STAGES["environment"][1]
    assert limits == {
        "environment": pytest.approx(first, abs=2),
        "fuse": pytest.approx(first + 7, abs=2),
        "memory": pytest.approx(gpu.TOTAL_S, abs=2),
    }
    gpu._run_all(["memory"], dry, {}, apart=False)
    assert limits["memory"] == pytest.approx(STAGES["memory"][1], abs=2)


def test_a_stages_process_without_a_gpu_does_not_go_dry_by_itself(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--here", "--only", "environment", "--out", str(tmp_path)])
    assert "sees no GPU" in capsys.readouterr().err
    assert gpu.read(tmp_path) == {}


def test_nothing_is_judged_after_the_device_is_lost(monkeypatch, dry):
    monkeypatch.setattr(gpu, "lost_device", lambda: "CUDA error: an illegal memory access")
    monkeypatch.setattr(gpu_checks, "faulty", faulty, raising=False)
    monkeypatch.setitem(STAGES, "faulty", ("benchmarks.gpu_checks", 60))
    result = gpu.run_stage("faulty", dry)
    assert len(result["rows"]) == 1
    assert "illegal memory access" in result["error"]


def faulty(setting):
    yield {"what": "the fault", "ok": False, "error": "it faults"}
    yield {"what": "what comes after", "ok": False, "error": "it faults too"}


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


def test_steps_in_graphs_take_turns_and_one_that_cannot_be_captured_says_why():
    ran = []

    def capture(step):
        if step is list:
            raise RuntimeError("copies to the device")
        return step

    steps = {name: functools.partial(ran.append, name) for name in ("ours", "base", "peer")}
    found = graphs.take_turns_in_graphs(
        "ours", steps | {"stuck": list}, clock("cpu"), seconds=0, rounds=3, capture=capture
    )
    assert found.errors == {"stuck": "copies to the device"}
    assert found.turns.rounds == 3
    assert found.turns.peer_s.keys() == {"base", "peer"}
    assert ran[3:6] == ["base", "ours", "peer"]
    alone = graphs.take_turns_in_graphs(
        "stuck", steps | {"stuck": list}, clock("cpu"), seconds=0, rounds=1, capture=capture
    )
    assert alone.turns is None


def wrong_peer(problem):
    raise ImportError("no such package")


def test_a_peer_that_fails_costs_its_own_row_and_no_more(monkeypatch, dry):
    right = gpu_layer.layer_rows
    monkeypatch.setattr(gpu_layer, "_DRY_ROWS", 5)
    monkeypatch.setattr(gpu_layer, "layer_rows", lambda *a, **k: [*right(*a, **k)[:3], wrong_peer])
    results, rows = measured(dry)
    assert all(row["ok"] and "wrong_peer" in row["line"] for row in rows)
    assert "no such package" in rows[0]["red"]["wrong_peer"]
    row = gpu_targets.layer_sum(results)
    assert row["ok"]
    assert "wrong_peer" not in row["ms"]
    assert {"ours", "base"} < row["ms"].keys()


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
