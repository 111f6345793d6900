"""Settings from files, and whether a run may be continued with others."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_type_hints

from fslora.config import LISTS, SimulateConfig
from fslora.needs import flag, is_of, type_of

# What may differ between a run and its continuation without changing a bit of what is learnt.
_FREE_ON_RESUME = ("rounds", "out", "resume", "targets")


def merged(config: SimulateConfig | None, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Check values from a file and put them over a config's.

    Args:
        config: what to start from; None starts from the defaults.
        values: field names (dashes or underscores) to values; lists may be lists or
            comma-separated.
        source: the file, for the message.

    Returns:
        Keyword arguments for ``SimulateConfig``.

    Raises:
        ValueError: an unknown field or a value of the wrong type.
    """
    types = {name: type_of(hint) for name, hint in get_type_hints(SimulateConfig).items()}
    result: dict[str, Any] = {} if config is None else asdict(config)
    for key, given in values.items():
        name = key.replace("-", "_")
        if name not in types:
            raise ValueError(f"{source}: unknown setting {key!r}; settings are the flags of --help")
        if name == "device" and isinstance(given, list):
            raise ValueError(f"{source}: write [[devices]] for a fleet; device is cpu or cuda")
        listed = name in LISTS and isinstance(given, list)
        value: Any = ",".join(str(item) for item in given) if listed else given
        if name == "devices" and isinstance(given, list):
            value = json.dumps(given, default=str)  # TOML has dates
        if not is_of(types[name], value):
            raise ValueError(f"{source}: {key} = {value!r} is not of type {types[name].__name__}")
        try:
            result[name] = float(given) if types[name] is float else value
        except OverflowError:
            raise ValueError(f"{source}: {key} is more than a float can be") from None
    return result


def read_settings(path: Path) -> dict[str, Any]:
    """Read a TOML file of settings, or a run's ``config.json``.

    Raises:
        ValueError: the file is missing or not in its format.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"cannot read the settings {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise ValueError(f"{path} is not valid {kind}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f'{path}: settings are one object {{"model": …, "data": …}}')  # noqa: TRY004
    return values


def as_flags(values: Mapping[str, object]) -> list[str]:
    """Write settings as flags, which the user's own can follow."""
    given = []
    for name, value in values.items():
        switch = flag(name if value else f"no_{name}")
        given.append(switch if isinstance(value, bool) else f"{flag(name)}={value}")
    return given


def saved_settings(folder: Path) -> Path:
    """Return where the settings of a run that is to be continued are.

    Raises:
        ValueError: there is no run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run to resume; leave out --resume")
    return path


def continued(
    saved: SimulateConfig, asked: SimulateConfig, checked: Collection[str] = ()
) -> SimulateConfig:
    """Check that a run may be continued as asked.

    Args:
        saved: its settings.
        asked: those that it is to go on with.
        checked: settings that may differ because the caller compares the content of what they name.

    Returns:
        The config to go on with.

    Raises:
        ValueError: a setting differs that would make the result another one, or the run has more
            rounds than are asked for.
    """
    if changed := _changed(saved, asked, checked):
        raise ValueError(
            f"the run in {asked.out} was started otherwise: {changed}; leave out these flags, or "
            "the --preset or --config that they come from, or start a new run with another --out"
        )
    from fslora import checkpoint

    done = checkpoint.rounds_done(Path(asked.out))
    if done > asked.rounds:
        raise ValueError(
            f"the run in {asked.out} has {done} rounds, and {asked.rounds} are asked for; ask for "
            "as many, or choose another --out"
        )
    new = {name: getattr(asked, name) for name in (*_FREE_ON_RESUME, *checked)}
    return replace(saved, **{**new, "resume": True})


def why_taken(path: Path, asked: SimulateConfig) -> str:
    """Say that a run folder holds a run, and whether that is the one that is asked for.

    Args:
        path: the settings in it.
        asked: a run that is to begin there.

    Raises:
        ValueError: the settings in it are damaged.
    """
    saved = SimulateConfig(**merged(None, read_settings(path), str(path)))
    if changed := _changed(saved, asked):
        return f"{asked.out} already holds a run with other settings, {changed}; choose a new --out"
    return f"{asked.out} already holds a run; go on with it by --resume, or choose another --out"


def _changed(saved: SimulateConfig, asked: SimulateConfig, free: Collection[str] = ()) -> str:
    """List the settings that would make the result another one."""
    before, after = saved.to_json(), asked.to_json()
    free = (*_FREE_ON_RESUME, *free)
    changed = [n for n in before if n not in free and before[n] != after[n]]
    return ", ".join(f"{flag(n)} {_short(after[n])} (was {_short(before[n])})" for n in changed)


def _short(value: object) -> str:
    """Cut a value that is too long for a message, as a whole fleet is."""
    text = str(value)
    return text if len(text) < 60 else f"{text[:50]}…"
