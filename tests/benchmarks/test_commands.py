import json

import pytest
import torch

from benchmarks import figure, grid, kernels, layer, peers, problem
from benchmarks.shapes import Series


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    """Two small series, small ceilings, threads as they were."""
    threads = torch.get_num_threads()
    tiny = (
        Series("seen", 16, 24, 32, 8, tuned=True, ratios=(1 / 4, 1.0)),
        Series("unseen", 24, 16, 32, 8, tuned=False, ratios=(1 / 4, 1.0)),
    )
    monkeypatch.setitem(grid.cells.__globals__["DEFAULTS"], "cpu", tiny)
    right = grid.ceilings
    monkeypatch.setattr(grid, "ceilings", lambda *a, shrink: right(*a, shrink=16))
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("module", "peer"), [(layer, "PEFT at S"), (kernels, "eager")])
def test_a_run_prints_tables_records_rows_and_draws(module, peer, capsys, tmp_path):
    out, figure = tmp_path / "rows.jsonl", tmp_path / "new" / "figure.png"
    flags = ["--repeats", "2", "--device", "cpu", "--out", str(out)]
    draws = module is layer
    assert module.main([*flags, *(["--figure", str(figure)] if draws else [])]) == 0
    printed = capsys.readouterr().out
    assert "ceilings measured now, float32" in printed
    seen, unseen = printed.split("cells that may be tuned on")[1].split("cells never tuned on")
    assert "seen-t32-r8-float32-s2" in seen
    assert "unseen-t32" not in seen
    assert "unseen-t32-r8-float32-s8" in unseen
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["cell"]["id"] for record in records} == {
        f"{name}-t32-r8-float32-s{size}" for name in ("seen", "unseen") for size in (2, 8)
    }
    assert {"ours", "base", "delta first", peer} <= {record["row"] for record in records}
    assert {"commit", "device", "versions", "threads", "ceilings"} <= records[0].keys()
    assert all(len(record["seconds"]) >= 2 for record in records)
    assert figure.is_file() == draws
    if draws:
        assert figure.read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_result_is_red_and_the_exit_code_says_so(monkeypatch, capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(peers.fslora_kernels, "bind", lambda model, leaves: None)
    flags = ["--repeats", "1", "--device", "cpu", "--shapes", "seen-t32-r8-float32-s2"]
    assert layer.main([*flags, "--out", str(out)]) == 1
    assert "red:" in capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(record["error"] and not record["seconds"] for record in records)


def test_a_figure_that_cannot_be_drawn_is_said_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(figure, "find_spec", lambda _: None)
    monkeypatch.setattr(grid, "measure_cell", lambda *_, **__: pytest.fail("measured"))
    assert layer.main(["--device", "cpu", "--figure", "figure.png"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_nothing_right_is_no_figure_and_no_traceback(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(peers.fslora_kernels, "bind", lambda model, leaves: None)
    flags = ["--repeats", "1", "--device", "cpu", "--shapes", "seen-t32-r8-float32-s2"]
    assert layer.main([*flags, "--figure", str(tmp_path / "figure.png")]) == 1
    assert "no figure: in no cell" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_bare_operation_has_no_row_that_could_be_compiled(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--compile", "--list"])
    assert "unrecognized arguments: --compile" in capsys.readouterr().err


def test_cells_are_listed_and_wrong_names_refused(capsys):
    assert layer.main(["--list", "--device", "cpu", "--shapes", "unseen"]) == 0
    assert capsys.readouterr().out.count("unseen by tuning") == 2
    assert layer.main(["--device", "cpu", "--shapes", "nothing"]) == 2
    error = capsys.readouterr().err
    assert "layers are seen, unseen" in error
    assert "Traceback" not in error


def test_bfloat16_is_left_out_where_the_processor_has_none(monkeypatch, capsys, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : avx2 fma\n")
    monkeypatch.setattr(problem, "Path", lambda _: cpuinfo)
    cell = Series("b", 16, 16, 8, 4, tuned=True, dtype="bfloat16")
    monkeypatch.setitem(grid.cells.__globals__["DEFAULTS"], "cpu", (cell,))
    assert layer.main(["--repeats", "1", "--device", "cpu", "--shapes", "b-t8-r4-bfloat16-s1"]) == 0
    assert "is left out: this processor has neither AVX512-bf16" in capsys.readouterr().out
    cpuinfo.write_text("flags : avx2 avx512_bf16\n")
    assert problem.missing_for(next(cell.cells("cpu"))) is None


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        layer.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("--shapes", "--full", "--seconds", "--figure", "Example", "over the bare base"):
        assert word in text
