import json

import pytest
import torch

from benchmarks import depth

FLAGS = ["--model", "docs-base", "--batch-size", "2", "--length", "8", "--repeats", "2"]


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_fewer_layers_cost_less_of_everything(capsys, tmp_path):
    out = tmp_path / "depth.jsonl"
    assert depth.main([*FLAGS, "--out", str(out)]) == 0
    rows = {row["row"]: row for row in map(json.loads, out.read_text().splitlines())}
    first, *upper = (row for name, row in rows.items() if name.startswith("top"))
    layers = first["layers"]
    assert [row["layers"] for row in upper] == list(range(layers - 1, 0, -1))
    for name in ("flops", "saved_bytes", "upload_bytes"):
        figures = [row[name] for row in (first, *upper)]
        assert figures == sorted(figures, reverse=True)
        assert len(set(figures)) == layers
    # Each layer's backward pass costs the same, but the lowest trained one's.
    steps = [a["flops"] - b["flops"] for a, b in zip((first, *upper), upper, strict=False)]
    assert len(set(steps)) == 1
    sketched, every = rows["S/R = 1/4, sketched forward"], rows["every rank"]
    assert first["upload_bytes"] == sketched["upload_bytes"] == every["upload_bytes"] / 4
    assert sketched["flops"] < first["flops"] == every["flops"], "the forward has all R ranks"
    assert "CPU time" in capsys.readouterr().out


def test_upper_layers_that_train_otherwise_are_red(monkeypatch, capsys):
    right = depth.gather_rest
    monkeypatch.setattr(
        depth,
        "gather_rest",
        lambda adapters, sketches: {
            n: p for n, p in right(adapters, sketches).items() if n in sketches
        },
    )
    monkeypatch.setattr(depth.Client, "measure", lambda *_: pytest.fail("measured while red"))
    assert depth.main(FLAGS) == 1
    assert "red: 1 layers train" in capsys.readouterr().out
