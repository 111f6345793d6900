import pytest

from fslora_kernels.testing import poisoned_allocations


@pytest.fixture(autouse=True)
def _poisoned():
    """An unwritten element shows up as NaN."""
    with poisoned_allocations():
        yield
