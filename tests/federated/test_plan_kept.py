"""What an allocator keeps, and that a probed device does not promise it to tensors."""

import ctypes
import sys
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from fslora.__main__ import main
from fslora.client import LocalTrainer
from fslora.config import SimulateConfig
from fslora.devices import read_fleet
from fslora.plan import kept, probe
from fslora.plan.costs import longest_of
from fslora.prepare import prepare

from .test_cli import flags

MB = 1e6


@dataclass(frozen=True)
class Hoarder(LocalTrainer):
    """Trains, and holds more of what is no tensor with every call."""

    megabytes: int = 0
    hoard: list = field(default_factory=list)

    def __call__(self, task):
        self.hoard.append(np.ones(self.megabytes * 125_000))
        torch.ones(16_000_000)  # 64 MB alive for a moment, which is no hoard
        for parameter in self.model.parameters():
            parameter.detach().sum()
        return super().__call__(task)


@pytest.fixture
def training(settings):
    run = prepare(SimulateConfig(**settings))
    return probe.training(run, 0.5, longest_of(run.data.evaluation, 2))


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say")
def test_what_is_kept_is_growth_that_no_tensor_needs(training):
    trainer, task = training
    fields = trainer.model, trainer.task, trainer.data
    # Or the hoard would fill what earlier tests have freed, and the process would not grow by it.
    ctypes.CDLL(None).malloc_trim(0)
    trainer(task)
    assert kept.kept_bytes(Hoarder(*fields), task) < 16 * MB
    assert kept.kept_bytes(Hoarder(*fields, 15), task) == pytest.approx(120 * MB, abs=20 * MB)


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say")
def test_weights_of_a_mapped_file_come_in_when_they_are_read(training, tmp_path):
    np.ones(10_000_000, dtype=np.float32).tofile(tmp_path / "weights")
    mapped = torch.from_file(str(tmp_path / "weights"), size=10_000_000)
    model = nn.ParameterList([nn.Parameter(mapped)])
    assert kept.read_in(model) == pytest.approx(40 * MB, abs=4 * MB)
    assert kept.read_in(model) < 4 * MB
    trainer, task = training
    trainer(task)
    trainer.model.mapped = nn.Parameter(torch.from_file(str(tmp_path / "weights"), size=10_000_000))
    reader = Hoarder(trainer.model, trainer.task, trainer.data)
    assert kept.kept_bytes(reader, task) < 16 * MB


def test_weights_on_another_device_are_not_in_the_systems_memory(monkeypatch):
    """Reading them there makes the system read the device's libraries, which are no weights."""
    grown = iter(range(0, 10**9, 10**8))
    monkeypatch.setattr(kept, "resident_bytes", lambda _: next(grown))
    assert kept.read_in(nn.Linear(8, 8, device="meta")) == 0
    assert kept.read_in(nn.Linear(8, 8)) == 10**8


def test_a_system_that_does_not_say_has_nothing_kept(training, monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "_PROCESS", tmp_path / "nothing")
    assert kept.kept_bytes(*training) == 0
    assert kept.read_in(training[0].model) == 0


def test_a_probe_leaves_out_what_the_allocator_keeps(settings, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(probe, "free_bytes", lambda _: 1e9)
    found = []
    for name, amount in (("a", 0.0), ("b", 3e8)):
        monkeypatch.setattr(probe, "kept_bytes", lambda *_, amount=amount: amount)
        table = tmp_path / f"{name}.toml"
        given = flags(settings, name=name, table=table, seconds=0.01, share=1)
        assert main(["probe", *given]) == 0
        found += [device.memory_bytes for device in read_fleet(str(table)).devices]
    assert found[0] > 1e9
    assert found[0] - found[1] == 3e8
    assert "beside 300.0 MB that the allocator keeps" in " ".join(capsys.readouterr().out.split())
