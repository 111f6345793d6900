import json

import pytest

from benchmarks import memory
from benchmarks.memory import Layer, Size, errors, rows

SMALL = Size(batch=1, length=16, hidden=32, intermediate=48, heads=4, rank=8, sketch_size=2)


def test_dropout_costs_us_no_copy_of_the_input():
    layer = Layer(SMALL)
    assert errors(layer, 0.1) == {}
    found = {(row.row, row.dropout): row for row in rows(layer, (0.0, 0.1))}
    base = found["base", 0.0]
    tokens = SMALL.batch * SMALL.length
    # Inputs of q, k, v and of gate, up are shared; the others have their own.
    hidden_ranks = 7 * SMALL.sketch_size * tokens * 4
    assert found["ours at S", 0.0].saved_bytes - base.saved_bytes >= hidden_ranks
    dropped = 7 * tokens * SMALL.hidden * 4
    gain = found["PEFT at S", 0.1].saved_bytes - found["ours at S", 0.1].saved_bytes
    assert gain > dropped
    # What is behind the norms and SwiGLU is made again: of x o_proj's is left.
    again = found["ours recompute at S", 0.1].saved_bytes
    others = tokens * (2 * SMALL.hidden + SMALL.intermediate) * 4
    weights = 5 * SMALL.hidden * 4  # of the norms, for q, k, v, gate and up
    assert found["ours at S", 0.1].saved_bytes - again == others - weights
    assert again - base.saved_bytes < hidden_ranks + weights + 7 * 8 + tokens * SMALL.hidden * 4
    for row in found.values():
        assert 0 < row.saved_bytes <= row.peak_bytes + tokens * SMALL.hidden * 4
        assert 0 < row.held_bytes <= row.peak_bytes


def test_a_wrong_layer_is_red(monkeypatch, capsys, tmp_path):
    right = memory.fslora_kernels.fuse

    def wrong(model, *, recompute):
        right(model, recompute=recompute)
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.scaling["default"] *= 1.01

    monkeypatch.setattr(memory.fslora_kernels, "fuse", wrong)
    out = tmp_path / "memory.jsonl"
    flags = ["--batch", "1", "--length", "8", "--hidden", "32", "--intermediate", "48"]
    flags += ["--heads", "4", "--device", "cpu", "--out", str(out)]
    assert memory.main(flags) == 1
    assert "red: AssertionError" in capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    by_row = {record["row"]: record for record in records}
    assert "saved_bytes" in by_row["PEFT at S"]
    assert "saved_bytes" not in by_row["ours at S"]


def test_dropout_that_drops_nothing_is_red(monkeypatch):
    right = Layer.ours
    monkeypatch.setattr(Layer, "ours", lambda self, dropout, **kw: right(self, 0.0, **kw))
    assert "drops nothing" in errors(Layer(SMALL), 0.1)["ours at S"]


@pytest.mark.parametrize("dropout", ["0.1", "0.5"])
def test_the_command_prints_shares_of_peft(dropout, capsys):
    flags = ["--batch", "1", "--length", "8", "--hidden", "32", "--intermediate", "48"]
    assert memory.main([*flags, "--heads", "4", "--device", "cpu", "--dropout", dropout]) == 0
    printed = capsys.readouterr().out
    ours = [line for line in printed.splitlines() if line.startswith("ours at S")]
    assert f" {dropout} " in ours[1]
    assert "(1.00)" in printed


def test_in_half_precision_peft_as_it_comes_is_a_row_of_its_own(capsys):
    flags = ["--batch", "1", "--length", "8", "--hidden", "32", "--intermediate", "48"]
    assert memory.main([*flags, "--heads", "4", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("over PEFT as it comes") == 8
    rows = {line.split("  ")[0]: line for line in printed.splitlines() if " 0.1 " in line}
    saved = {name: int(line.split(" 0.1 ")[1].split()[0]) for name, line in rows.items()}
    assert (
        saved["ours recompute at S"]
        < saved["ours at S"]
        < saved["PEFT at S"]
        < saved["PEFT f32 at S"]
    )
