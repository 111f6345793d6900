"""Nothing that comes from a file or a peer may run code: what could is not in the packages."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p for name in ("fslora", "fslora_kernels") for p in (ROOT / name).rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load"), ("yaml", "load")}
KEYWORDS = {"allow_pickle", "trust_remote_code", "weights_only"}


def findings(tree):
    """What in a syntax tree could run code that it reads."""
    for node in ast.walk(tree):
        for name in [*imported(node), *called(node)]:
            yield f"line {node.lineno}: {name}"


def imported(node):
    names = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{name}" for name in names]
    for name in names:
        if MODULES & set(name.split(".")) or tuple(name.rsplit(".", 1)) in CALLS:
            yield name


def called(node):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if (node.value.id, node.attr) in CALLS:
            yield f"{node.value.id}.{node.attr}"
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
            yield node.func.id
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in KEYWORDS and (not off or keyword.arg == "weights_only"):
                yield keyword.arg


def test_nothing_that_is_read_can_run():
    found = {
        str(path.relative_to(ROOT)): list(findings(ast.parse(path.read_text(encoding="utf-8"))))
        for path in FILES
    }
    assert {path: lines for path, lines in found.items() if lines} == {}
    assert len(FILES) > 100


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch.serialization import pickle",
        "import cloudpickle as c",
        "from torch import load",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "read(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
        "exec(text)",
    ],
)
def test_the_scan_finds_what_it_looks_for(line):
    assert list(findings(ast.parse(line)))


def test_the_scan_leaves_a_models_eval_and_a_refusal_alone():
    harmless = "model.eval(); torch.compile(model); from_pretrained(n, trust_remote_code=False)"
    assert list(findings(ast.parse(harmless))) == []
