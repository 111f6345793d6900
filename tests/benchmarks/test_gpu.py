import json

import pytest

from benchmarks import gpu, gpu_checks
from benchmarks.gpu import STAGES, Setting
from fslora_kernels._dispatch import interpreting


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


def broken(setting):
    yield {"what": "a finding", "ok": True}
    raise RuntimeError("the device is gone")


def test_a_failing_stage_is_recorded_and_the_next_goes_on(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_checks, "broken", broken, raising=False)
    monkeypatch.setitem(STAGES, "broken", ("benchmarks.gpu_checks", 60))
    assert gpu.main(["--dry", "--only", "broken", "environment", "--out", str(tmp_path)]) == 1
    result = json.loads((tmp_path / "broken.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "RuntimeError: the device is gone")
    assert len(result["rows"]) == 1
    assert json.loads((tmp_path / "environment.json").read_text())["status"] == "ok"
    assert "FAILED broken: RuntimeError: the device is gone" in capsys.readouterr().out


def test_a_stage_runs_in_its_own_process_and_is_killed_when_late(tmp_path):
    setting = Setting(dry=True, out=tmp_path)
    late = gpu.run_apart("environment", setting, 0.05)
    assert (late["status"], late["error"]) == ("failed", "killed after 0.05 s")
    assert json.loads((tmp_path / "environment.json").read_text())["status"] == "failed"
    assert gpu.run_apart("environment", setting, 120)["status"] == "ok"
    assert json.loads((tmp_path / "environment.json").read_text())["status"] == "ok"


@pytest.mark.parametrize(("factor", "status"), [(1.0, "ok"), (1.01, "failed")])
def test_correctness_sees_a_wrong_scale(monkeypatch, tmp_path, factor, status):
    right = gpu_checks.sketched_linear

    def scaled(*args, scale, **arguments):
        return right(*args, scale=scale * factor, **arguments)

    monkeypatch.setattr(gpu_checks, "sketched_linear", scaled)
    result = gpu.run_stage("correctness", Setting(dry=True, out=tmp_path))
    assert result["status"] == status


def test_fuse_sees_a_sketch_that_is_not_applied(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_checks.fslora_kernels, "bind", lambda model, leaves: None)
    result = gpu.run_stage("fuse", Setting(dry=True, out=tmp_path))
    wrong = [row["what"] for row in result["rows"] if not row["ok"]]
    assert result["status"] == "failed"
    assert all("S=4" in what for what in wrong)


@pytest.mark.interpreter
@pytest.mark.skipif(not interpreting(), reason="needs TRITON_INTERPRET=1 from the start")
def test_the_kernels_take_part_in_the_interpreter(tmp_path):
    setting = Setting(dry=True, out=tmp_path)
    for stage in ("correctness", "fuse"):
        result = gpu.run_stage(stage, setting)
        assert result["status"] == "ok", result
        assert any(
            row["what"].startswith("triton") and "refused" not in row for row in result["rows"]
        )
