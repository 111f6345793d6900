"""One simulated run from its config: load, train round by round, keep everything, sum up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from fslora import checkpoint, evaluation
from fslora.client import LocalTrainer
from fslora.clock import Clock, check_memory, deal_devices, step_counter
from fslora.config import SimulateConfig, continued, merged, read_settings
from fslora.data.causal_lm import CausalLM
from fslora.data.classification import Classification
from fslora.data.federated import FederatedData, fingerprints, load_federated, validation_split
from fslora.data.instruction import Instruction
from fslora.data.rows import read_rows
from fslora.data.tasks import Examples, Task, pad_id, pooled
from fslora.engines import sequential
from fslora.models import load_model, load_tokenizer, put_state, take_state
from fslora.protocol import POOLED, LocalRule, ServerState, Strategy
from fslora.server import ClientRecord, RoundRecord, rounds
from fslora.strategies import STRATEGIES
from fslora.summary import summarise
from fslora_kernels.sampling import sketch_size
from fslora_kernels.seeds import fold_in


@dataclass(frozen=True, slots=True)
class Watcher:
    """What wants to know how a run goes.

    Attributes:
        on_start: called once, with the rounds already done.
        on_client: called after each client.
        on_round: called after each round, with its record.
    """

    on_start: Callable[[int], None] = lambda _: None
    on_client: Callable[[ClientRecord], None] = lambda _: None
    on_round: Callable[[RoundRecord], None] = lambda _: None


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


def deal_ratios(config: SimulateConfig, clients: int) -> dict[int, float]:
    """Deal clients to the capacity classes evenly, in an order drawn from the seed.

    Returns:
        Client position to the ratio S/R that its whole number of ranks really is.
    """
    order = np.random.default_rng(fold_in(config.seed, "ratios")).permutation(clients)
    ratios = [sketch_size(config.rank, ratio) / config.rank for ratio in config.ratio_values]
    return {int(client): ratios[place % len(ratios)] for place, client in enumerate(order)}


def prepare(config: SimulateConfig) -> Run:
    """Load data and model.

    Raises:
        ValueError: anything about the config, the data or the model that cannot work.
        FileNotFoundError: a file that is not there.
        NotImplementedError: the implementation cannot run on the device.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    task = make_task(config)
    rows = read_rows(config.data, reader=config.reader, header=config.header)
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
    if config.validation:
        data = validation_split(data, task, fold_in(config.seed, "validation"))
    examples, groups = evaluation.evenly(
        data.evaluation, data.evaluation_groups, config.eval_examples
    )
    data = replace(data, evaluation=examples, evaluation_groups=groups)
    model = load_model(config, data.labels, pad_id(tokenizer))
    if config.fleet is not None:
        check_memory(config.fleet, model)
    ratio_of = deal_ratios(config, len(data.names))
    named = {data.names[client]: ratio for client, ratio in ratio_of.items()}
    strategy = make_strategy(config, named)
    return Run(config, Path(config.out), model, data, task, strategy, ratio_of)


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


def simulate(config: SimulateConfig, watcher: Watcher | None = None) -> dict[str, Any]:
    """Run a simulation, or continue one, and return what ``summary.json`` holds.

    Args:
        config: the run.
        watcher: told how it goes.

    Raises:
        ValueError: the config, data, model or run folder cannot work; names the remedy.
        FileNotFoundError: a file that is not there.
        NotImplementedError: the implementation cannot run on the device.
        NoUsableUpdateError: no client of a round could be used; the rounds before are kept.
    """
    watcher = watcher or Watcher()
    config = checked_folder(config)
    run = prepare(config)
    start = perf_counter()
    with checkpoint.explained_io_errors(run.folder, 0):
        settings = replace(config, resume=False).to_json()
        checkpoint.write_json(run.folder / "config.json", settings)
        state = _first_state(run)
    watcher.on_start(state.round)
    trainer = LocalTrainer(run.model, run.task, _examples_of(run))
    steps = rounds(
        state,
        run.strategy,
        sequential,
        trainer,
        run.data.names,
        per_round=config.cohort_size,
        until=config.rounds,
        on_client=watcher.on_client,
        clock=make_clock(run, trainer),
        sim_seconds=checkpoint.read_records(run.folder)[-1].get("sim_seconds_total") or 0.0,
    )
    try:
        for new_state, bare in steps:
            record = _evaluated(run, new_state, bare)
            with checkpoint.explained_io_errors(run.folder, state.round):
                checkpoint.append_record(run.folder, record.to_json())
                checkpoint.save_state(run.folder, new_state)
            state = new_state
            watcher.on_round(record)
    except BaseException:
        with suppress(ValueError):  # the error that stopped the run says more
            _write_adapter(run, state)
        raise
    _write_adapter(run, state)
    records = checkpoint.read_records(run.folder)
    device = str(next(run.model.parameters()).device)
    summary = summarise(config, state, run.ratio_of, records, perf_counter() - start, device)
    summary["split"] = fingerprints(run.data)
    with checkpoint.explained_io_errors(run.folder, state.round):
        checkpoint.write_json(run.folder / "summary.json", summary)
    return summary


def make_clock(run: Run, trainer: LocalTrainer) -> Clock | None:
    """Build the clock of a run's devices, None where it has none.

    Args:
        run: the run.
        trainer: what its clients do, for counting operations.
    """
    config = run.config
    if config.fleet is None:
        return None
    ratio_of = {run.data.names[client]: ratio for client, ratio in run.ratio_of.items()}
    by_ratio = config.device_order == "by-ratio"
    return Clock(
        seed=config.seed,
        device_of=deal_devices(config.fleet, ratio_of, config.seed, by_ratio=by_ratio),
        step_flops=step_counter(trainer, run.data.evaluation),
        per_round=config.per_round,
        deadline=config.deadline,
    )


def checked_folder(config: SimulateConfig) -> SimulateConfig:
    """Check that the run folder is free, or that the run in it can be continued as asked.

    Returns:
        The config to go on with.

    Raises:
        ValueError: it holds a run and ``resume`` is off, or the other way round, or the settings
            differ.
    """
    settings = Path(config.out) / "config.json"
    if config.resume:
        if not settings.is_file():
            raise ValueError(f"{config.out} holds no run to resume; leave out --resume")
        saved = SimulateConfig(**merged(None, read_settings(settings), str(settings)))
        return continued(saved, config)
    if settings.is_file():
        raise ValueError(
            f"{config.out} already holds a run; go on with it by --resume, or choose another --out"
        )
    return config


def _examples_of(run: Run) -> dict[str, Examples]:
    """Client id to its examples; those of all under ``POOLED`` where a strategy asks for it."""
    examples = dict(zip(run.data.names, run.data.clients, strict=True))
    if run.config.strategy == "centralised":
        examples[POOLED] = pooled(run.data.clients)
    return examples


def _write_adapter(run: Run, state: ServerState) -> None:
    """Write the global adapter as a PEFT checkpoint, with what the base weights have gained."""
    put_state(run.model, state.adapters, state.extras)

    def write(folder: str) -> None:
        run.model.save_pretrained(folder)
        checkpoint.save_residual(Path(folder), state.base_residual)

    with checkpoint.explained_io_errors(run.folder, state.round):
        checkpoint.replace_folder(run.folder / "adapter", write)


def _first_state(run: Run) -> ServerState:
    """The state to begin with: from the checkpoint, or fresh and evaluated once."""
    if run.config.resume and (run.folder / checkpoint.STATE_FILE).is_file():
        state = checkpoint.load_state(run.folder)
        checkpoint.cut_records(run.folder, state.round)
        return state
    state = run.strategy.init(*take_state(run.model), run.config.seed)
    checkpoint.cut_records(run.folder, -1)
    beginning = 0.0 if run.config.devices else None
    bare = RoundRecord(round=0, sim_seconds=beginning, sim_seconds_total=beginning)
    checkpoint.append_record(run.folder, _evaluated(run, state, bare).to_json())
    checkpoint.save_state(run.folder, state)
    return state


def _evaluated(run: Run, state: ServerState, record: RoundRecord) -> RoundRecord:
    """Add the evaluation to a round's record, in the rounds where it is due."""
    states = run.strategy.evaluated(state)
    record = replace(record, effective_rank=round(evaluation.effective_rank(states), 6))
    first_or_last = state.round in (0, run.config.rounds)
    if state.round % run.config.eval_every and not first_or_last:
        return record
    examples, size = run.data.evaluation, run.config.batch_size * 4
    whole = evaluation.evaluate_mean(run.model, states, run.task, examples, size)
    sketched = None
    # No other strategy's clients minimise this loss.
    if run.config.strategy == "fslora" and run.config.forward == "sketched":
        sketched = evaluation.evaluate_sketched(
            run.model, state, run.task, examples, size, run.config.ratio_values
        )
    by_ratio = {}
    if first_or_last:
        by_ratio = evaluation.evaluate_by_ratio(
            run.model, states, run.task, examples, run.data.evaluation_groups, size, run.ratio_of
        )
    return replace(
        record,
        eval_loss=whole.loss,
        eval_metric=whole.metric,
        eval_loss_sketched=sketched,
        eval_loss_by_ratio=by_ratio,
    )
