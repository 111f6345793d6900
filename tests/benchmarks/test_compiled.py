"""The table of compilations: which lines are compiled, and which of a file's are kept."""

from dataclasses import replace

import pytest

from benchmarks import compiled
from fslora_kernels.aot import Report

REPORT = Report(
    kernel="apply",
    dtype="fp16 half",
    target="sm_90",
    configuration="",
    registers=10,
    spilled=0,
    stack_bytes=0,
    shared_bytes=1024,
    shared_limit_bytes=2048,
    matrix_unit="mma",
)
SM_80, SM_90, SM_100 = (("apply", "fp16 half", "16", name) for name in ("sm_80", "sm_90", "sm_100"))


def test_words_choose_lines():
    found = compiled.groups(1, ["sm_90", "half", "64"])
    assert found
    assert {(ranks, target) for _, _, ranks, target in found} == {("64", "sm_90")}
    assert all("half" in dtype for _, dtype, _, _ in found)
    assert len(found) < len(compiled.groups(1, ["sm_90"]))


def test_a_file_keeps_its_other_lines(tmp_path):
    path, every = tmp_path / "table.md", {SM_80: 2, SM_90: 2, SM_100: 2}
    old = compiled.lines({SM_90: [REPORT], SM_100: [REPORT]}, every)
    path.write_text("\n".join(["# Title", *compiled.HEAD, *old]))
    worse = replace(REPORT, registers=11, spilled=1, stack_bytes=4)
    new = compiled.lines({SM_80: [REPORT], SM_90: [REPORT, worse]}, every)
    assert new[1] == (
        "| apply | fp16 half | 16 | sm_90 | 2 of 2 | mma | 11 | **1 registers, 4 B** | 1 of 2 KiB |"
    )
    assert compiled.updated(path, new, every) == [new[0], new[1], old[1]]


def test_unknown_words_are_refused(capsys):
    with pytest.raises(SystemExit):
        compiled.main(["--only", "sm_91"])
    assert "no line has all of these words: sm_91" in capsys.readouterr().err
