import errno
import itertools
import os
from contextlib import suppress
from dataclasses import fields, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from fslora import checkpoint, disk
from fslora.protocol import LoRAWeights, ServerState

from .disks import CrashError, FailingDisk
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
    strided = replace(state(), extras={"head.weight": torch.arange(6.0).view(3, 2).t()})
    checkpoint.save_state(tmp_path, strided)
    assert equal(checkpoint.load_state(tmp_path), strided)


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
        disk.explained_errors(tmp_path, checkpoint.newest_round),
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
    for metadata in (None, {"format": "fslora-state-0"}, {"format": "fslora-state-3"}):
        content = save({"a": torch.ones(1)}, metadata=metadata)
        disk.write_atomically(tmp_path / checkpoint.STATE_FILE, content)
        with pytest.raises(ValueError, match="resume with the version that wrote it"):
            checkpoint.load_state(tmp_path)


def test_a_file_of_the_first_format_is_read(tmp_path):
    """Made by hand as the first version wrote it: no checksum, one entry for each client."""
    a, b, head = torch.ones(4, 5), torch.full((4, 6), 2.0), torch.ones(2, 3)
    tensors = {"adapter/model.q/a": a, "adapter/model.q/b": b, "extra/head.weight": head}
    tensors |= {"optimizer/model.q.lora_a/step": torch.tensor(3.0)}
    tensors |= {"residual/model.q/a": a[:2], "residual/model.q/b": b[:2]}
    tensors |= {"client/rank/a/b": torch.tensor(3), "client/rank/c": torch.tensor(1)}
    header = {"format": "fslora-state-1", "round": "7", "key": "11"}
    path = tmp_path / checkpoint.STATE_FILE
    disk.write_atomically(path, save({n: t.clone() for n, t in tensors.items()}, metadata=header))
    wanted = ServerState(
        round=7,
        key=11,
        adapters={"model.q": LoRAWeights(a, b)},
        extras={"head.weight": head},
        optimizer={"model.q.lora_a/step": torch.tensor(3.0)},
        base_residual={"model.q": LoRAWeights(a[:2], b[:2])},
        client_state={"a/b": {"rank": torch.tensor(3)}, "c": {"rank": torch.tensor(1)}},
    )
    found = checkpoint.load_state(tmp_path)
    assert (found.round, found.key) == (7, 11)
    assert_same_bits(found, wanted)


def test_every_field_of_a_state_is_kept(tmp_path):
    """A new field of the state is missing here until ``save_state`` writes it."""
    pair, beside = (LoRAWeights(torch.ones(4, 5), torch.ones(4, 6)) for _ in range(2))
    full = {
        "round": 3,
        "key": 5,
        "adapters": {"q": pair},
        "extras": {"head": torch.ones(2)},
        "optimizer": {"q/step": torch.tensor(2.0)},
        "base_residual": {"q": beside},
        "client_state": {"one": {"rank": torch.tensor(3)}},
        "rejections": {"two": 4},
        "lost": 2,
    }
    assert full.keys() == {field.name for field in fields(ServerState)}
    checkpoint.save_state(tmp_path, ServerState(**full))
    loaded = checkpoint.load_state(tmp_path)
    for name, value in full.items():
        assert str(getattr(loaded, name)) == str(value)


def test_modules_and_heads_come_back_in_their_order(tmp_path):
    pairs, beside = (
        {n: LoRAWeights(torch.ones(2, 3), torch.ones(2, 3)) for n in ("b", "a.10", "a.9")}
        for _ in range(2)
    )
    heads = {"z": torch.ones(2), "y": torch.ones(3)}
    given = replace(state(), adapters=pairs, base_residual=beside, extras=heads)
    checkpoint.save_state(tmp_path, given)
    loaded = checkpoint.load_state(tmp_path)
    assert list(loaded.adapters) == list(loaded.base_residual) == ["b", "a.10", "a.9"]
    assert list(loaded.extras) == ["z", "y"]


def test_clients_with_unlike_memories_come_back(tmp_path):
    clients = {f"c{n}": {"rank": torch.tensor(n)} for n in range(5)}
    clients |= {f"d{n}": {"a": torch.full((n % 2 + 1, 3), float(n))} for n in range(4)}
    given = replace(state(), client_state={**clients, "empty": {}})
    checkpoint.save_state(tmp_path, given)
    found = checkpoint.load_state(tmp_path)
    assert_same_bits(found, given)
    assert found.client_state.keys() == given.client_state.keys()


def run_until(folder, last):
    """What ``simulate`` does with a folder, without a model."""
    now = checkpoint.resume(folder)
    if now is None:
        checkpoint.cut_records(folder, -1)
        checkpoint.append_record(folder, {"round": 0})
        now = state(0)
        checkpoint.save_state(folder, now)
    while now.round < last:
        now = state(now.round + 1)
        checkpoint.append_record(folder, {"round": now.round})
        checkpoint.save_state(folder, now)


def left_in(folder):
    """The records, and of both states what is in the file: its header has no order."""
    states = []
    for name in (checkpoint.STATE_FILE, checkpoint.PREVIOUS_FILE):
        with safe_open(str(folder / name), framework="pt") as file:
            tensors = {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118
            states.append((file.metadata(), tensors))
    return (folder / checkpoint.RECORDS_FILE).read_bytes(), states


@pytest.mark.parametrize("how", ["truncated", "zeroed", "one bit", "gone"])
def test_a_damaged_state_falls_back_to_the_one_before_and_the_same_bits(tmp_path, how):
    run_until(tmp_path / "whole", 4)
    run_until(tmp_path / "part", 3)
    path = tmp_path / "part" / checkpoint.STATE_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    damaged = {"truncated": content[:-9], "zeroed": bytes(len(content)), "one bit": content}
    path.unlink() if how == "gone" else path.write_bytes(damaged[how])
    assert checkpoint.load_state(tmp_path / "part").round == 2
    checkpoint.resume(tmp_path / "part")
    path.with_name("previous.safetensors").unlink(missing_ok=True)
    assert checkpoint.load_state(tmp_path / "part").round == 2, "the good one has taken its place"
    run_until(tmp_path / "part", 4)
    assert left_in(tmp_path / "part") == left_in(tmp_path / "whole")


def test_records_without_a_checkpoint_are_never_written_over(tmp_path):
    run_until(tmp_path, 2)
    for name in (checkpoint.STATE_FILE, checkpoint.PREVIOUS_FILE):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="records of 2 rounds and no checkpoint"):
        checkpoint.resume(tmp_path)
    assert len(checkpoint.read_records(tmp_path)) == 3


@pytest.mark.parametrize("line", ["{torn", "null", "{}"])
def test_records_with_a_hole_are_named(tmp_path, line):
    run_until(tmp_path, 3)
    path = tmp_path / checkpoint.RECORDS_FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:1], f"{line}\n", *lines[2:]]))
    with pytest.raises(ValueError, match="not every round up to 3"):
        checkpoint.resume(tmp_path)


@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EROFS, errno.EIO, None])
def test_a_disk_that_fails_at_any_step_keeps_the_last_good_state(tmp_path, kind):
    """At each operation in turn; None is a crash there, after which nothing is written at all."""
    run_until(tmp_path / "whole", 3)
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        run_until(folder, 1)
        with FailingDisk(step, kind) as failing, suppress(OSError, CrashError):
            run_until(folder, 3)
        assert checkpoint.load_state(folder).round >= 1
        with disk.locked(folder):
            assert not [p for p in folder.rglob("*") if p.name.endswith(".partial")]
            run_until(folder, 3)
        assert left_in(folder) == left_in(tmp_path / "whole")
        if not failing.failed:
            break
    assert step > 20, "every operation of two rounds and of the resumption was tried"


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


def test_only_where_a_checkpoint_is_there_is_something_to_resume(tmp_path):
    for kept, resumable in ((lambda _: "", False), (lambda _: "round 1", True)):
        with pytest.raises(ValueError, match="cannot write") as caught:  # noqa: SIM117
            with disk.explained_errors(tmp_path, kept):
                raise OSError(28, "No space left")
        assert ("--resume" in str(caught.value)) == resumable
