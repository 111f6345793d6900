"""Which implementation runs: an explicit request is obeyed or refused with reasons."""

import os
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

IMPLEMENTATIONS = ("torch", "triton")


class Choice(NamedTuple):
    """What was chosen and why.

    Attributes:
        implementation: a name of the operation's backends: one of ``IMPLEMENTATIONS``, or "merged".
        reason: one sentence.
    """

    implementation: str
    reason: str


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on any device.

    It is Triton's own switch and the only environment variable that these packages read.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(implementation: str, device: str) -> str | None:
    """Say why an implementation cannot run on a kind of device at all, without importing it.

    Args:
        implementation: a backend's name; only Triton is ever missing.
        device: torch's device type, ``"cpu"`` or ``"cuda"``.

    Returns:
        The reason, or None where it can.
    """
    if implementation != "triton":
        return None
    if not _installed("triton"):
        return "the package triton is not installed (it exists for Linux: pip install triton)"
    if device != "cuda" and not interpreting():
        return f"Triton kernels need a GPU and these tensors are on the device {device!r}"
    return None


def check_implementation(requested: str | None) -> None:
    """Refuse a name that is no implementation.

    Raises:
        ValueError: listing the valid names.
    """
    if requested not in (None, "auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"unknown implementation {requested!r}; choose 'auto', "
            + " or ".join(repr(name) for name in IMPLEMENTATIONS)
        )


@cache
def load(module: str) -> Any:  # noqa: ANN401
    """Import a backend on its first use, by the name of its module."""
    return import_module(module)


def choose(
    backends: Mapping[str, str],
    arguments: Any,  # noqa: ANN401
    device: str,
    requested: str | None,
) -> Choice:
    """Choose the backend for a call.

    Args:
        backends: implementation to its module, best first; each has ``refuses(arguments)``.
        arguments: of the call.
        device: torch's device type.
        requested: an implementation's name, or None or ``"auto"`` to choose the first that can.

    Returns:
        The choice; with an explicit request it is that one or nothing.

    Raises:
        ValueError: unknown name.
        NotImplementedError: the requested implementation (or, on "auto", every one) refuses.
    """
    check_implementation(requested)
    names: Iterable[str] = backends if requested is None or requested == "auto" else (requested,)
    otherwise = "the fastest that can run here" if names is backends else "requested"
    passed_over: list[str] = []
    for name in names:
        reason = unavailable(name, device) or load(backends[name]).refuses(arguments)
        if reason is None:
            return Choice(name, "; ".join(passed_over) or otherwise)
        if name == requested:
            raise NotImplementedError(
                f"implementation {name!r} cannot run here: {reason}; "
                "use implementation='auto' to let the library choose"
            )
        passed_over.append(f"not {name}: {reason}")
    raise NotImplementedError("no implementation can run here: " + "; ".join(passed_over))


def first(
    backends: Mapping[str, str],
    arguments: Any,  # noqa: ANN401
    device: str,
    requested: str | None,
) -> str:
    """Name the implementation that ``choose`` chooses, without its reasons: what a call needs.

    Beside a large product, which empties a processor's caches, the reasons take a layer 0.5%.
    """
    if requested is None:
        for name, module in backends.items():
            if name == "triton" and unavailable(name, device) is not None:
                continue
            if load(module).refuses(arguments) is None:
                return name
    return choose(backends, arguments, device, requested).implementation
