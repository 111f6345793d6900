import pytest

from benchmarks import layer
from benchmarks.checks import Referee
from benchmarks.lorafusion import load, lorafusion
from benchmarks.problem import make_problem
from benchmarks.shapes import Cell

# Of the same signature and result as LoRAFusion's, which needs a GPU.
STAND_IN = """
def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0,
                      linear_bias=None):
    assert x.ndim == 3
    return x @ linear_w.T + (x @ lora_a.T @ lora_b.T) * alpha
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "lorafusion/ops"
    folder.mkdir(parents=True)
    (folder / "lora_v1.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    monkeypatch.delitem(__import__("sys").modules, "lorafusion.ops.lora_v1", raising=False)


def test_its_row_is_right_and_a_wrong_one_is_seen(checkout):
    problem = make_problem(Cell("tiny", 32, 24, 40, 16, 4, "float32", "cpu", tuned=False))
    right = load(checkout)
    assert Referee(problem).error(lorafusion(problem, function=right)) is None

    def wrong(*args, alpha):
        return right(*args, alpha=alpha * 1.01)

    assert "exceeds" in Referee(problem).error(lorafusion(problem, function=wrong))


def test_a_folder_that_is_none_is_named(tmp_path, capsys):
    assert layer.main(["--device", "cpu", "--lorafusion", str(tmp_path)]) == 2
    assert "is no checkout of LoRAFusion" in capsys.readouterr().err
