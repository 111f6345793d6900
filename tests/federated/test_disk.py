import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from fslora import checkpoint, disk
from fslora.__main__ import main
from fslora.config import SimulateConfig
from fslora.simulate import simulate

from .disks import FailingDisk
from .test_simulate import outcome

HOLD = "import sys, time; from pathlib import Path; from fslora import disk\n"
HOLD += "with disk.locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@contextmanager
def holder(folder):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_process_is_told_who_is_there_and_a_killed_one_is_no_obstacle(settings, capsys):
    folder = Path(settings["out"])
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
    with holder(folder) as process:
        assert main(["simulate", *flags]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"is in use by process {process.pid} on" in said
        assert "choose another --out" in said
        assert not (folder / "config.json").exists(), "nothing was touched"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with disk.locked(folder):
            pass


def test_looking_whether_a_folder_can_be_written_to_leaves_nothing(tmp_path):
    disk.check_writable(tmp_path / "new" / "plan")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    disk.check_writable(tmp_path / "there" / "plan")
    disk.check_writable(tmp_path / "there")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="choose another --out"):
        disk.check_writable(tmp_path / "file")


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    for rest in (".adapter.7.partial", ".adapter.old.7.partial"):
        (tmp_path / rest).mkdir()
        (tmp_path / rest / "weights").write_text("half")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/.state.safetensors.7.partial").write_text("half")
    (tmp_path / "checkpoint/state.safetensors").write_text("whole")
    with disk.locked(tmp_path):
        left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == [".lock", ".lock.owner", "checkpoint/state.safetensors"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    def fill(text):
        def write(folder):
            Path(folder).mkdir()
            (Path(folder) / "one").write_text(text)
            if text == "bad":
                raise OSError(28, "No space left on device")
            (Path(folder) / "two").write_text(text)

        return write

    disk.replace_folder(tmp_path / "adapter", fill("first"))
    disk.replace_folder(tmp_path / "adapter", fill("second"))
    with pytest.raises(OSError, match="No space"):
        disk.replace_folder(tmp_path / "adapter", fill("bad"))
    assert os.listdir(tmp_path) == ["adapter"]
    assert {p.name: p.read_text() for p in (tmp_path / "adapter").iterdir()} == {
        "one": "second",
        "two": "second",
    }


@contextmanager
def mounted(folder, *options):
    """A file system of its own at a folder; without the right to mount, the test is skipped."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    folder.mkdir(exist_ok=True)
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield lambda option: subprocess.run(
            ["mount", "-o", f"remount,{option}", str(folder)], check=True
        )
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_fills_up_and_the_run_goes_on_when_it_is_larger(settings, tmp_path, capsys):
    whole = SimulateConfig(**{**settings, "rounds": 4})
    simulate(whole)
    with mounted(tmp_path / "disk", "size=400k") as remount:
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if k != "out"]
        flags += ["--rounds=4", f"--out={tmp_path / 'disk/run'}"]
        # Room for two states and a half: the third is written while two are kept.
        room = (Path(whole.out) / checkpoint.STATE_FILE).stat().st_size * 5 // 2 + 24 * 1024
        (tmp_path / "disk/ballast").write_bytes(bytes(400 * 1024 - room))
        assert main(["simulate", *flags]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "No space left on device" in said
        done = checkpoint.load_state(tmp_path / "disk/run").round
        assert f"the checkpoint of round {done} is intact" in said
        remount("size=2m")
        assert main(["simulate", *flags, "--resume"]) == 0
        assert outcome(tmp_path / "disk/run") == outcome(whole.out)


def test_a_read_only_folder_is_one_clear_message(settings, tmp_path, capsys):
    with mounted(tmp_path / "disk", "size=2m") as remount:
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items() if k != "out"]
        flags += [f"--out={tmp_path / 'disk/run'}"]
        assert main(["simulate", *flags]) == 0
        before = outcome(tmp_path / "disk/run")
        remount("ro")
        capsys.readouterr()
        assert main(["simulate", *flags, "--resume", "--rounds=3"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "Read-only file system; the checkpoint of round 2 is intact" in said
        assert outcome(tmp_path / "disk/run") == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", [28, 30], ids=["no space left", "read-only"])
def test_a_whole_run_survives_a_disk_that_fails_at_any_step(settings, tmp_path, kind):
    small = {**settings, "local_steps": 1, "per_round": 1, "eval_examples": 2}
    simulate(SimulateConfig(**{**small, "out": str(tmp_path / "whole")}))
    wanted, step = outcome(tmp_path / "whole"), 0
    while True:
        folder = tmp_path / str(step)
        config = SimulateConfig(**{**small, "out": str(folder)})
        with FailingDisk(step, kind) as failing, suppress(ValueError):
            simulate(config)
        begun = (folder / "config.json").is_file()
        if failing.failed:
            simulate(replace(config, resume=begun))
        assert outcome(folder) == wanted
        assert json.loads((folder / "summary.json").read_text())["eval_loss_after"]
        assert (folder / "adapter/adapter_model.safetensors").is_file()
        if not failing.failed:
            break
        step += 1
    assert step > 50
