"""One simulated run from its config: load, train round by round, keep everything, sum up."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fslora import checkpoint, disk, evaluation
from fslora.client import LocalTrainer
from fslora.config import SimulateConfig
from fslora.data.federated import fingerprints, sizes
from fslora.engines import sequential
from fslora.export import save_adapter
from fslora.models import model_source, take_state
from fslora.prepare import Run, examples_of, limits_of, make_client, make_clock, prepare
from fslora.privacy import epsilon
from fslora.protocol import ServerState
from fslora.records import ClientRecord, RoundRecord
from fslora.server import DivergedError, rounds
from fslora.settings import continued, merged, read_settings, why_taken
from fslora.summary import summarise

# What an extended run would contradict.
_OF_THE_END = ("summary.json", "report.html")
# Settings whose files may lie elsewhere on resume, and what of a run's source is of them.
LOCATED = {"data": "clients", "eval_data": "evaluation", "model": "model"}
# What a new run would replace.
_OF_A_RUN = ("rounds.jsonl", "checkpoint", "adapter", *_OF_THE_END)


@dataclass(frozen=True, slots=True)
class Watcher:
    """What wants to know how a run goes.

    Attributes:
        on_start: called once, with the rounds already done and the bytes that they moved.
        on_client: called after each client.
        on_round: called after each round, with its record.
        on_data: called once, with the sizes that ``data.federated.sizes`` returns.
        on_judging: called before a new run's model is judged, data and model being there.
    """

    on_start: Callable[[int, int], None] = lambda *_: None
    on_client: Callable[[ClientRecord], None] = lambda _: None
    on_round: Callable[[RoundRecord], None] = lambda _: None
    on_data: Callable[[dict[str, int]], None] = lambda _: None
    on_judging: Callable[[], None] = lambda: None


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
        DivergedError: the evaluation loss is no number any more; likewise.
    """
    watcher, folder = watcher or Watcher(), Path(config.out)
    checked_folder(config, content_checked=True)  # before a folder is made
    made, threads = not folder.exists(), torch.get_num_threads()
    with disk.locked(folder, checkpoint.newest_round):
        try:
            # Again: another process may have begun a run in it, or got further.
            return _simulate(checked_folder(config, content_checked=True), watcher)
        finally:
            torch.set_num_threads(threads)  # of --threads nothing is left to the caller
            with suppress(OSError):
                if made and all(path.name.startswith(disk.LOCK_FILE) for path in folder.iterdir()):
                    shutil.rmtree(folder)  # nothing came of it


def _simulate(config: SimulateConfig, watcher: Watcher) -> dict[str, Any]:
    run = prepare(config)
    _check_source(run)
    watcher.on_data(sizes(run.data))
    with disk.explained_errors(run.folder, checkpoint.newest_round):
        state = checkpoint.resume(run.folder) if config.resume else None
        if checkpoint.rounds_done(run.folder) < config.rounds:
            for name in _OF_THE_END:
                (run.folder / name).unlink(missing_ok=True)
        settings = replace(config, resume=False).to_json()
        disk.write_json(run.folder / "config.json", settings)
        if state is None:
            checkpoint.cut_records(run.folder, -1)
    if state is None:
        state = _first_state(run, watcher.on_judging)
    records = checkpoint.read_records(run.folder)
    watcher.on_start(state.round, sum(row["bytes_up"] + row["bytes_down"] for row in records))
    trainer = LocalTrainer(run.model, run.task, examples_of(run))
    steps = rounds(
        state,
        run.strategy,
        sequential,
        make_client(run, trainer),
        run.data.names,
        per_round=config.cohort_size,
        until=config.rounds,
        on_client=watcher.on_client,
        clock=make_clock(run, trainer),
        limits=limits_of(run),
        sim_seconds=records[-1].get("sim_seconds_total") or 0.0,
    )
    try:
        for new_state, bare in steps:
            record = _evaluated(run, new_state, bare)
            _keep(run.folder, new_state, record.to_json())
            state = new_state
            watcher.on_round(record)
    except BaseException:
        with suppress(ValueError):  # the error that stopped the run says more
            _write_adapter(run, state)
        raise
    _write_adapter(run, state)
    records = checkpoint.read_records(run.folder)
    summary = summarise(config, state, run.ratio_of_id, records, run.model)
    summary |= {"split": fingerprints(run.data), "data": sizes(run.data)}
    with disk.explained_errors(run.folder, checkpoint.newest_round):
        disk.write_json(run.folder / "summary.json", summary)
    return summary


def checked_folder(config: SimulateConfig, *, content_checked: bool = False) -> SimulateConfig:
    """Check that the run folder is free, or that the run in it can be continued as asked.

    Args:
        config: what is asked for.
        content_checked: whether the caller compares the content of data and model, so that their
            files may lie elsewhere than before.

    Returns:
        The config to go on with.

    Raises:
        ValueError: it holds a run and ``resume`` is off, or the other way round, or the settings
            differ, or it holds what a run would replace and nothing says whose that is.
    """
    folder, settings = Path(config.out), Path(config.out) / "config.json"
    if not settings.is_file() and (there := [n for n in _OF_A_RUN if (folder / n).exists()]):
        raise ValueError(
            f"{config.out} has {' and '.join(there)} and no config.json to say of which run; "
            "choose another --out, or put config.json back from a copy"
        )
    if config.resume:
        if not settings.is_file():
            raise ValueError(f"{config.out} holds no run to resume; leave out --resume")
        saved = SimulateConfig(**merged(None, read_settings(settings), str(settings)))
        known = checkpoint.source(folder) if content_checked else {}
        return continued(saved, config, [name for name, part in LOCATED.items() if part in known])
    if settings.is_file():
        raise ValueError(why_taken(settings, config))
    return config


def _write_adapter(run: Run, state: ServerState) -> None:
    """Write the global adapter as a PEFT checkpoint, where all clients have one model."""
    if run.config.strategy == "local-only":
        return
    with disk.explained_errors(run.folder, checkpoint.newest_round):
        disk.replace_folder(
            run.folder / "adapter", lambda folder: save_adapter(run.model, state, Path(folder))
        )


def _check_source(run: Run) -> None:
    """Refuse to go on with other data or another model, wherever they lie.

    Runs from before this was recorded go on unchecked.
    """
    before = checkpoint.source(run.folder)
    now = _source(run) if before else {}
    changed = [part for part in before if before[part] != now.get(part)]
    if changed:
        raise ValueError(
            f"the run in {run.folder} was started with other files ({' and '.join(changed)}): put "
            "those of --data, --eval-data and --model back, or start a new run with another --out"
        )


def _source(run: Run) -> dict[str, str]:
    """Digests of what a run is made from: the rows of its clients and evaluation, the model."""
    return run.data.source | model_source(run.config)


def _first_state(run: Run, on_judging: Callable[[], None]) -> ServerState:
    """The state to begin with, evaluated once."""
    state = run.strategy.init(*take_state(run.model), run.config.seed)
    beginning = 0.0 if run.config.devices else None
    bare = RoundRecord(round=0, sim_seconds=beginning, sim_seconds_total=beginning)
    on_judging()
    record = _evaluated(run, state, bare).to_json() | {"source": _source(run)}
    _keep(run.folder, state, record)
    return state


def _keep(folder: Path, state: ServerState, record: dict[str, object]) -> None:
    with disk.explained_errors(folder, checkpoint.newest_round):
        checkpoint.append_record(folder, record)
        checkpoint.save_state(folder, state)


def _evaluated(run: Run, state: ServerState, record: RoundRecord) -> RoundRecord:
    """Add the evaluation to a round's record, in the rounds where it is due."""
    states = run.strategy.evaluated(state)
    privacy = run.config.privacy(len(run.data.names))
    record = replace(
        record,
        effective_rank=round(evaluation.effective_rank(states), 6),
        epsilon=None if privacy is None else epsilon(privacy, state.round),
    )
    first_or_last = state.round in (0, run.config.rounds)
    # Where every client has a model of its own, judging them all costs a pass for each.
    due = run.config.strategy != "local-only" and state.round % run.config.eval_every == 0
    if not due and not first_or_last:
        return record
    examples, size = run.data.evaluation, run.config.batch_size * 4
    whole = evaluation.evaluate_mean(run.model, states, run.task, examples, size)
    sketched = None
    # No others' clients minimise this loss: it is that of sketches drawn uniformly.
    minimised = run.config.strategy == "fslora" and run.config.forward == "sketched"
    if minimised and run.config.eval_sketched and run.config.sampler != "importance":
        sketched = evaluation.evaluate_sketched(
            run.model, state, run.task, examples, size, list(run.ratio_of.values())
        )
    for loss in (whole.loss, 0.0 if sketched is None else sketched):
        if not math.isfinite(loss):
            remedy = "lower --lr or --server-lr, set --clip-norm 1, or use --dtype float32"
            if not state.round:
                remedy = "nothing was trained yet: use --dtype float32, or another model"
            raise DivergedError(f"round {state.round}: the evaluation loss is {loss}; {remedy}")
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
