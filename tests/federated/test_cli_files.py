"""Settings from files and presets beside flags, and what the command line says when it stops."""

import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from fslora import __main__ as cli
from fslora import simulate as simulations
from fslora.__main__ import main
from fslora.compare import command as comparisons
from fslora.config import SimulateConfig
from fslora.console import closing_lines
from fslora.presets import PRESETS


@pytest.fixture
def asked(monkeypatch):
    """The configs that would have been run."""
    found = []
    monkeypatch.setattr(cli, "_run", found.append)
    monkeypatch.setattr(cli, "_report_comparison", lambda _: None)

    def compare(config, _):
        found.append(config)
        return {"datasets": [{"strategies": [{"runs": [{"failed": None}]}]}]}

    monkeypatch.setattr(comparisons, "compare", compare)
    return found


def test_a_file_of_some_settings_is_completed_by_flags(asked, tmp_path):
    path = tmp_path / "some.toml"
    path.write_text('rounds = 3\nratios = [0.5, 1]\nrslora = true\nout = "o"\nseed = 4\n')
    flags = [f"--config={path}", "--model=m", "--data=d"]
    assert main(["simulate", *flags, "--rounds=5"]) == 0
    assert main(["simulate", "--preset=demo", *flags]) == 0
    assert main(["compare", *flags, "--jobs=2"]) == 0
    given = {"ratios": "0.5,1", "rslora": True, "out": "o"}
    whole = SimulateConfig(model="m", data="d", rounds=5, seed=4, **given)
    assert asked[0] == whole
    assert (asked[1].rounds, asked[1].server_lr, asked[1].model) == (3, 2.0, "m")
    assert (asked[2].jobs, asked[2].run.rounds, asked[2].run.rslora) == (2, 3, True)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_compared(asked, preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = Path(PRESETS[preset]().out)
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")  # simulated before
    assert main(["compare", f"--preset={preset}"]) == 0
    assert (asked[0].run.seed, asked[0].run.out) == (0, "runs/compare")
    with pytest.raises(SystemExit):
        main(["compare", f"--preset={preset}", "--seed=3"])
    assert "are those of one run" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_is_not_there_is_not_resumed(asked, tmp_path, capsys):
    assert main(["simulate", f"--out={tmp_path / 'never'}", "--resume"]) == 2
    assert "holds no run to resume; leave out --resume" in capsys.readouterr().err
    assert not asked


@pytest.mark.parametrize(("begun", "words"), [(False, "nothing was begun"), (True, "and --resume")])
def test_ctrl_c_says_what_there_is_to_go_on_with(tmp_path, monkeypatch, capsys, begun, words):
    def interrupted(config, _):
        if begun:
            (Path(config.out) / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(simulations, "simulate", interrupted)
    assert main(["simulate", "--model=m", "--data=d", f"--out={tmp_path}"]) == 130
    assert re.search(f"stopped; .*{words}", capsys.readouterr().err)


def test_a_run_goes_on_when_its_reader_has_gone():
    code = (
        "import sys; from fslora.__main__ import _console; console = _console()\n"
        "for _ in range(3): console.print('x')\n"
        "sys.stderr.write('went on')"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"went on"
    assert process.returncode == 0


def test_a_tilde_is_the_home_folder(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text('data = "d"\nmodel = "~/m"\n')
    assert main(["simulate", "--config=~/run.toml", "--out=~/x"]) == 0
    assert SimulateConfig(model="m", data="d", out="~nobody-here/x").out == "~nobody-here/x"
    assert (asked[0].out, asked[0].model) == (f"{tmp_path}/x", f"{tmp_path}/m")


def test_tune_names_a_device_that_is_none(capsys):
    assert main(["tune", "--device=foo"]) == 2
    assert "unknown device 'foo'" in capsys.readouterr().err


def test_paths_are_shown_as_they_are(tmp_path):
    shown = Console(file=StringIO(), width=20)
    folder = tmp_path / "[bold]a [/x] long name"
    (folder / "adapter").mkdir(parents=True)
    closing_lines(folder, folder / "report.html", shown)
    text = shown.file.getvalue()
    assert f"adapter: {folder}/adapter (load it with peft.PeftModel.from_pretrained)\n" in text
    assert f"report:  {folder}/report.html\n" in text
    closing_lines(folder, None, shown, layers=2)
    assert "from_pretrained on the base with num_hidden_layers=2)\n" in shown.file.getvalue()
