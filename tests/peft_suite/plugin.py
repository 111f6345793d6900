"""A pytest plugin that runs tests of PEFT's LoRA with every LoRA model that they build fused.

PEFT's test files are not edited: the plugin wraps the one method that all ways of adding an adapter
go through (``get_peft_model``, ``add_adapter``, ``load_adapter``, ``from_pretrained``,
``inject_adapter_in_model``). It writes one JSON line per test, at once, so that an interrupted run
loses nothing; tests that have a line are not run again. A line has the test's ``id`` and
``outcome``, the ``reason`` if it did not pass, whether it is ``named`` a LoraConfig case by its
parameters, how many layers it built (``lora``: of any LoRA type; ``fused``: by us), and how many
calls of fused layers ended in our operation (``computed``) or in PEFT's own code (``delegated``).
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner

import fslora_kernels
from fslora_kernels.nn import linear
from fslora_kernels.nn.linear import SketchedForward


def pytest_addoption(parser):
    group = parser.getgroup("LoRA cases, vanilla or fused")
    group.addoption("--lora-mode", choices=["vanilla", "fused"], help="whether to fuse the models")
    group.addoption("--lora-outcomes", type=Path, help="JSONL that outcomes are appended to")
    group.addoption("--lora-only", type=Path, help="JSON list of the only test ids to run")


def pytest_configure(config):
    if (mode := config.getoption("--lora-mode")) is not None:
        patches = pytest.MonkeyPatch()
        config.add_cleanup(patches.undo)
        recorder = Recorder(config.getoption("--lora-outcomes"), config.getoption("--lora-only"))
        watch(patches, recorder.counts, fused=mode == "fused")
        config.pluginmanager.register(recorder)


def watch(patches, counts, *, fused):
    """Count the LoRA layers that tests build and, where asked, fuse each model at once."""
    inject = BaseTuner.inject_adapter
    compute = linear.unchecked
    forward = SketchedForward.forward

    def inject_and_fuse(tuner, model, *args, **kwargs):
        lora, already = number_of(LoraLayer, model), number_of(SketchedForward, model)
        inject(tuner, model, *args, **kwargs)
        counts["lora"] += number_of(LoraLayer, model) - lora
        if fused and number_of(LoraLayer, model):
            fslora_kernels.fuse(model)
            counts["fused"] += number_of(SketchedForward, model) - already

    def counted(*args, **kwargs):
        counts["computed"] += 1
        return compute(*args, **kwargs)

    def watched(layer, *args, **kwargs):
        before = counts["computed"]
        y = forward(layer, *args, **kwargs)
        counts["delegated"] += counts["computed"] == before
        return y

    patches.setattr(BaseTuner, "inject_adapter", inject_and_fuse)
    patches.setattr(SketchedForward, "forward", watched)
    patches.setattr(linear, "unchecked", counted)


class Visited(dict):
    """PEFT's tests go online for a model that they have not met: they have met them all."""

    def __contains__(self, model_id):
        return True

    def __missing__(self, model_id):
        return 0


def number_of(kind, model):
    return sum(isinstance(module, kind) for module in model.modules())


def config_classes(value):
    """Yield the PEFT config classes anywhere in a test's parameters."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from config_classes(part)
    elif isinstance(value, PeftConfig):
        yield type(value)
    elif isinstance(value, type) and issubclass(value, PeftConfig):
        yield value


def parameters(item):
    return item.callspec.params if hasattr(item, "callspec") else {}


def may_use_lora(item):
    """Whether a test is parametrised by LoraConfig, or by no PEFT method at all."""
    classes = set(config_classes(parameters(item)))
    return not classes or LoraConfig in classes


def crash(report):
    """Say in one line why a test failed or was skipped."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    where = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if where is None else where.message
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))[:400]


class Recorder:
    """Selects the LoRA cases and writes what became of each."""

    def __init__(self, path, only):
        self.path = path
        self.counts = Counter()
        self.report = None
        self.done = {row["id"] for row in read(path)}
        self.only = None if only is None else set(json.loads(only.read_text()))

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self):
        """Stand in for diffusers, which PEFT's tests import and these cases do not use."""
        patches = pytest.MonkeyPatch()
        if "diffusers" not in sys.modules:
            stub = ModuleType("diffusers")
            stub.__spec__ = ModuleSpec("diffusers", None)
            stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
            patches.setitem(sys.modules, "diffusers", stub)
        try:
            return (yield)
        finally:
            patches.undo()

    def pytest_collection_modifyitems(self, config, items):
        chosen = [
            item
            for item in items
            if item.nodeid not in self.done
            and (item.nodeid in self.only if self.only is not None else may_use_lora(item))
        ]
        for name, module in list(sys.modules.items()):
            if name.endswith(".testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
                module._HUB_MODEL_ACCESSES = Visited()
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.counts.clear()
        self.report = None
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            self.write(item, time.perf_counter() - start)

    def pytest_runtest_logreport(self, report):
        """Keep the phase that decides: the first that did not pass, else the call itself."""
        if self.report is None or self.report.passed:
            self.report = report

    def write(self, item, seconds):
        report = self.report
        row = {
            "id": item.nodeid,
            "outcome": report.outcome,
            "reason": "" if report.passed else crash(report),
            "named": LoraConfig in config_classes(parameters(item)),
            "lora": self.counts["lora"],
            "fused": self.counts["fused"],
            "computed": self.counts["computed"],
            "delegated": self.counts["delegated"],
            "seconds": round(seconds, 2),
        }
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def read(path):
    """Return the rows of a file of outcomes; none where it is not there yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
