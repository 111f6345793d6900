import json

import pytest
import torch

from benchmarks import model
from benchmarks.model import Workload, error, make_sides

FLAGS = ["--model", "docs-base", "--layers", "1", "--batch-size", "2", "--length", "8"]
FLAGS += ["--rank", "16", "--ratios", "0.25", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_sides_agree_and_the_figures_are_kept(capsys, tmp_path):
    out = tmp_path / "model.jsonl"
    assert model.main([*FLAGS, "--repeats", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "R=16, S=4 (1/4)" in printed
    record = json.loads(out.read_text())
    assert set(record["ratios"]) == {"ours", "base", "PEFT at R", "PEFT at S"}
    assert len(record["turns"]["peer_s"]["PEFT at S"]) == 2


def test_a_row_that_recomputes_holds_less(tmp_path):
    out = tmp_path / "model.jsonl"
    assert model.main([*FLAGS, "--repeats", "1", "--recompute", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert set(record["ratios"]) == {"ours", "base", "PEFT at R", "PEFT at S", "recompute"}
    assert record["peak_bytes"]["recompute"] < record["peak_bytes"]["ours"]


def test_evaluations_beside_delta_first(tmp_path):
    out = tmp_path / "model.jsonl"
    assert model.main([*FLAGS, "--repeats", "1", "--evaluate", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert set(record["ratios"]) == {"ours", "base", "PEFT at R", "PEFT at S", "delta first"}
    assert record["peak_bytes"] == {}  # of a training step


def test_no_figure_while_ours_computes_something_else(capsys, monkeypatch, tmp_path):
    out = tmp_path / "model.jsonl"
    right = model.fslora_kernels.bind

    def wrong(target, leaves):
        leaves[next(iter(leaves))].lora_b.data.mul_(1.01)
        right(target, leaves)

    monkeypatch.setattr(model.fslora_kernels, "bind", wrong)
    assert model.main([*FLAGS, "--repeats", "1", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "red: AssertionError" in printed
    assert "A/A" not in printed
    assert "turns" not in json.loads(out.read_text())


def test_a_classifier_with_dropout_of_its_own(shared_data):
    folder = str(shared_data / "models/all-MiniLM-L6-v2-fp16")
    workload = Workload(folder, batch_size=2, length=8, classes=2, layers=1)
    sides = make_sides(workload, 8, 2, "cpu")
    assert error(sides, workload.batch(workload.base())) is None
    assert all(side.model.training and side.others for side in sides.values())
    assert {len(side.factors) for side in sides.values()} == {2 * 7}  # the pooler too


@pytest.mark.parametrize("flag", ["--classes", "--layers"])
def test_flags_of_no_model_are_refused(flag, capsys):
    with pytest.raises(SystemExit):
        model.main([flag, "2"])
    assert "that --model names" in capsys.readouterr().err
