"""Large float32 products by oneDNN, as on a processor where it is the faster library."""

import pytest
import torch
from torch import nn

from fslora_kernels import _onednn, sketched_linear
from fslora_kernels.flops import count_flops
from fslora_kernels.ops.sketched_linear import backend_merged, backend_torch
from fslora_kernels.ops.sketched_linear.cases import Case
from fslora_kernels.ops.sketched_linear.reference import reference
from fslora_kernels.testing import check_error_budget, inputs, value_and_gradients

from .contract import SketchedLinearContract

pytestmark = pytest.mark.skipif(_onednn.operator() is None, reason="this torch has no oneDNN")
LAYER = Case("layer", 33, 48, 40, 24, 18, bias=True)


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Every float32 product is, and all that were are noted."""
    found = []

    def product(*operands):
        found.append([tuple(operand.shape) for operand in operands if operand is not None])
        return plain(*operands)

    plain = _onednn.product
    monkeypatch.setattr(_onednn, "faster", lambda: True)
    monkeypatch.setattr(_onednn, "LEAST", 1)
    monkeypatch.setattr(_onednn, "TOKENS", 1)
    monkeypatch.setattr(_onednn, "product", product)
    monkeypatch.setattr(backend_torch, "SMALL_LAYER", 0)
    return found


class TestDeltaFirst(SketchedLinearContract):
    implementation = "torch"


class TestMerged(SketchedLinearContract):
    implementation = None

    @pytest.fixture(autouse=True)
    def always(self, monkeypatch):
        monkeypatch.setattr(backend_merged, "pays", lambda *_: True)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_products_of_a_step_are_its_own_and_all_are_counted(
    merged, dropout, monkeypatch, taken
):
    monkeypatch.setattr(backend_merged, "pays", lambda *_: merged)
    arguments = inputs(LAYER, torch.float32)
    counted = {}
    for faster in (True, False):
        monkeypatch.setattr(_onednn, "faster", lambda faster=faster: faster)
        with count_flops() as count:
            value_and_gradients(
                sketched_linear, arguments | {"dropout": dropout, "seed": 3}, torch.ones(33, 40)
            )
        counted[faster] = count.total
        if faster:
            assert taken == [[(33, 48), (48, 40), (40,)], [(33, 40), (40, 48)]]
        taken.clear()
    assert counted[True] == counted[False] > 0


@pytest.mark.parametrize(
    "strange",
    [
        ("x", lambda x: x.t().contiguous().t()),
        ("x", lambda x: x[:1].expand(33, 48)),
        ("x", lambda x: torch.cat([x, x], 1)[:, ::2]),
        ("x", lambda x: torch.cat([x[0, :1], x.flatten()])[1:].view(33, 48)),
        ("weight", lambda w: w.t().contiguous().t()),
        ("bias", lambda b: b.repeat_interleave(2)[::2]),
        ("bias", lambda b: b[:1].expand(40)),
    ],
    ids=[
        "x column-major",
        "x expanded",
        "x every other",
        "x misaligned",
        "weight column-major",
        "bias every other",
        "bias expanded",
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_strange_inputs_within_the_budget(strange, merged, monkeypatch):
    monkeypatch.setattr(backend_merged, "pays", lambda *_: merged)
    arguments = inputs(LAYER, torch.float32)
    name, change = strange
    arguments[name] = change(arguments[name])
    dy = torch.ones(()).expand(33, 40)
    exact_arguments = {
        name: value.double() if torch.is_tensor(value) and name != "index" else value
        for name, value in arguments.items()
    }
    found = value_and_gradients(sketched_linear, arguments, dy)
    eager = value_and_gradients(reference, arguments, dy)
    exact = value_and_gradients(reference, exact_arguments, dy.double())
    for name, value in found.items():
        check_error_budget(value, eager[name], exact[name], name=name)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_it_does_not_take(monkeypatch):
    left, right = torch.ones(4, 6), torch.ones(6, 5)

    class Strange(torch.Tensor):
        pass

    assert _onednn.takes(left, right)
    assert _onednn.takes(left, nn.Parameter(right))
    assert not _onednn.takes(left.bfloat16(), right.bfloat16())
    assert not _onednn.takes(left.double(), right.double())
    assert not _onednn.takes(left, right.as_subclass(Strange))
    assert not _onednn.takes(left, torch.ones(6, 10)[:, ::2])
    assert _onednn.takes(left.t().contiguous().t(), right)
    assert not _onednn.takes(torch.ones(4, 12)[:, ::2], right)
    assert not _onednn.takes(left.as_subclass(Strange), right)
    for sparse in (torch.eye(6, 5).to_sparse(), torch.eye(5, 6).to_sparse_csr().t()):
        assert not _onednn.takes(left, sparse)
    assert _onednn.takes(left, right, None, right, nn.Parameter(right))
    assert not _onednn.takes(left, right, right.as_subclass(Strange))
    assert not _onednn.takes(left.to("meta"), right.to("meta"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert not _onednn.takes(left, right)
    for least, enough in ((4 * 6 * 5 + 1, False), (4 * 6 * 5, True)):
        monkeypatch.setattr(_onednn, "LEAST", least)
        assert _onednn.takes(left, right) == enough
    monkeypatch.setattr(_onednn, "LEAST", 1)
    assert not _onednn.takes(left[:0], right)
    for tokens, whole in ((2, True), (3, False), (4, True), (8, False)):
        monkeypatch.setattr(_onednn, "TOKENS", tokens)
        assert _onednn.takes(left, right) == whole
    monkeypatch.setattr(_onednn, "TOKENS", 1)
    monkeypatch.setattr(_onednn, "faster", lambda: False)
    assert not _onednn.takes(left, right)


@pytest.mark.parametrize(
    ("name", "avx512", "mkl", "faster"),
    [
        ("AMD EPYC 9654", True, True, True),
        ("AMD EPYC 9654", True, False, False),
        ("AMD EPYC 7763", False, True, False),
        ("Intel Xeon", True, True, False),
    ],
)
def test_only_where_it_was_measured(name, avx512, mkl, faster, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"cpu_name": name, "avx512_f": avx512}
    )
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert _onednn.faster.__wrapped__() is faster


def test_what_transforms_never_meets_it(taken):
    """No transform could go through it."""
    arguments = inputs(LAYER, torch.float32)
    x = arguments.pop("x")
    torch.func.vmap(lambda row: sketched_linear(row, **arguments))(x)
    torch.func.grad(lambda x: sketched_linear(x, **arguments).sum())(x)
    assert not taken


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_sparse_base_weight_is_left_to_torch(taken):
    arguments = inputs(LAYER, torch.float32)
    dense = sketched_linear(**arguments, implementation="torch")
    taken.clear()
    arguments["weight"] = arguments["weight"].to_sparse_csr()
    torch.testing.assert_close(sketched_linear(**arguments), dense, rtol=1e-4, atol=1e-4)
    assert not taken


def test_a_small_layer_under_delta_first_is_left_to_torch(monkeypatch, taken):
    monkeypatch.setattr(backend_torch, "SMALL_LAYER", 48 * 40)
    monkeypatch.setattr(backend_merged, "pays", lambda *_: False)
    arguments = inputs(LAYER, torch.float32)
    trained = sketched_linear(**arguments)
    with torch.no_grad():
        assert torch.equal(sketched_linear(**arguments), trained)
    assert not taken
