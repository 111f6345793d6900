import pytest
import torch

from benchmarks.gpu import Setting


@pytest.fixture
def dry(tmp_path):
    """A dry run of the GPU's stages; it sets the number of threads."""
    threads = torch.get_num_threads()
    yield Setting(dry=True, out=tmp_path)
    torch.set_num_threads(threads)
