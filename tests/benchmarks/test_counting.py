import pytest
import torch
from torch.nn.modules.module import _has_any_global_hook

from benchmarks.counting import Operations
from fslora_kernels import _onednn
from fslora_kernels.memory import AliveBytes, addresses, saved_storages


def test_operations_are_counted_and_views_are_not():
    x, y = torch.ones(10, 20), torch.ones(20, 30)
    with Operations() as seen:
        z = x.view(10, 20) @ y.t().t()
    assert (seen.count, seen.bytes_moved) == (1, 4 * (200 + 600 + 300))
    with Operations() as seen:
        z.mul_(2.0)
        torch.empty_like(z)
        z.t().expand(2, 30, 10)
    assert (seen.count, seen.bytes_moved) == (1, 4 * 600)
    with Operations() as seen:
        x + torch.ones(1, 1).expand(10, 20)[:1]
    assert seen.bytes_moved == 4 + 4 * (200 + 1 + 200)  # ones is filled: that is an operation


def test_products_are_counted_in_place_too_and_without_hooks_on_modules():
    x, weight = torch.ones(10, 20), torch.ones(20, 30)
    with Operations() as seen:
        y = torch.addmm(torch.ones(30), x, weight)
        y.addmm_(x, weight)
        assert not _has_any_global_hook()
    assert seen.flops == 2 * 2 * 10 * 20 * 30


@pytest.mark.skipif(_onednn.operator() is None, reason="this torch has no oneDNN")
def test_products_by_onednn_are_counted():
    x, weight = torch.ones(10, 20), torch.ones(20, 30)
    with Operations() as seen:
        _onednn.product(x, weight, torch.ones(30))
    assert seen.flops == 2 * 10 * 20 * 30


def test_each_saved_storage_counts_once_and_known_ones_not():
    weight = torch.ones(8, 8)
    x = torch.ones(4, 8, requires_grad=True)
    with saved_storages(addresses([weight])) as saved:
        y = x @ weight
        z = (y * y.view(4, 8)) * y
    assert sum(saved.values()) == 4 * 32 * 2  # y, and y * y; x is not needed for its own gradient
    assert z.requires_grad


def test_what_is_alive_now():
    with AliveBytes(set()) as alive:
        kept = torch.ones(100)
        kept + 1.0
        assert alive.now == 400
    assert alive.peak == 800
