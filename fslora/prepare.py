"""From a config to everything that a run needs: data, model, strategy, clock."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from fslora import evaluation
from fslora.attacks import draw_attackers, hostile, poisoned
from fslora.client import LocalTrainer
from fslora.clock import Clock, check_memory, deal_devices, step_counter
from fslora.config import SimulateConfig
from fslora.data.causal_lm import CausalLM
from fslora.data.classification import Classification
from fslora.data.federated import FederatedData, load_federated, validation_split
from fslora.data.instruction import Instruction
from fslora.data.lazy import NamedExamples
from fslora.data.rows import read_rows
from fslora.data.tasks import Examples, Task, pad_id, pooled
from fslora.devices import Device, Fleet
from fslora.fitness import check_token, check_token_types
from fslora.guard import Guarded
from fslora.models import load_model, load_tokenizer
from fslora.privacy import private
from fslora.protocol import POOLED, ClientFn, LocalRule, Strategy
from fslora.robust import defended
from fslora.strategies import STRATEGIES
from fslora.trust import Limits
from fslora_kernels.sampling import sketch_size
from fslora_kernels.seeds import fold_in


@dataclass(frozen=True, slots=True)
class Run:
    """Everything of a run that does not change from round to round.

    Attributes:
        config: its settings.
        folder: where it is kept.
        model: fused.
        data: its evaluation already limited to ``eval_examples``.
        task: the loss and the metric.
        strategy: the federated algorithm.
        ratio_of: client position to sketch ratio.
    """

    config: SimulateConfig
    folder: Path
    model: PeftModel
    data: FederatedData
    task: Task
    strategy: Strategy
    ratio_of: dict[int, float]

    @property
    def ratio_of_id(self) -> dict[str, float]:
        """Client id to sketch ratio."""
        return {self.data.names[client]: ratio for client, ratio in self.ratio_of.items()}


def make_task(config: SimulateConfig) -> Task:
    """Build the task that a config names."""
    if config.task == "causal-lm":
        return CausalLM(config.column_names("text_column"), config.max_length)
    if config.task == "classification":
        return Classification(
            config.column_names("text_column"),
            config.label_column,
            config.max_length,
            config.metric,
        )
    return Instruction(
        config.column_names("prompt_columns"), config.response_column, config.max_length
    )


def deal_ratios(config: SimulateConfig, names: Sequence[str]) -> dict[int, float]:
    """Deal clients to the capacity classes evenly, in an order drawn from the seed.

    Where the devices have ratios of their own, each client has its device's.

    Returns:
        Client position to the ratio S/R that its whole number of ranks really is.
    """
    if config.fleet is not None and any(config.fleet.ratios):
        device_of = dealt_devices(config, config.fleet, dict.fromkeys(names, 1.0))
        own = [device_of[name].ratio for name in names]
        return {n: sketch_size(config.rank, ratio) / config.rank for n, ratio in enumerate(own)}
    order = np.random.default_rng(fold_in(config.seed, "ratios")).permutation(len(names))
    ratios = [sketch_size(config.rank, ratio) / config.rank for ratio in config.ratio_values]
    return {int(client): ratios[place % len(ratios)] for place, client in enumerate(order)}


def dealt_devices(
    config: SimulateConfig, fleet: Fleet, ratio_of: Mapping[str, float]
) -> dict[str, Device]:
    """Deal a fleet to clients; one with ratios of its own as to clients that are all alike."""
    alike = dict.fromkeys(ratio_of, 1.0) if any(fleet.ratios) else ratio_of
    by_ratio = config.device_order == "by-ratio"
    return deal_devices(fleet, alike, config.seed, by_ratio=by_ratio)


def prepare(config: SimulateConfig) -> Run:
    """Load data and model.

    Raises:
        ValueError: anything about the config, the data or the model that cannot work.
        FileNotFoundError: a file that is not there.
        NotImplementedError: the implementation cannot run on the device.
    """
    check_strategy(config)  # known before anything is loaded
    if config.threads:
        torch.set_num_threads(config.threads)
    task = make_task(config)
    rows = read_rows(config.data, reader=config.reader, header=config.header)
    if config.train_rows and len(rows) == 1:
        raise ValueError(
            f"--train-rows {config.train_rows} would deal the whole of a single text, which is one "
            "row; cut the file, or leave it out"
        )
    if 0 < config.train_rows < len(rows):
        places = np.linspace(0, len(rows) - 1, config.train_rows).round().astype(int)
        rows = [rows[place] for place in places]
    evaluation_rows = None
    if config.eval_data:
        evaluation_rows = read_rows(
            config.eval_data, reader=config.reader, header=config.header, split="test"
        )
    tokenizer = load_tokenizer(config)
    data = load_federated(
        rows,
        task,
        tokenizer,
        scheme=config.partition,
        clients=config.clients,
        key=fold_in(config.seed, "partition"),
        evaluation_rows=evaluation_rows,
        label_column=config.label_column,
    )
    if POOLED in data.names:
        raise ValueError(
            f"a client of {config.data} is called {POOLED!r}, which is kept for the one that has "
            "everybody's data: write the name in another way"
        )
    draw_attackers(config.threat, data.names, config.seed)  # a share that is nobody is refused
    if config.validation:
        key = fold_in(config.seed, "validation")
        data = validation_split(data, task, pad_id(tokenizer), key)
    examples, groups = evaluation.evenly(
        data.evaluation, data.evaluation_groups, config.eval_examples
    )
    data = replace(data, evaluation=examples, evaluation_groups=groups)
    model = load_model(config, data.labels, pad_id(tokenizer), _highest_id(data.evaluation))
    check_token_types(config, data.evaluation, model.config)
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:  # else every token is known, and clients wait to be tokenised
        for own in data.clients:
            check_token(config, _highest_id(own), known)
    if config.fleet is not None:
        check_memory(config.fleet, model)
    ratio_of = deal_ratios(config, data.names)
    named = {data.names[client]: ratio for client, ratio in ratio_of.items()}
    strategy = trusting(config, make_strategy(config, named), len(data.names))
    return Run(config, Path(config.out), model, data, task, strategy, ratio_of)


def _highest_id(examples: Examples) -> int:
    return int(examples.tensors["input_ids"].max())


def make_strategy(config: SimulateConfig, ratio_of: Mapping[str, float]) -> Strategy:
    """Build the strategy that a config names.

    Args:
        config: the run.
        ratio_of: client id to sketch ratio.

    Raises:
        ValueError: a setting that the strategy does not know.
    """
    return STRATEGIES[config.strategy](
        ratio_of,
        LocalRule(
            optimizer=config.optimizer,
            lr=config.lr,
            steps=config.local_steps,
            batch_size=config.batch_size,
            accumulation=config.accumulation,
            clip_norm=config.clip_norm,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        ),
        server_optimizer=config.server_opt,
        server_lr=config.server_lr,
        **config.strategy_options,
    )


def check_strategy(config: SimulateConfig) -> None:
    """Build a config's strategy for as many clients as it names, to see whether it can be.

    Raises:
        ValueError: as ``make_strategy``.
    """
    names = [str(client) for client in range(config.clients)]
    ratios = deal_ratios(config, names)
    with warnings.catch_warnings(action="ignore"):  # they come when it is built to be used
        make_strategy(config, {names[client]: ratio for client, ratio in ratios.items()})


def trusting(config: SimulateConfig, strategy: Strategy, clients: int) -> Strategy:
    """Put a config's robust rule or privacy into a strategy's aggregation."""
    privacy = config.privacy(clients)
    if privacy is not None:
        return private(strategy, privacy, config.server_opt, config.server_lr)
    return defended(strategy, config.rule)


def attackers_of(run: Run) -> frozenset[str]:
    """The ids of the hostile clients."""
    return draw_attackers(run.config.threat, run.data.names, run.config.seed)


@dataclass(frozen=True, slots=True, eq=False)  # a mapping knows when it is equal
class _Sizes(Mapping[str, int]):
    """How many examples everybody has, looked at when it is asked for."""

    examples: Mapping[str, Examples]

    def __getitem__(self, client: str) -> int:
        return len(self.examples[client])

    def __iter__(self) -> Iterator[str]:
        return iter(self.examples)

    def __len__(self) -> int:
        return len(self.examples)


def limits_of(run: Run) -> Limits:
    """What the server puts up with; it knows how many examples everybody has."""
    sizes = _Sizes(NamedExamples(run.data.names, run.data.clients))
    return Limits(run.config.max_norm, run.config.quarantine, sizes)


def make_client(run: Run, trainer: LocalTrainer) -> ClientFn:
    """The clients of a run, those that fail and those that are hostile among them."""
    client = Guarded(trainer, run.config.seed, run.config.fault_values)
    return hostile(run.config.threat, client, attackers_of(run))


def examples_of(run: Run) -> Mapping[str, Examples]:
    """Client id to its examples; for centralised training those of all, under ``POOLED``."""
    named = NamedExamples(run.data.names, run.data.clients)
    examples = poisoned(run.config.threat, named, attackers_of(run), len(run.data.labels))
    if run.config.strategy == "centralised":
        # Causal models may name no padding, and need none: it is masked.
        filler = getattr(run.model.config, "pad_token_id", None) or 0
        return {POOLED: pooled(list(examples.values()), filler)}
    return examples


def make_clock(run: Run, trainer: LocalTrainer) -> Clock | None:
    """Build the clock of a run's devices, None where it has none.

    Args:
        run: the run.
        trainer: what its clients do, for counting operations.
    """
    config = run.config
    if config.fleet is None:
        return None
    return Clock(
        seed=config.seed,
        device_of=dealt_devices(config, config.fleet, run.ratio_of_id),
        step_flops=step_counter(trainer, run.data.evaluation),
        per_round=config.per_round,
        deadline=config.deadline,
        slow=config.fault_values.slow,
        crash=config.fault_values.crash,
    )
