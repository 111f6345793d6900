import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    # transformers 5.23 renames what trl 1.16 sets, and warns on a machine without a GPU.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example in this process, as a script; return what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def change(text):
    """The two numbers of "… -> …"."""
    return [float(number) for number in re.search(r"([\d.]+) -> ([\d.]+)", text).groups()]


def test_fuse_peft_script(run):
    vanilla, fused = run("fuse_peft_script.py", "--steps", 3).splitlines()
    assert vanilla.startswith("PEFT")
    assert fused.startswith("fused")
    assert change(fused) == pytest.approx(change(vanilla), abs=2e-3)
    assert change(fused)[1] < change(fused)[0] - 0.1


def test_more_steps_than_there_is_text_for_go_round(run, monkeypatch):
    rows = [{"text": "Return the value that the argument names. " * 20}] * 20
    monkeypatch.setattr("fslora.data.python_docs.python_docs", lambda: rows)
    first, last = change(run("fuse_peft_script.py", "--steps", 6).splitlines()[0])
    assert last < first - 1, "the same few lines again and again"


def test_trainer_and_its_adapter_in_vanilla_peft(run, monkeypatch, tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    before, after = change(run("trainer.py", "--steps", 10, "--out", adapter))
    assert after < before - 0.02
    for ours in [name for name in sys.modules if name.split(".")[0].startswith("fslora")]:
        monkeypatch.setitem(sys.modules, ours, None)  # so that its import fails
    printed = run("load_in_vanilla_peft.py", "--adapter", adapter, "--out", merged)
    assert "merged writes the same: True" in printed
    assert AutoModelForCausalLM.from_pretrained(merged).config.vocab_size == 1024


@pytest.mark.slow
def test_sft_trainer(run, tmp_path):
    pytest.importorskip("trl")
    before, after = change(run("sft_trainer.py", "--steps", 8, "--out", tmp_path))
    assert after < before - 0.02
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_missing_adapter_is_named(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("load_in_vanilla_peft.py", "--adapter", tmp_path / "nothing")
    assert "run examples/trainer.py first" in capsys.readouterr().err


def test_the_readme_lists_every_example():
    listed = re.findall(r"`python examples/(\w+\.py)`", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))
