"""Where the real text and the real pretrained models lie; one thread for everything."""

import os
from pathlib import Path

import pytest
import torch

# Two threads that spin for each other on shared cores make small products twenty times slower.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data and models beside the repository, or wherever FSLORA_SHARED points."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("FSLORA_SHARED", beside)) / "data"
    if folder.is_dir():
        return folder
    reason = f"real data is absent: no folder {folder} (point FSLORA_SHARED at its parent)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
