"""What is made of a sanitizer's and a profiler's words, with tools that only print."""

import stat

import pytest

from benchmarks import gpu_tools
from benchmarks.gpu import Setting

CLEAN = f"{gpu_tools.gpu_launches.DONE}\n========= ERROR SUMMARY: 0 errors"
FOUND = "========= Invalid __global__ read of size 2 bytes\n========= ERROR SUMMARY: 1 error"
COUNTED = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","apply_kernel","dram__bytes_read.sum","byte","67,108,864"
"0","7","apply_kernel","dram__bytes_write.sum","byte","1,000,000"
"1","7","wgrad_kernel","dram__bytes_read.sum","byte","2000000"
"""


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """A tool that prints something, on a machine with a GPU."""

    def install(text, code=0, seconds=0):
        path = tmp_path / "tool"
        path.write_text(f"#!/bin/sh\nsleep {seconds}\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(gpu_tools, "find_tool", lambda _: str(path))
        monkeypatch.setattr(gpu_tools, "LAUNCHES", (str(path),))
        monkeypatch.setattr(gpu_tools, "unavailable", lambda *_: None)
        return Setting(dry=False, out=tmp_path)

    return install


@pytest.mark.parametrize(
    ("text", "code", "ok", "refused"),
    [
        (CLEAN, 0, True, None),
        (FOUND, gpu_tools.FOUND_ERRORS, False, None),
        ("Device not supported", 1, True, "exit code 1: Device not supported"),
        ("nothing was looked at", 0, True, "exit code 0: nothing was looked at"),
    ],
)
def test_a_clean_run_a_finding_and_a_tool_that_cannot_look(tool, text, code, ok, refused):
    alone, memcheck, racecheck = gpu_tools.sanitizer(tool(text, code))
    for row in (memcheck, racecheck):
        assert (row["ok"], row.get("refused")) == (ok, refused)
    assert alone["ok"] == (code == 0)
    if not ok:
        assert "Invalid __global__ read" in memcheck["error"]


def test_a_tool_that_hangs_is_killed(tool):
    tool("", seconds=30)
    ran = gpu_tools.run(gpu_tools.LAUNCHES, 1.0)
    assert ran.code is None
    row = gpu_tools.judged("memcheck", ran)
    assert not row["ok"]
    assert "did not finish: killed" in row["error"]


def test_counters_are_read_and_added_up(tool):
    apply, wgrad, total = gpu_tools.counters(tool(COUNTED))
    assert apply["mb"] == {"read": pytest.approx(67.108864), "written": pytest.approx(1.0)}
    assert wgrad["mb"] == {"read": pytest.approx(2.0)}
    assert total["mb"] == pytest.approx(70.108864)
    (row,) = gpu_tools.counters(tool("==ERROR== ERR_NVGPUCTRPERM", 1))
    assert row["ok"]
    assert "ERR_NVGPUCTRPERM" in row["refused"]


def test_a_tool_is_found_on_the_path_and_a_missing_one_is_refused(monkeypatch, tmp_path):
    assert gpu_tools.find_tool("sh").endswith("/sh")
    assert gpu_tools.find_tool("no-such-tool") is None
    monkeypatch.setattr(gpu_tools, "find_tool", lambda _: None)
    monkeypatch.setattr(gpu_tools, "unavailable", lambda *_: None)
    (row,) = gpu_tools.counters(Setting(dry=False, out=tmp_path))
    assert (row["ok"], row["refused"]) == (True, "ncu is neither on the path nor in a package")
