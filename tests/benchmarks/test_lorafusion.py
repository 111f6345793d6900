import sys
from importlib import import_module

import pytest
import torch

from benchmarks import layer
from benchmarks.checks import Referee
from benchmarks.lorafusion import load, lorafusion
from benchmarks.problem import make_problem
from benchmarks.shapes import Cell

# Of the same signatures and results as LoRAFusion's, which needs a GPU; as there, the gradient of x
# needs a mask, or a shape of one.
STAND_IN = """
import torch


def fused_lora_dyw_dsa_func(dy, w, ds, a, dropout_p, dropout_mask=None):
    assert dropout_mask.shape == (dy.shape[0], w.shape[1])
    return dy @ w + ds @ a


class Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, a, b, alpha):
        ctx.save_for_backward(x, w, a, b)
        ctx.alpha = alpha
        return x @ w.T + (x @ a.T @ b.T) * alpha

    @staticmethod
    def backward(ctx, dy):
        x, w, a, b = ctx.saved_tensors
        ds = dy @ b * ctx.alpha
        dx = fused_lora_dyw_dsa_func(
            dy=dy[0], w=w, ds=ds[0], a=a, dropout_p=0.0, dropout_mask=None
        )
        return dx[None], None, ds[0].T @ x[0], dy[0].T @ (x[0] @ a.T) * ctx.alpha, None


def fused_linear_lora(x, linear_w, lora_a, lora_b, alpha, seed=None, dropout_p=0.0,
                      linear_bias=None):
    assert x.ndim == 3
    return Layer.apply(x, linear_w, lora_a, lora_b, alpha)
"""

# As it stands in its list of tiles.
TILES = """
H100_CONFIG, A100_CONFIG = "tiles of the H100", "tiles of the A100"
HARDWARE_CONFIGS = {"h100": H100_CONFIG, "a100": A100_CONFIG}


def get_device_short_name():
    return "h200"
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "lorafusion/ops"
    folder.mkdir(parents=True)
    (folder / "triton_ops").mkdir()
    (folder / "lora_v1.py").write_text(STAND_IN)
    (folder / "triton_ops/config.py").write_text(TILES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "lorafusion"]:
        del sys.modules[name]


def test_its_row_is_right_and_a_wrong_one_is_seen(checkout):
    problem = make_problem(Cell("tiny", 32, 24, 40, 16, 4, "float32", "cpu", tuned=False))
    right = load(checkout)
    assert Referee(problem).error(lorafusion(problem, function=right)) is None

    def wrong(*args, alpha):
        return right(*args, alpha=alpha * 1.01)

    assert "exceeds" in Referee(problem).error(lorafusion(problem, function=wrong))


@pytest.mark.parametrize(("capability", "gets"), [((9, 0), "tiles of the H100"), ((8, 0), None)])
def test_a_hopper_gpu_that_it_does_not_list_takes_the_tiles_of_its_kind(
    checkout, monkeypatch, capability, gets
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    load(checkout)
    listed = import_module("lorafusion.ops.triton_ops.config").HARDWARE_CONFIGS
    assert listed.get("h200") == gets


def test_a_folder_that_is_none_is_named(tmp_path, capsys):
    assert layer.main(["--device", "cpu", "--lorafusion", str(tmp_path)]) == 2
    assert "is no checkout of LoRAFusion" in capsys.readouterr().err
