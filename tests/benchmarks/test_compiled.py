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


@pytest.mark.parametrize("flags", [["--per-line", "0"], ["--all", "--per-line", "2"]])
def test_flags_that_would_compile_nothing_or_do_nothing_are_refused(flags, monkeypatch, capsys):
    monkeypatch.setattr(compiled.aot, "compile_variant", lambda *_: pytest.fail("compiled"))
    with pytest.raises(SystemExit):
        compiled.main(flags)
    assert "--per-line" in capsys.readouterr().err


def test_lines_of_another_triton_do_not_stay_under_the_name_of_this_one(
    tmp_path, monkeypatch, capsys
):
    path, flags = tmp_path / "new" / "table.md", ["--only", "apply", "sm_90", "64", "half"]
    monkeypatch.setattr(compiled.aot, "compile_variant", lambda *_: REPORT)
    for _ in range(2):  # into a new folder, then beside what is there
        assert compiled.main([*flags, "--out", str(path)]) == 0
    assert "| apply | fp16 half | 64 | sm_90 |" in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["table.md"]
    path.write_text(path.read_text().replace("triton ", "triton 1."))
    with pytest.raises(ValueError, match=r"is of triton 1\.3.* leave out --only"):
        compiled.main([*flags, "--out", str(path)])
    capsys.readouterr()
