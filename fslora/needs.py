"""Settings that are one of a list, and settings that do nothing without another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from fslora.config import SimulateConfig

# What only the strategy fslora has.
FSLORA_OPTIONS = ("forward", "averaging", "sampler", "redraw", "depth", "depth_min_probability")


class _Need(NamedTuple):
    """What a setting needs in order to change anything.

    Attributes:
        flags: to give with it, for the message.
        met: whether a config has it.
    """

    flags: str
    met: Callable[[SimulateConfig], bool]


_LISTS = ("target_modules", "text_column", "prompt_columns")  # that cannot be empty
_CLASSES = _Need("--task classification", lambda c: c.task == "classification")
_RESPONSES = _Need("--task instruction", lambda c: c.task == "instruction")
_NEEDS = {
    **dict.fromkeys(FSLORA_OPTIONS, _Need("--strategy fslora", lambda c: c.strategy == "fslora")),
    "depth_min_probability": _Need(
        "--depth uniform or by-ratio (of fslora)",
        lambda c: c.strategy == "fslora" and c.depth in ("uniform", "by-ratio"),
    ),
    "metric": _CLASSES,
    "label_column": _Need(
        "--task classification or --partition dirichlet",
        lambda c: c.task == "classification" or c.partition.startswith("dirichlet"),
    ),
    "text_column": _Need("--task causal-lm or classification", lambda c: c.task != "instruction"),
    "prompt_columns": _RESPONSES,
    "response_column": _RESPONSES,
    "momentum": _Need("--optimizer sgd", lambda c: c.optimizer == "sgd"),
    "device_order": _Need("--devices", lambda c: bool(c.devices)),
    "robust_clip": _Need("--robust clip, median or trimmed", lambda c: c.robust != "none"),
    "trim": _Need("--robust trimmed", lambda c: c.robust == "trimmed"),
    "min_coverage": _Need(
        "--robust median or trimmed", lambda c: c.robust in ("median", "trimmed")
    ),
    "attackers": _Need("--attack", lambda c: c.attack != "none"),
    "attack_strength": _Need(
        "--attack sign-flip, scale or noise",
        lambda c: c.attack in ("sign-flip", "scale", "noise"),
    ),
    "dp_delta": _Need("--dp-noise", lambda c: c.dp_noise > 0),
}


def flag(name: str) -> str:
    """The command line's name of a setting."""
    return "--" + name.replace("_", "-")


def type_of(hint: Any) -> Any:  # noqa: ANN401 - a type, whatever its kind
    """The type of a setting's values: of a list of choices that of a name."""
    return str if get_origin(hint) is Literal else hint


def is_of(kind: type, value: object) -> bool:
    """Whether a value is of a type: a whole number is a float too, and a bool is no number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_choices(config: Any) -> None:  # noqa: ANN401 - any dataclass of settings
    """Refuse what is not in a setting's list or of its type, which Python does not look at.

    Raises:
        ValueError: with the choices, or the type.
    """
    for name, hint in get_type_hints(type(config)).items():
        value, choices, kind = getattr(config, name), get_args(hint), type_of(hint)
        if get_origin(hint) is Literal and value not in choices:
            raise ValueError(f"{flag(name)} = {value!r}; choose {', '.join(choices)}")
        if isinstance(kind, type) and not is_of(kind, value):
            raise ValueError(f"{flag(name)} = {value!r} is not of type {kind.__name__}")


def check_needs(config: SimulateConfig) -> None:
    """Refuse an empty list, and a setting that was given and does nothing, for want of another.

    Raises:
        ValueError: naming it, or both.
    """
    for name in _LISTS:
        if not config.column_names(name):
            raise ValueError(f"{flag(name)} names nothing; leave it out for its default")
    for name, need in _NEEDS.items():
        value = getattr(config, name)
        if value != type(config).__dataclass_fields__[name].default and not need.met(config):
            raise ValueError(
                f"{flag(name)} {value} does nothing without {need.flags}: give that too, or leave "
                "it out"
            )
