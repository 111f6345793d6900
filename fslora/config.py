"""Everything that a simulated run depends on, as one frozen and validated value."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from os.path import expanduser
from statistics import fmean
from typing import Any, Literal, NamedTuple

from fslora.devices import Fleet, read_fleet
from fslora.faults import Faults, read_faults
from fslora.needs import FSLORA_OPTIONS, check_choices, check_needs, flag
from fslora.options import Averaging, Forward, Redraw, Sampler, check_options
from fslora.trust import Attack, Limits, Privacy, Robust, Rule, Threat, check_trust

LISTS = ("ratios", "target_modules", "text_column", "prompt_columns", "targets")
_LOWEST = {
    **dict.fromkeys(("clients", "per_round", "rank", "rounds", "local_steps"), 1),
    **dict.fromkeys(("batch_size", "accumulation", "eval_every"), 1),
    **dict.fromkeys(("momentum", "weight_decay", "clip_norm"), 0),
    **dict.fromkeys(("deadline", "threads", "layers", "eval_examples", "train_rows", "seed"), 0),
    "max_length": 2,
    "over_select": 1,
}
_MOST = 1e30  # what is multiplied by it stays within the range of its type
_RATIOS = "1/8,1/4,1/2"


class Target(NamedTuple):
    """What a run is to reach.

    Attributes:
        figure: "metric", at least the value, or "loss", at most.
        value: of the figure.
    """

    figure: str
    value: float


@dataclass(frozen=True, slots=True)
class SimulateConfig:
    """Simulate federated fine-tuning of one model by clients of unequal strength.

    Each round some clients train a random part of the ranks of one shared LoRA adapter, as large a
    part as their sketch ratio says, and the server averages what they learnt.

    Attributes:
        model: Hugging Face model id, a folder, or docs-base (the small model in this package).
        data: dataset id, folder, pattern such as texts/part_*, or file (txt, tsv, csv, json, jsonl,
            parquet, also .gz), or python-docs (the documentation of the Python that runs this).
            Several txt files are a row each; a single one is cut into a piece for each client.
        eval_data: what to judge by; default a tenth of the data, held out.
        train_rows: deal at most so many rows of the data, evenly spread over it; 0 deals all.
        validation: leave that aside and judge by another tenth, of the clients' own data: for
            choosing settings.
        task: causal-lm (next token), classification, or instruction (loss on the response).
        text_column: column with the text, or two for a pair: name or position, comma-separated.
        label_column: column with the class (classification).
        prompt_columns: columns that make the prompt (instruction), comma-separated.
        response_column: column with the response (instruction).
        header: whether tsv and csv files start with column names.
        reader: auto, or play for plays in plain text (columns speaker and text).
        metric: score beside the loss, for classification; f1 of two classes is that of the last
            by name, of more the mean over them.
        partition: iid, dirichlet:ALPHA (skewed labels) or natural:COLUMN (one client a value, of
            those with most rows; the other values' rows are left out; natural:file is one client
            a file of a folder).
        clients: how many clients there are.
        per_round: how many train in a round.
        rank: R, rank of the shared adapter.
        alpha: LoRA's alpha; the adapter is scaled by alpha / rank.
        rslora: scale by alpha / √rank instead.
        lora_dropout: dropout on the adapter's input.
        target_modules: layers to adapt, by the end of their names, comma-separated, or all-linear.
        ratios: sketch ratios S/R of the capacity classes, comma-separated, such as 1/8,1/4,1/2;
            clients are dealt to the classes evenly, unless --devices has ratios of its own.
        strategy: fslora; hetlora, flexlora, flora or fed-plora, which also give each client the
            ranks of its ratio; fedit, ffa-lora, rolora or fedex-lora, all clients at rank R;
            fedit-min or fedit-max, all at the lowest or highest ratio; or as references zero-shot
            (nobody trains), head-only (classification; no adapter travels), centralised (one
            client with all the data) or local-only (nothing is averaged).
        forward: of fslora: sketched (a client computes with its sketch alone, scaled by R/S) or
            full (with the whole adapter, of which its sketch trains; it downloads all R ranks).
        averaging: of fslora: by participants, by the count of those who trained a rank, or by the
            inverse probability of its being drawn, R/S (needs --forward full).
        sampler: of fslora, how the sketches of a round go together: uniform (independent),
            balanced (all ranks equally often), nested (smaller in larger), class-shared (one
            sketch for each ratio) or importance (large ranks more often; needs --forward full
            --averaging inverse, or the paper's forward and averaging).
        redraw: of fslora: a client draws its sketch once a round, or anew in every local step; it
            then receives, keeps and returns all ranks that any step trains.
        depth: of fslora: all, or from the top only so many layers as are drawn for each client and
            round, the others staying as they are: uniform (any number alike) or by-ratio (up to
            the client's ratio of the layers, seldom more); both need --forward full --averaging
            inverse. top:K trains the top K layers and never the others: biased.
        depth_min_probability: how often a layer is trained at least, where depth is drawn.
        rounds: how many rounds.
        local_steps: H, optimizer steps of a client in a round.
        batch_size: examples in a batch.
        accumulation: batches in an optimizer step.
        max_length: tokens in an example.
        optimizer: the clients' optimizer.
        lr: the clients' learning rate.
        momentum: of sgd.
        weight_decay: of the clients' optimizer.
        clip_norm: clip the clients' gradient norm to this; 0 does not clip.
        server_opt: fedavg (plain averaging), fedavgm, fedadam, fedadamw or fedyogi.
        server_lr: the server's learning rate; 1 is plain averaging with fedavg.
        seed: of everything random.
        device: cpu, cuda, cuda:0 …, or auto.
        dtype: of the base model; the adapter is always float32.
        implementation: of the fused layer: auto, torch or triton.
        recompute: save memory, for a little time: what is behind RMSNorm and SwiGLU is not kept.
        threads: CPU threads of a matrix product; 0 leaves torch's choice; 1 on shared cores.
        layers: keep only the base model's first layers, which the adapter is for; 0 keeps all.
        eval_every: evaluate every n-th round (and the last); local-only is evaluated at the end.
        eval_sketched: evaluate fslora under the cohort's sketches too, in more than twice the time.
        eval_examples: evaluate on at most so many examples, evenly spread; 0 takes all.
        devices: what clients run on, for simulated seconds: COMPUTE:NETWORK=SHARE,… such as
            phone:poor=0.5,laptop:median=0.3,gpu:5g=0.2 (budget-phone, phone, laptop, gpu,
            datacentre; poor, median, 5g, silo), or a TOML file with a [[device]] table for each
            class; empty for no clock.
        device_order: by-ratio (slower devices to the clients of smaller ratios) or random.
        deadline: simulated seconds after which a round takes no more answers; 0 waits for all.
        over_select: choose so many times per_round clients, and take the first per_round answers.
        faults: what goes wrong with clients on purpose, and with what probability in a round, such
            as crash=0.05,nan=0.02,oom=0.1 (out of memory),slow=0.1 (needs --devices).
        max_norm: refuse an update whose norm, over all it changes, is above this; 0 does not.
        quarantine: ask a client no more after so many refused updates; 0 asks for ever.
        robust: what is averaged, against hostile clients: none (the updates), clip (each clipped
            to a norm), or after that in each rank the median or trimmed mean of its trainers.
        robust_clip: that norm; 0 takes the median of the round's norms.
        trim: share of a rank's contributors that trimmed cuts off at each end.
        min_coverage: how many clients must have trained a rank for median and trimmed to move it.
        attack: what hostile clients do: none, sign-flip, scale or noise (of --attack-strength),
            wrong-ranks (their rows under other ranks) or label-flip (classification).
        attackers: share of hostile clients, under --attack.
        attack_strength: how many times as large as an honest update.
        dp_clip: clip every client's whole update to this norm, for --dp-noise; 0 is no privacy.
        dp_noise: differential privacy of clients: standard deviation of the noise on the sum of a
            round's updates, in units of --dp-clip.
        dp_delta: δ that the ε in the records is for; choose less than 1 / clients.
        targets: what to report the cost of reaching: comma-separated scores such as 0.6,0.7, and
            losses as loss:2.5.
        out: run folder.
        resume: continue the run in the run folder.
    """

    model: str = ""
    data: str = ""
    eval_data: str = ""
    train_rows: int = 0
    validation: bool = False
    task: Literal["causal-lm", "classification", "instruction"] = "causal-lm"
    text_column: str = "text"
    label_column: str = "label"
    prompt_columns: str = "instruction"
    response_column: str = "response"
    header: bool = True
    reader: Literal["auto", "play"] = "auto"
    metric: Literal["accuracy", "f1", "mcc"] = "accuracy"
    partition: str = "iid"
    clients: int = 20
    per_round: int = 10
    rank: int = 16
    alpha: float = 16.0
    rslora: bool = False
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"
    ratios: str = _RATIOS
    strategy: Literal[
        "fslora",
        "fedit",
        "fedit-min",
        "fedit-max",
        "hetlora",
        "flexlora",
        "flora",
        "ffa-lora",
        "rolora",
        "fedex-lora",
        "fed-plora",
        "zero-shot",
        "head-only",
        "centralised",
        "local-only",
    ] = "fslora"
    forward: Forward = "sketched"
    averaging: Averaging = "participants"
    sampler: Sampler = "uniform"
    redraw: Redraw = "round"
    depth: str = "all"
    depth_min_probability: float = 0.1
    rounds: int = 10
    local_steps: int = 10
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    server_opt: Literal["fedavg", "fedavgm", "fedadam", "fedadamw", "fedyogi"] = "fedavg"
    server_lr: float = 1.0
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    implementation: Literal["auto", "torch", "triton"] = "auto"
    recompute: bool = False
    threads: int = 0
    layers: int = 0
    eval_every: int = 1
    eval_sketched: bool = True
    eval_examples: int = 0
    devices: str = ""
    device_order: Literal["by-ratio", "random"] = "by-ratio"
    deadline: float = 0.0
    over_select: float = 1.0
    faults: str = ""
    max_norm: float = 0.0
    quarantine: int = 0
    robust: Robust = "none"
    robust_clip: float = 0.0
    trim: float = 0.25
    min_coverage: int = 3
    attack: Attack = "none"
    attackers: float = 0.2
    attack_strength: float = 10.0
    dp_clip: float = 0.0
    dp_noise: float = 0.0
    dp_delta: float = 1e-5
    targets: str = ""
    out: str = "runs/last"
    resume: bool = False

    def __post_init__(self) -> None:
        """Refuse values that cannot work, each by its flag."""
        check_choices(self)
        for name in ("model", "out"):  # of --out=~/runs no shell makes a folder
            if (value := getattr(self, name)).startswith("~"):
                object.__setattr__(self, name, expanduser(value))
        if not self.model:
            raise ValueError("name a model: --model ID or FOLDER, or try --preset demo")
        if not self.data:
            raise ValueError("name the data: --data texts.jsonl, or try --preset demo")
        if not self.out:
            raise ValueError("name a run folder: --out runs/last")
        self._check_numbers()
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora-dropout must be in [0, 1), got {self.lora_dropout}")
        if self.per_round > self.clients:
            raise ValueError(
                f"--per-round {self.per_round} asks for more clients a round than the "
                f"{self.clients} there are; lower it or raise --clients"
            )
        for ratio in self.ratio_values:
            if not 0 < ratio <= 1:
                raise ValueError(f"--ratios must be in (0, 1], got {ratio:g}")
        check_options(**{name: getattr(self, name) for name in FSLORA_OPTIONS})
        self._check_clock()
        self._check_trust()
        check_needs(self)

    def _check_numbers(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{flag(name)} must be a finite number, got {value}")
        for name, low in _LOWEST.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{flag(name)} must be at least {low}, got {getattr(self, name)}")
        for name in ("alpha", "lr", "server_lr", "over_select"):
            if not 0 < (own := getattr(self, name)) <= _MOST:
                raise ValueError(f"{flag(name)} must be positive and at most {_MOST:g}, got {own}")

    def _check_clock(self) -> None:
        if not self.devices and (self.deadline or self.over_select != 1):
            raise ValueError("--deadline and --over-select need a clock: give --devices")
        if self.cohort_size > self.clients:
            raise ValueError(
                f"--over-select {self.over_select:g} of {self.per_round} asks {self.cohort_size} "
                f"clients a round, and there are {self.clients}; lower it or raise --clients"
            )
        if self.fault_values.slow and not self.devices:
            raise ValueError("--faults slow needs a clock: give --devices")
        _ = self.target_values  # refuse what cannot be read before anything is loaded
        if self.fleet and self.devices.endswith(".toml"):  # the file may change from run to run
            object.__setattr__(self, "devices", json.dumps(self.fleet.to_json()))
        listed = ",".join(map(str, self.ratio_values))
        if self.ratios not in (listed, _RATIOS) and self.fleet and any(self.fleet.ratios):
            raise ValueError(
                f"the devices have ratios of their own, {listed}: leave out --ratios {self.ratios}"
            )

    def _check_trust(self) -> None:
        check_trust(
            strategy=self.strategy,
            task=self.task,
            per_round=self.per_round,
            averaging=self.averaging,
            sampler=self.sampler,
            over_select=self.over_select,
            limits=Limits(self.max_norm, self.quarantine),
            rule=self.rule,
            threat=self.threat,
            privacy=self.privacy(self.clients),
        )

    @property
    def rule(self) -> Rule:
        """The robust rule."""
        return Rule(self.robust, self.robust_clip, self.trim, self.min_coverage)

    @property
    def threat(self) -> Threat:
        """The simulated attack."""
        return Threat(self.attack, self.attackers, self.attack_strength)

    def privacy(self, clients: int) -> Privacy | None:
        """The parameters of differential privacy among so many clients, None without."""
        if not (self.dp_clip or self.dp_noise):
            return None
        if not self.dp_noise:
            raise ValueError("--dp-clip is for --dp-noise; without noise use --robust clip")
        return Privacy(self.dp_clip, self.dp_noise, self.cohort_size, clients, self.dp_delta)

    @property
    def ratio_values(self) -> tuple[float, ...]:
        """The sketch ratios as numbers; the devices' own where they have some."""
        if self.fleet is not None and any(self.fleet.ratios):
            return self.fleet.ratios
        try:
            return tuple(float(Fraction(part.strip())) for part in self.ratios.split(","))
        except (ValueError, ArithmeticError):
            raise ValueError(
                f"--ratios {self.ratios!r} is not a list of numbers such as 1/8,1/4,0.5"
            ) from None

    @property
    def mean_coverage(self) -> float:
        """The share of the ranks that a client with a sketch trains in a round, on average."""
        draws = self.local_steps if self.redraw == "step" else 1
        trained = [1 - (1 - ratio) ** draws for ratio in self.ratio_values]
        if self.fleet is not None and any(self.fleet.ratios):
            return fmean(trained, [device.share for device in self.fleet.devices])
        return fmean(trained)

    @property
    def fleet(self) -> Fleet | None:
        """The devices, None where there is no clock."""
        return read_fleet(self.devices) if self.devices else None

    @property
    def fault_values(self) -> Faults:
        """The faults as probabilities."""
        return read_faults(self.faults)

    @property
    def strategy_options(self) -> dict[str, Any]:
        """What the strategy takes beside what all take."""
        names = {"fslora": (*FSLORA_OPTIONS, "per_round"), "centralised": ("per_round",)}
        return {name: getattr(self, name) for name in names.get(self.strategy, ())}

    @property
    def cohort_size(self) -> int:
        """How many clients are chosen for a round."""
        return math.ceil(round(self.per_round * self.over_select, 6))

    @property
    def target_values(self) -> tuple[Target, ...]:
        """The targets as figures of an evaluation and their values."""
        targets = []
        for part in self.column_names("targets"):
            figure, _, text = part.rpartition(":")
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if figure not in ("", "loss") or not math.isfinite(value):
                raise ValueError(
                    f"--targets {part!r} is neither a score such as 0.7 nor a loss such as loss:2.5"
                )
            targets.append(Target(figure or "metric", value))
        return tuple(targets)

    def column_names(self, name: str) -> tuple[str, ...]:
        """Split a comma-separated field."""
        return tuple(part.strip() for part in str(getattr(self, name)).split(",") if part.strip())

    def to_json(self) -> dict[str, object]:
        """Return the config with its lists as lists, as ``config.json`` holds it."""
        values: dict[str, object] = asdict(self) | {n: list(self.column_names(n)) for n in LISTS}
        # Whole, so that the run folder says what was simulated when a file or a built-in changes.
        values["devices"] = self.fleet.to_json() if self.fleet else ""
        return {**values, "ratios": list(self.ratio_values)}
