"""How far a server trusts its clients, as settings: limits, rules, privacy, simulated attacks.

What they do is in ``validate``, ``robust``, ``privacy`` and ``attacks``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

from fslora.options import Averaging, Sampler

Robust = Literal["none", "clip", "median", "trimmed"]
Attack = Literal["none", "sign-flip", "scale", "noise", "wrong-ranks", "label-flip"]

# They average changes of the same global ranks. The others weigh, stack or factor what clients
# send, or average nothing.
ROBUST = ("fslora", "fedit", "fedit-min", "fedit-max", "ffa-lora", "fed-plora", "head-only")
# They sum changes over participants, and every coordinate that travels may be anybody's.
PRIVATE = ("fslora", "fedit", "ffa-lora", "head-only")
_NOISE = 1e-6, 1e6  # beyond, the accountant's arithmetic fails, below it in the wrong direction


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server puts up with.

    Attributes:
        max_norm: of a whole change, all modules and heads together; 0 sets no limit but that
            sums cannot overflow.
        quarantine: after so many rejected updates a client is not asked any more; 0 asks for ever.
        examples: client id to the examples that it is known to have.
        max_examples: what any other client may claim.
    """

    max_norm: float = 0.0
    quarantine: int = 0
    examples: Mapping[str, int] = field(default_factory=dict)
    max_examples: int = 10**9

    def __post_init__(self) -> None:
        """Refuse limits that cannot be meant."""
        for flag, value in (("max-norm", self.max_norm), ("quarantine", self.quarantine)):
            if not value >= 0:
                raise ValueError(f"--{flag} must be at least 0, got {value}")


@dataclass(frozen=True, slots=True)
class Rule:
    """A robust rule.

    Attributes:
        name: "none", "clip", "median" or "trimmed".
        clip: norm that a whole change may have; 0 takes the median of the round's norms.
        trim: of "trimmed", the share of a row's contributors that is cut off at each end, rounded
            up; one or two are always left.
        min_coverage: of "median" and "trimmed", how many clients must have trained a row for it
            to move.
    """

    name: Robust = "none"
    clip: float = 0.0
    trim: float = 0.25
    min_coverage: int = 3

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if not self.clip >= 0:
            raise ValueError(f"--robust-clip must be at least 0, got {self.clip}")
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"--trim must be in [0, 0.5), got {self.trim}")
        if self.min_coverage < 1:
            raise ValueError(f"--min-coverage must be at least 1, got {self.min_coverage}")


@dataclass(frozen=True, slots=True)
class Threat:
    """An attack and who mounts it.

    Attributes:
        attack: what hostile clients do.
        share: of the clients, those that are hostile, to the nearest whole number.
        strength: of "sign-flip", "scale" and "noise".
    """

    attack: Attack = "none"
    share: float = 0.2
    strength: float = 10.0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"--attackers must be a share in [0, 1], got {self.share}")
        if not 0 < self.strength < math.inf:
            raise ValueError(f"--attack-strength must be positive, got {self.strength}")


@dataclass(frozen=True, slots=True)
class Privacy:
    """DP-FedAvg's parameters.

    Attributes:
        clip: C, the norm that a client's whole change is clipped to.
        noise: σ / C, where σ is the noise's standard deviation on the sum of changes; 0 adds none.
        cohort: how many clients are drawn for a round, without replacement; what sums are divided
            by, however many answer.
        clients: how many they are drawn from.
        delta: δ of (ε, δ).
    """

    clip: float
    noise: float
    cohort: int
    clients: int
    delta: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse parameters out of range."""
        if not (self.clip > 0 and 0 <= self.noise < math.inf):
            raise ValueError(
                f"--dp-clip and --dp-noise go together and are positive, got {self.clip} and "
                f"{self.noise}"
            )
        least, most = _NOISE
        if self.noise and not least <= self.noise <= most:
            raise ValueError(
                f"--dp-noise is in units of --dp-clip, and must be 0 or between {least:g} and "
                f"{most:g}, got {self.noise:g}"
            )
        if not 0 < self.delta < 1:
            raise ValueError(f"--dp-delta must be in (0, 1), got {self.delta}")


def thin_coverage(strategy: str, rule: Rule, per_round: int, coverage: float) -> str:
    """Warn where most ranks are trained by fewer clients than a rule needs, else say nothing.

    Args:
        strategy: its name.
        rule: the robust rule.
        per_round: clients of a round.
        coverage: share of the ranks that a client with a sketch trains, on average.
    """
    holders = per_round * (coverage if strategy in ("fslora", "fed-plora") else 1.0)
    if rule.name not in ("median", "trimmed") or holders >= rule.min_coverage:
        return ""
    return (
        f"a rank is trained by {holders:.3g} clients of a round on average, and --robust "
        f"{rule.name} moves it only where {rule.min_coverage} did: lower --min-coverage, or raise "
        "--per-round or --ratios"
    )


def idle_attack(strategy: str, attack: Attack) -> str:
    """Warn where nobody mounts an attack, else say nothing.

    Args:
        strategy: its name; as the row beside others that an attack reaches it may be meant.
        attack: what hostile clients would do.
    """
    why = {
        "zero-shot": "where nobody trains",
        "centralised": "" if attack == "label-flip" else "whose one client is the server's own",
        "head-only": "whose heads have no ranks" if attack == "wrong-ranks" else "",
    }.get(strategy)
    if attack == "none" or not why:
        return ""
    return f"--attack {attack} does nothing with --strategy {strategy}, {why}"


def check_trust(
    *,
    strategy: str,
    task: str,
    per_round: int,
    averaging: Averaging,
    sampler: Sampler,
    over_select: float,
    limits: Limits,
    rule: Rule,
    threat: Threat,
    privacy: Privacy | None,
) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: naming what, why, and what to do.
    """
    if threat.attack == "label-flip" and task != "classification":
        raise ValueError("--attack label-flip needs classes; use it with --task classification")
    if rule.name != "none" and strategy not in ROBUST:
        raise ValueError(
            f"--robust {rule.name} defends strategies that average changes of shared ranks, and "
            f"{strategy} does not; use --strategy {', '.join(ROBUST[:-1])} or {ROBUST[-1]}"
        )
    if rule.name in ("median", "trimmed") and rule.min_coverage > per_round:
        raise ValueError(
            f"--min-coverage {rule.min_coverage} is more than the --per-round {per_round} clients "
            f"that can have trained a rank, so that --robust {rule.name} would move none; lower it"
        )
    if privacy is None:
        return
    if privacy.noise and find_spec("dp_accounting") is None:
        raise ValueError("--dp-noise needs an accountant: pip install 'fslora[privacy]'")
    if strategy not in PRIVATE:
        raise ValueError(
            f"--dp-noise protects the plain sum of clients' changes, and {strategy} shares more; "
            f"use --strategy {', '.join(PRIVATE[:-1])} or {PRIVATE[-1]}"
        )
    refused = {
        "--sampler importance": (
            sampler == "importance",
            "weighs a client's ranks by what others have learnt, which no clipping bounds",
        ),
        "--sampler balanced": (
            sampler == "balanced",
            "lets who takes part decide which ranks the others train, so that one client moves "
            "their changes too",
        ),
        f"--averaging {averaging}": (
            averaging != "participants",
            "divides by what clients trained or weighs it, so that one of them can move a sum "
            "further than the clipping bound",
        ),
        f"--robust {rule.name}": (rule.name != "none", "releases no sum, which the noise is for"),
        "--over-select": (over_select != 1, "lets one client's answer decide whose else counts"),
        "--quarantine": (
            limits.quarantine > 0,
            "makes the draw of a round depend on what clients sent",
        ),
    }
    for flag, (given, why) in refused.items():
        if given:
            raise ValueError(f"{flag} {why}; leave it out with --dp-noise")
