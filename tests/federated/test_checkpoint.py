import os
from dataclasses import replace

import pytest
import torch

from fslora import checkpoint
from fslora.protocol import LoRAWeights, ServerState

from .worlds import assert_same_bits


def state(number=3):
    generator = torch.Generator().manual_seed(number)
    pair = LoRAWeights(*(torch.randn(4, n, generator=generator) for n in (5, 6)))
    return ServerState(
        round=number,
        adapters={"model.q": pair},
        extras={"head.weight": torch.randn(2, 3, generator=generator)},
        key=2**62 + 1,
        optimizer={"model.q.lora_a/exp_avg": torch.ones(4, 5), "x/step": torch.tensor(7.0)},
    )


def equal(one, other):
    return (
        (one.round, one.key) == (other.round, other.key)
        and all(
            torch.equal(*t)
            for t in zip(one.adapters["model.q"], other.adapters["model.q"], strict=True)
        )
        and one.extras.keys() == other.extras.keys()
        and one.optimizer.keys() == other.optimizer.keys()
        and all(torch.equal(one.extras[n], other.extras[n]) for n in one.extras)
        and all(torch.equal(one.optimizer[n], other.optimizer[n]) for n in one.optimizer)
    )


def test_a_state_comes_back_bit_for_bit(tmp_path):
    checkpoint.save_state(tmp_path, state())
    assert equal(checkpoint.load_state(tmp_path), state())
    assert os.listdir(tmp_path / "checkpoint") == ["state.safetensors"], "nothing partial is left"


def test_residuals_and_what_is_known_of_clients_come_back(tmp_path):
    """Client ids may hold any character, the separator of the file's entries too."""
    pair = LoRAWeights(torch.ones(3, 5), torch.ones(3, 6))
    clients = {"a/b": {"rank": torch.tensor(3)}, "c d": {"model.q.lora_a": torch.ones(2, 5)}}
    given = replace(state(), base_residual={"model.q": pair}, client_state=clients)
    checkpoint.save_state(tmp_path, given)
    assert_same_bits(checkpoint.load_state(tmp_path), given)


def test_a_failed_write_leaves_the_last_state_intact(tmp_path, monkeypatch):
    checkpoint.save_state(tmp_path, state(1))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with (
        pytest.raises(ValueError, match=r"No space left; the checkpoint of round 1 is intact"),
        checkpoint.explained_io_errors(tmp_path, 1),
    ):
        checkpoint.save_state(tmp_path, state(2))
    monkeypatch.undo()
    assert equal(checkpoint.load_state(tmp_path), state(1))
    assert os.listdir(tmp_path / "checkpoint") == ["state.safetensors"]


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_an_unreadable_checkpoint_is_named(tmp_path, damage):
    checkpoint.save_state(tmp_path, state())
    path = tmp_path / checkpoint.STATE_FILE
    path.write_bytes(path.read_bytes()[:-9] if damage is None else damage)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load_state(tmp_path)


def test_a_missing_or_foreign_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint to resume"):
        checkpoint.load_state(tmp_path)
    from safetensors.torch import save

    checkpoint.write_atomically(tmp_path / checkpoint.STATE_FILE, save({"a": torch.ones(1)}))
    with pytest.raises(ValueError, match="resume with the version that wrote it"):
        checkpoint.load_state(tmp_path)


def test_records_survive_a_torn_line_and_are_cut_to_the_checkpoint(tmp_path):
    for number in range(4):
        checkpoint.append_record(tmp_path, {"round": number})
    with (tmp_path / checkpoint.RECORDS_FILE).open("ab") as file:
        file.write(b'{"round": 4, "train_l')
    assert [r["round"] for r in checkpoint.read_records(tmp_path)] == [0, 1, 2, 3]
    assert [r["round"] for r in checkpoint.cut_records(tmp_path, 2)] == [0, 1, 2]
    checkpoint.append_record(tmp_path, {"round": 3})
    assert [r["round"] for r in checkpoint.read_records(tmp_path)] == [0, 1, 2, 3]


def test_a_record_with_nan_is_refused_rather_than_written_as_invalid_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.append_record(tmp_path, {"round": 0, "loss": float("nan")})
    assert checkpoint.read_records(tmp_path) == []
