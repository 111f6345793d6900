"""The plugin fuses what tests build, a broken layer is caught, and nothing stays patched."""

import json

import pytest
from peft.tuners.tuners_utils import BaseTuner

from fslora_kernels.nn import linear
from fslora_kernels.nn.linear import SketchedForward
from tests.peft_suite import report
from tests.peft_suite.plugin import read

pytest_plugins = ["pytester"]

TESTS = """
import copy
import pytest, torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners import lora

def build(config_cls=LoraConfig, **config):
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    if config_cls is IA3Config:
        config["feedforward_modules"] = []
    return get_peft_model(model, config_cls(target_modules=["0"], **config))

@pytest.mark.parametrize("config_cls", [LoraConfig, IA3Config])
def test_merging(config_cls):
    model = build(config_cls, init_lora_weights=False)
    x = torch.ones(2, 6)
    before = model(x)
    assert torch.allclose(model.merge_and_unload()(x), before, atol=1e-5)

def test_the_class():
    assert type(build().base_model.model[0]) is lora.Linear

def test_adding_an_adapter():
    model = build(init_lora_weights=False)
    model.add_adapter("other", LoraConfig(target_modules=["0"]))
    with model.disable_adapter():
        model(torch.ones(1, 6))

def test_variants_are_left():
    build(use_dora=True)(torch.ones(1, 6))

def test_something_else():
    assert 1 + 1 == 2

def test_that_needs_the_hub():
    raise OSError("We couldn't connect to the hub")
"""


@pytest.fixture
def judged(pytester):
    """Run TESTS in both modes; return the verdict and the rows by mode and test."""

    def run():
        pytester.makepyfile(test_them=TESTS)
        rows = {}
        for mode in ("vanilla", "fused"):
            path = pytester.path / f"{mode}.jsonl"
            arguments = ["-p", "tests.peft_suite.plugin", "-p", "no:cacheprovider"]
            arguments += ["--lora-mode", mode, "--lora-outcomes", path]
            if mode == "fused":
                only = pytester.path / "only.json"
                only.write_text(json.dumps(report.to_fuse(rows["vanilla"])))
                arguments += ["--lora-only", only]
            pytester.inline_run(*arguments)
            rows[mode] = read(path)
        verdict = report.compare(rows["vanilla"], rows["fused"])
        names = {mode: {r["id"].split("::")[1]: r for r in rows[mode]} for mode in rows}
        return verdict, names

    return run


def test_models_are_fused_and_outcomes_compared(judged):
    before = BaseTuner.inject_adapter, SketchedForward.forward, linear.unchecked
    verdict, rows = judged()
    assert (BaseTuner.inject_adapter, SketchedForward.forward, linear.unchecked) == before
    assert "test_merging[IA3Config]" not in rows["vanilla"]
    assert all(row["computed"] == row["fused"] == 0 for row in rows["vanilla"].values())
    counts = {n: (r["fused"], r["computed"], r["delegated"]) for n, r in rows["fused"].items()}
    assert counts == {
        "test_merging[LoraConfig]": (1, 1, 0),
        "test_the_class": (1, 0, 0),
        "test_adding_an_adapter": (1, 0, 1),
        "test_variants_are_left": (0, 0, 0),
    }
    assert (verdict.cases, verdict.named, verdict.fused, verdict.computed) == (4, 1, 3, 1)
    assert [name.split("::")[1] for name in verdict.failed] == ["test_the_class"]
    assert verdict.share == 0.75
    assert list(verdict.not_run) == ["needs a model of the hub"]
    page = report.markdown({"test_them": verdict}, ["a fact"])
    assert "| test_them | 4 | 0 | 4 | 1 | 3 | 75.00% | 3 | 1 |" in page
    assert "`test_them.py::test_the_class`: **not understood yet**" in page
    assert "needs a model of the hub (1): `test_that_needs_the_hub`" in page


def test_a_broken_layer_is_caught(judged, monkeypatch):
    compute = linear.unchecked
    monkeypatch.setattr(linear, "unchecked", lambda *args: 1.001 * compute(*args))
    verdict, _ = judged()
    failed = [name.split("::")[1] for name in verdict.failed]
    assert failed == ["test_merging[LoraConfig]", "test_the_class"]


def test_a_run_continues_where_it_stopped(pytester):
    pytester.makepyfile(test_them="def test_a(): pass\ndef test_b(): pass")
    path = pytester.path / "rows.jsonl"
    arguments = ["-p", "tests.peft_suite.plugin", "-p", "no:cacheprovider"]
    arguments += ["--lora-mode", "vanilla", "--lora-outcomes", path]
    pytester.inline_run(*arguments, "-k", "test_a")
    pytester.inline_run(*arguments)
    assert [row["id"] for row in read(path)] == ["test_them.py::test_a", "test_them.py::test_b"]


def test_a_missing_outcome_is_an_error():
    row = {"id": "a", "outcome": "passed", "named": True, "lora": 1, "reason": ""}
    with pytest.raises(ValueError, match="1 cases have no fused outcome, a among them"):
        report.compare([row], [])
