import pytest
import torch

from benchmarks import cost
from benchmarks.cost import AliveBytes, language_batch, measure_cost
from benchmarks.workload import bare

RANK, TOKENS = 16, 4 * 24
PROPORTIONAL = ("lora_flops", "adapter_bytes", "gradient_bytes", "optimizer_bytes")


def check_proportional(rows):
    full = rows[-1]
    assert [row.ratio for row in rows] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    for row in rows:
        for name in PROPORTIONAL:
            share = getattr(row, name) / getattr(full, name)
            assert share == pytest.approx(row.ratio, rel=0.01), (name, row.ratio)
        # The base is what it is at every ratio, and what is kept was alive.
        assert row.total_flops - row.lora_flops == full.total_flops - full.lora_flops
        assert row.peak_bytes > row.saved_bytes > 0


def test_a_language_model(shared_data):
    def base():
        return bare(str(shared_data / "models/stories260K-hf"))

    rows = measure_cost(base, language_batch(base(), 4, 24), rank=RANK)
    check_proportional(rows)
    layers = [m for n, m in base().named_modules() if n.endswith("_proj")]
    features = sum(layer.in_features + layer.out_features for layer in layers)
    # Down, up, and two products of the same size for each in the backward pass.
    assert rows[-1].lora_flops == 3 * 2 * TOKENS * RANK * features
    assert rows[-1].adapter_bytes == RANK * features * 4
    assert rows[-1].optimizer_bytes == 2 * rows[-1].gradient_bytes == 2 * rows[-1].adapter_bytes
    assert (rows[0].head_bytes, rows[0].head_flops) == (0, 0)


def test_a_classifier_with_a_head(shared_data):
    def base():
        return bare(str(shared_data / "models/all-MiniLM-L6-v2-fp16"), classes=2, layers=2)

    batch = language_batch(base(), 4, 24) | {"labels": torch.tensor([0, 1, 0, 1])}
    rows = measure_cost(base, batch, rank=RANK, classes=2)
    check_proportional(rows)
    hidden = base().config.hidden_size
    for row in rows:  # weight and bias, each with its gradient and two moments; whole at any ratio
        assert row.head_bytes == 4 * (hidden * 2 + 2) * 4
        assert row.head_flops == 2 * 4 * hidden * 2


def test_bytes_alive_follow_what_is_made_and_freed():
    kept = torch.ones(250)
    with AliveBytes({kept.untyped_storage().data_ptr()}) as alive:
        first = kept + 1.0
        first.view(10, 25).add_(1.0)
        kept.add_(1.0)
        assert alive.peak == 1000
        second = first + 1.0
        assert alive.peak == 2000
        del first
        third = second + 1.0
        assert alive.peak == 2000
        fourth = third + second
    assert alive.peak == 3000
    assert fourth[0] == 9.0


def test_the_command_prints_the_table_and_what_stays(capsys, tmp_path):
    out = tmp_path / "cost.jsonl"
    flags = ["--model", "docs-base", "--layers", "1", "--batch-size", "1", "--length", "8"]
    assert cost.main([*flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "1/16" in printed
    assert "6.25%" in printed
    assert "Does not shrink: the base model's products" in printed
    assert len(out.read_text().splitlines()) == len(cost.RATIOS)
