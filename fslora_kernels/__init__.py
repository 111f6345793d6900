"""Fused kernels and layers for low-rank adapters of which each client trains a subset of the ranks.

Dimension legend, used as suffixes throughout (``x_TD`` is ``[T, D]``):

====  =======================================================
T     tokens (all leading dimensions of the input, flattened)
D     input features of the adapted layer
E     output features of the adapted layer
R     rank of the global adapter
S     sketch size: how many of the R ranks are used
====  =======================================================
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fslora_kernels._dispatch import IMPLEMENTATIONS, Choice
from fslora_kernels.ops.grouped_sketched_linear import grouped_sketched_linear
from fslora_kernels.ops.scatter_mean import scatter_mean
from fslora_kernels.ops.shared_sketched_linear import Projection, shared_sketched_linear
from fslora_kernels.ops.sketched_adamw import sketched_adamw
from fslora_kernels.ops.sketched_linear import sketched_linear
from fslora_kernels.optim import SketchedAdamW
from fslora_kernels.sampling import draw_indices
from fslora_kernels.weights import Adapters, LoRAWeights, check_index

if TYPE_CHECKING:
    from fslora_kernels.nn.callback import SketchCallback, linear_ratio, random_ratio
    from fslora_kernels.nn.fuse import FuseReport, fuse, modules, unfuse
    from fslora_kernels.nn.peft import (
        bind,
        extract,
        ranks,
        scatter,
        sketch,
        slots,
        unbind,
    )
    from fslora_kernels.nn.wrap import get_sketched_peft_model

__all__ = [
    "IMPLEMENTATIONS",
    "Adapters",
    "Choice",
    "FuseReport",
    "LoRAWeights",
    "Projection",
    "SketchCallback",
    "SketchedAdamW",
    "bind",
    "check_index",
    "draw_indices",
    "extract",
    "fuse",
    "get_sketched_peft_model",
    "grouped_sketched_linear",
    "linear_ratio",
    "modules",
    "random_ratio",
    "ranks",
    "scatter",
    "scatter_mean",
    "shared_sketched_linear",
    "sketch",
    "sketched_adamw",
    "sketched_linear",
    "slots",
    "unbind",
    "unfuse",
]

# The PEFT side, by its module: the bare operations do not need peft or transformers.
_LAZY = {
    "fslora_kernels.nn.fuse": ("FuseReport", "fuse", "modules", "unfuse"),
    "fslora_kernels.nn.peft": (
        "bind",
        "extract",
        "ranks",
        "scatter",
        "sketch",
        "slots",
        "unbind",
    ),
    "fslora_kernels.nn.wrap": ("get_sketched_peft_model",),
    "fslora_kernels.nn.callback": ("SketchCallback", "linear_ratio", "random_ratio"),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import the PEFT side on first use; from then on its names are here."""
    for module, names in _LAZY.items():
        if name in names:
            globals()[name] = found = getattr(import_module(module), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
