"""Which rows of the data a run takes."""

from pathlib import Path

import pytest

from fslora.config import SimulateConfig
from fslora.prepare import prepare


def test_train_rows_deals_so_many_of_the_rows(settings):
    few = {**settings, "partition": "iid", "clients": 2, "per_round": 2}
    for rows, dealt in ((20, 18), (0, 54), (61, 54)):  # of 60; a tenth is held out
        data = prepare(SimulateConfig(**few | {"train_rows": rows})).data
        assert sum(data.texts) == dealt


def test_train_rows_of_a_single_text_is_refused(settings, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(Path(settings["data"]).read_text())
    config = SimulateConfig(**{**settings, "data": str(text), "train_rows": 9})
    with pytest.raises(ValueError, match="--train-rows 9 would deal the whole of a single text"):
        prepare(config)


def test_what_a_run_cannot_have_is_refused_before_the_model_is_loaded(settings, monkeypatch):
    monkeypatch.setattr("fslora.prepare.load_model", None)
    with pytest.raises(ValueError, match=r"--attackers .* of 6 clients is nobody"):
        prepare(SimulateConfig(**settings, attack="scale", attackers=0.05))
    with pytest.raises(ValueError, match="server-lr 1"):
        prepare(SimulateConfig(**settings, strategy="flora", server_lr=2))
