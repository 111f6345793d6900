import resource
import subprocess
import sys
from datetime import date

import pytest

from fslora import __main__ as cli
from fslora import checkpoint
from fslora.__main__ import main
from fslora.config import SimulateConfig
from fslora.presets import PRESETS
from fslora.settings import merged, read_settings


def flags(settings, **changes):
    return [f"--{k.replace('_', '-')}={v}" for k, v in {**settings, **changes}.items()]


def test_help_teaches(capsys):
    assert main(["--help"]) == 0
    assert "simulate" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["simulate", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in SimulateConfig.__dataclass_fields__:
        assert "--" + flag.replace("_", "-") in text
    assert "--preset" in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from fslora.__main__ import main\n"
        "try: main(['simulate', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'triton'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_read_enough_gets_no_traceback():
    command = [sys.executable, "-m", "fslora", "compare", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as `| head` does
        assert process.stderr.read() == b""
    assert process.returncode in (0, 141)


def test_a_whole_run_prints_a_table_and_its_report(settings, capsys):
    assert main(["simulate", *flags(settings)]) == 0
    out = capsys.readouterr().out
    assert "of full rank" in out
    assert "12.5%" in out
    assert "report.html" in out.replace("\n", "")


def test_bench_runs_the_repository_s_benchmarks_or_says_how_to_get_them(
    capfd, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)  # from anywhere
    with pytest.raises(SystemExit) as stop:
        main(["bench", "layer", "--list", "--device", "cpu", "--shapes", "square-768-t512"])
    assert stop.value.code == 0
    assert "768→768, S/R = 1/16" in capfd.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["bench", "fast"])
    assert stop.value.code == 2
    assert "no benchmark 'fast'" in capfd.readouterr().err
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages/fslora/__main__.py"))
    assert main(["bench"]) == 2
    assert "in the repository and not in the installed package" in capfd.readouterr().err


BAD = {
    "--model": ({"model": ""}, "name a model"),
    "out": ({"out": ""}, "name a run folder"),
    "module": ({"target_modules": "q_porj"}, "q_porj"),
    "one of them": ({"target_modules": "q_proj,k_porj"}, "no layer is named k_porj"),
    "ratio 0": ({"ratios": "0"}, "(0, 1]"),
    "ratio 2": ({"ratios": "1/2,2"}, "(0, 1]"),
    "ratio word": ({"ratios": "half"}, "not a list of numbers"),
    "per round": ({"per_round": 7}, "more clients a round"),
    "file": ({"data": "nothing.jsonl"}, "nothing.jsonl"),
    "file name": ({"data": "x" * 300}, "File name too long; name other data"),
    "model path": ({"model": "./nothing"}, "no model folder"),
    "column": ({"text_column": "words"}, "no column"),
    "natural": ({"partition": "natural:writer"}, "writer"),
    "clients": ({"clients": 9}, "9"),
    "scheme": ({"partition": "random"}, "iid"),
    "device": ({"device": "gpu"}, "unknown device"),
    "mps": ({"device": "meta"}, "unknown device 'meta'"),
    "layers": ({"layers": 3}, "--layers 3 is more than the 2 that"),
    "embedding": ({"target_modules": "q_proj,embed_tokens"}, "embed_tokens is no linear layer"),
    "all and more": ({"target_modules": "all-linear,q_proj"}, "name it alone"),
    "ratio huge": ({"ratios": "1e400"}, "not a list of numbers"),
    "triton": ({"implementation": "triton"}, "need a GPU"),
    "length": ({"max_length": 1}, "--max-length"),
    "eval data": ({"eval_data": "nothing.tsv"}, "nothing.tsv"),
    "resume": ({"resume": True}, "no run to resume"),
    "empty client": ({"clients": 60, "partition": "natural:id"}, "nothing left to train on"),
    "diverging": ({"lr": 1e30, "optimizer": "sgd", "local_steps": 4}, "Lower --lr"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_message(settings, name, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changes, message = BAD[name]
    given = [f for f in flags(settings, **changes) if f != "--resume=True"]
    if changes.get("resume"):
        given.append("--resume")
    try:
        code = main(["simulate", *given])
    except SystemExit as stop:
        code = stop.code
    assert code not in (0, None)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    words = " ".join(error.replace("│", " ").split())
    assert message in words, words


def test_a_full_disk_is_one_clear_message_and_keeps_the_last_checkpoint(settings, capsys):
    assert main(["simulate", *flags(settings, rounds=1)]) == 0
    out = checkpoint.Path(settings["out"])
    before = (out / checkpoint.STATE_FILE).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))
        code = main(["simulate", *flags(settings, rounds=3), "--resume"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2
    assert "the checkpoint of round 1 is intact" in " ".join(capsys.readouterr().err.split())
    assert (out / checkpoint.STATE_FILE).read_bytes() == before
    assert main(["simulate", f"--out={out}", "--rounds=3", "--resume"]) == 0
    assert len(checkpoint.read_records(out)) == 4


def test_an_unreadable_checkpoint_is_one_clear_message(settings, capsys):
    assert main(["simulate", *flags(settings, rounds=1)]) == 0
    out = checkpoint.Path(settings["out"])
    for name in (checkpoint.STATE_FILE, checkpoint.PREVIOUS_FILE):
        (out / name).write_bytes(b"torn")
    kept = (out / checkpoint.RECORDS_FILE).read_bytes()
    capsys.readouterr()
    assert main(["simulate", f"--out={out}", "--rounds=3", "--resume"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert (out / checkpoint.RECORDS_FILE).read_bytes() == kept


def test_settings_from_a_file_are_overridden_by_flags(settings, tmp_path, capsys):
    path = tmp_path / "run.toml"
    lines = [f"{k} = {v!r}" for k, v in settings.items() if k not in ("ratios", "rounds")]
    path.write_text("\n".join([*lines, "ratios = [0.5, 1]", "local-steps = 1"]).replace("'", '"'))
    assert main(["simulate", "--config", str(path), "--rounds", "1"]) == 0
    saved = read_settings(tmp_path / "run/config.json")
    assert saved["ratios"] == [0.5, 1.0]
    assert (saved["local_steps"], saved["rounds"]) == (1, 1)
    restored = SimulateConfig(**merged(None, saved, "config.json"))
    assert restored.to_json() == saved


@pytest.mark.parametrize("content", ["[1]", "3", "null"])
def test_json_that_is_no_table_of_settings_is_one_message(tmp_path, content, capsys):
    (tmp_path / "config.json").write_text(content)
    assert main(["simulate", "--config", str(tmp_path / "config.json")]) == 2
    assert main(["simulate", "--resume", "--out", str(tmp_path)]) == 2
    assert main(["simulate", "--preset=demo", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("settings are one object") == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rnak = 3", "unknown setting"),
        (f"lr = 1{'0' * 400}", "lr is more than a float can be"),
        ("rank = '3'", "not of type"),
        ("rank =", "not valid TOML"),
        ("[[device]]", "write [[devices]]"),
        pytest.param(f"rank = {'[' * 2000}", "not valid TOML", id="nested"),
    ],
)
def test_a_bad_settings_file_is_named(tmp_path, line, message, capsys):
    path = tmp_path / "run.toml"
    path.write_text(line)
    assert main(["simulate", "--config", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_date_in_a_fleet_is_named():
    given = {"devices": [{"compute": "gpu", "network": "5g", "share": date(2020, 1, 1)}]}
    with pytest.raises(ValueError, match="share = '2020-01-01' is not a number"):
        SimulateConfig(model="m", data="d", **merged(None, given, "run.toml"))


def test_commands_that_do_not_exist_are_named(capsys):
    assert main(["train"]) == 2
    assert "no command 'train'" in capsys.readouterr().err


def test_doctor_says_what_runs_and_why_not(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "torch" in out
    assert "GPU" in out


def test_presets_are_valid_configs():
    for preset in PRESETS.values():
        config = preset()
        restored = SimulateConfig(**merged(None, config.to_json(), "preset"))
        assert restored.to_json() == config.to_json()
