"""What a plan is made from: the run's own settings, the goal, the limits, the pilots."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from fslora.config import SimulateConfig, Target
from fslora.devices import Fleet
from fslora.needs import check_choices
from fslora_kernels.sampling import sketch_size

DEFAULT_OUT = "runs/plan"
Goal = Literal["time", "bytes", "energy"]
# What a run has for its clock alone, put back.
NO_CLOCK: dict[str, Any] = {
    "devices": "",
    "device_order": "by-ratio",
    "deadline": 0.0,
    "over_select": 1.0,
    "faults": "",
}


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """Choose each class's sketch ratio, so that a target costs the least time, bytes or energy.

    Takes the flags of `fslora simulate`; --devices and one --targets are needed. Writes
    OUT/plan.toml, which `fslora simulate --config` takes, OUT/plan.json and OUT/plan.png. Pilot
    runs go to OUT/pilots and are not repeated by the same command.

    Attributes:
        run: what is planned.
        goal: what to spend least of until the target is reached: time (simulated), bytes (both
            ways, all clients) or energy (of the devices; each needs its watts).
        traffic_mb: megabytes that a client may move in one round, both ways; 0 is no limit.
        pilot_ratios: uniform ratios of the pilots, comma-separated; one more pilot mixes the
            lowest with the highest.
        pilot_rounds: rounds of a pilot that does not reach the target before; 0 takes --rounds.
        pilot_seeds: pilots of each kind, each with a seed that the planned run does not use.
        pilots: folder of the pilots, to share them between plans; default OUT/pilots.
    """

    run: SimulateConfig
    goal: Goal = "time"
    traffic_mb: float = 0.0
    pilot_ratios: str = "1/8,1/4,1"
    pilot_rounds: int = 0
    pilot_seeds: int = 1
    pilots: str = ""

    def __post_init__(self) -> None:
        """Refuse values that cannot work, each by its flag."""
        check_choices(self)
        if self.run.strategy != "fslora":
            raise ValueError(
                f"--strategy {self.run.strategy}: the bound that plans are made by is FSLoRA's"
            )
        for name, planned in (("redraw", "round"), ("depth", "all"), ("faults", "''")):
            value = getattr(self.run, name)
            if value not in (planned, ""):
                raise ValueError(
                    f"--{name} {value}: a plan counts rounds with --{name} {planned} only; leave "
                    "it out"
                )
        for name, low in (("traffic_mb", 0), ("pilot_rounds", 0), ("pilot_seeds", 1)):
            if not getattr(self, name) >= low:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {low}")
        if len(self.pilot_sizes) < 2:
            raise ValueError(
                f"--pilot-ratios {self.pilot_ratios} are {len(self.pilot_sizes)} different size of "
                f"sketch at --rank {self.run.rank}; a dependence needs two"
            )
        _ = self.fleet, self.target
        default: Any = SimulateConfig.__dataclass_fields__["ratios"].default
        unsaid = replace(self.run, ratios=default)
        if self.run.ratio_values != unsaid.ratio_values:  # a run's config.json has them as numbers
            raise ValueError(
                f"--ratios {self.run.ratios}: a plan chooses the ratios; leave it out, or say by "
                "--pilot-ratios which ones its pilots have"
            )
        unknown = [device.name for device in self.fleet.devices if not device.watts]
        if self.goal == "energy" and unknown:
            raise ValueError(f"--goal energy: give {', '.join(unknown)} its watts in --devices")

    @property
    def fleet(self) -> Fleet:
        """The devices to plan for."""
        if self.run.fleet is None:
            raise ValueError("name the devices to plan for: --devices devices.toml")
        return self.run.fleet

    @property
    def target(self) -> Target:
        """What is to be reached."""
        if len(self.run.target_values) != 1:
            raise ValueError(
                "name one target, such as --targets loss:3.2 or --targets 0.8; a plan is the "
                "cheapest way to it"
            )
        return self.run.target_values[0]

    @property
    def pilot_sizes(self) -> tuple[int, ...]:
        """S of the uniform pilots, ascending."""
        try:
            ratios = [float(Fraction(part.strip())) for part in self.pilot_ratios.split(",")]
            return tuple(sorted({sketch_size(self.run.rank, ratio) for ratio in ratios}))
        except (ValueError, ArithmeticError):
            raise ValueError(
                f"--pilot-ratios {self.pilot_ratios!r} are not numbers in (0, 1] such as 1/8,1/4,1"
            ) from None


@dataclass(frozen=True, slots=True)
class ProbeConfig:
    """Measure the machine that this runs on, and write it as a [[device]] table for --devices.

    Times real local steps of the run that the flags describe, and looks at the free memory and at
    what of it the allocator keeps. What it cannot see from here are the network and the watts: give
    them. Where memory is short, MALLOC_MMAP_THRESHOLD_=1048576 in the environment, here and in
    training, has glibc keep next to nothing, for up to half as much CPU time again.

    Attributes:
        run: what is to be trained; of its ratios the first is timed.
        name: of the class.
        share: of the clients that have such a machine.
        down_mbit: megabits a second, server to client.
        up_mbit: megabits a second, client to server.
        rtt_ms: milliseconds of a round trip.
        watts: drawn while it takes part; 0 where nobody knows.
        seconds: how long to measure.
        table: TOML file that the table is appended to.
    """

    run: SimulateConfig
    name: str = "this-machine"
    share: float = 1.0
    down_mbit: float = 60.0
    up_mbit: float = 10.0
    rtt_ms: float = 28.0
    watts: float = 0.0
    seconds: float = 10.0
    table: str = "devices.toml"

    def __post_init__(self) -> None:
        """Refuse values that cannot work, each by its flag."""
        for name in ("share", "down_mbit", "up_mbit", "seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be positive and finite")
        for name in ("rtt_ms", "watts"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0 and finite")
        if self.run.strategy in ("zero-shot", "centralised"):
            raise ValueError(f"--strategy {self.run.strategy}: no client trains, so none is timed")
        if not self.name:
            raise ValueError("--name is empty; name the class of devices")
        if self.share > 1:
            raise ValueError(f"--share is a part of the clients, at most 1, got {self.share:g}")
