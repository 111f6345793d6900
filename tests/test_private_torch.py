"""What the packages use of torch without its promise is known, and was found in every version."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Looked up in torch 2.11 and 2.13. A new name goes here once it was found in the oldest version.
KNOWN = {
    "torch._C._are_functorch_transforms_active",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch._C._is_any_autocast_enabled",
    "torch._C._is_tracing",
    "torch._foreach_norm",
    "torch._subclasses.fake_tensor",
    "torch.autograd.forward_ad._current_level",
    "torch.cpu._is_amx_tile_supported",
    "torch.nn.modules.module._has_any_global_hook",
    "torch.ops.aten._unsafe_view.default",
    "torch.ops.mkldnn._linear_pointwise",
    "torch.utils._python_dispatch",
    "torch.utils._pytree",
}


def private(name):
    parts = name.split(".")
    return parts[0] == "torch" and any(p.startswith("_") and not p.endswith("__") for p in parts)


def names(tree):
    """Every dotted name below torch that a module mentions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def unknown(source):
    """The private names of torch that are not known, nor parts of one that is."""
    found = {name for name in names(ast.parse(source)) if private(name)}
    return {
        name
        for name in found
        if not any(known == name or known.startswith(f"{name}.") for known in KNOWN)
        and name.rpartition(".")[0] not in KNOWN
    }


@pytest.mark.parametrize("package", ["fslora", "fslora_kernels"])
def test_private_names_of_torch_are_those_that_every_version_has(package):
    sources = {path: path.read_text() for path in sorted((ROOT / package).rglob("*.py"))}
    assert sources
    found = {str(path): unknown(source) for path, source in sources.items()}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "line",
    ["torch._foreach_clone(x)", "from torch._dynamo import x", "from torch.nn import _reduction"],
)
def test_a_new_one_is_seen(line):
    assert unknown(line)
    assert not unknown("torch._foreach_norm(x, y); torch.__version__")
