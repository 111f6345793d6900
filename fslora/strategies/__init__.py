"""One federated algorithm per file, each a factory that returns pure functions."""

from collections.abc import Callable

from fslora.protocol import Strategy
from fslora.strategies.centralised import centralised
from fslora.strategies.fed_plora import fed_plora
from fslora.strategies.fedex_lora import fedex_lora
from fslora.strategies.fedit import fedit, fedit_max, fedit_min
from fslora.strategies.ffa_lora import ffa_lora
from fslora.strategies.flexlora import flexlora
from fslora.strategies.flora import flora
from fslora.strategies.fslora import fslora
from fslora.strategies.head_only import head_only
from fslora.strategies.hetlora import hetlora
from fslora.strategies.local_only import local_only
from fslora.strategies.rolora import rolora
from fslora.strategies.zero_shot import zero_shot

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "fslora": fslora,
    "fedit": fedit,
    "fedit-min": fedit_min,
    "fedit-max": fedit_max,
    "hetlora": hetlora,
    "flexlora": flexlora,
    "flora": flora,
    "ffa-lora": ffa_lora,
    "rolora": rolora,
    "fedex-lora": fedex_lora,
    "fed-plora": fed_plora,
    "zero-shot": zero_shot,
    "head-only": head_only,
    "centralised": centralised,
    "local-only": local_only,
}

__all__ = [
    "STRATEGIES",
    "centralised",
    "fed_plora",
    "fedex_lora",
    "fedit",
    "fedit_max",
    "fedit_min",
    "ffa_lora",
    "flexlora",
    "flora",
    "fslora",
    "head_only",
    "hetlora",
    "local_only",
    "rolora",
    "zero_shot",
]
