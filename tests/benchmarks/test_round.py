import json

import pytest
import torch

from benchmarks import round as benchmark

FLAGS = ["--model", "docs-base", "--clients", "2", "--steps", "2", "--batch-size", "2"]
FLAGS += ["--length", "8", "--repeats", "2", "--ratios", "1/8,1/2"]


@pytest.fixture
def flags(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A function returns what it is told to return. " * 100)
    threads = torch.get_num_threads()
    yield [*FLAGS, "--data", str(text)]
    torch.set_num_threads(threads)


def test_both_sides_compute_the_same_and_the_figures_are_kept(flags, capsys, tmp_path):
    out = tmp_path / "round.jsonl"
    assert benchmark.main([*flags, "--out", str(out), "--profile"]) == 0
    printed = capsys.readouterr().out
    assert "correct: mean losses equal" in printed
    assert "ratio" in printed
    assert "clients: local steps" in printed
    record = json.loads(out.read_text())
    assert record["loss_deviation"] <= benchmark.TOLERANCE
    assert len(record["ours_s"]) == len(record["peer_s"]) == 2
    assert record["ratio"]["low"] <= record["ratio"]["median"] <= record["ratio"]["high"]
    assert record["settings"]["clients"] == 2


def test_a_classifier_with_its_head(flags, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("text,label\n" + "A word or two,yes\nAnd no more,no\n" * 20)
    columns = ["--task", "classification", "--text-column", "text", "--label-column", "label"]
    assert benchmark.main([*flags[:-1], str(table), *columns]) == 0
    assert "correct: mean losses equal" in capsys.readouterr().out


def test_no_figure_while_the_two_sides_differ(flags, capsys, monkeypatch):
    right = benchmark.with_adapter

    def wrong(base, rank, *, alpha, classes):
        return right(base, rank, alpha=alpha * 1.5, classes=classes)

    monkeypatch.setattr(benchmark, "with_adapter", wrong)
    assert benchmark.main(flags) == 1
    printed = capsys.readouterr().out
    assert "red: a client's mean loss differs" in printed
    assert "ratio " not in printed
