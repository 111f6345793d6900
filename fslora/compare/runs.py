"""Running simulations one after another, or several at a time; each can be continued."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from fslora import checkpoint
from fslora.config import SimulateConfig
from fslora.errors import StoppedRunError, is_for_the_user
from fslora.report.records import read_object
from fslora.settings import merged, read_settings
from fslora.simulate import LOCATED, Watcher, checked_folder, simulate

_POLL_SECONDS = 0.5


def run_all(
    configs: Sequence[SimulateConfig], jobs: int, on_round: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Bring every run to its end; finished ones are left as they are.

    Args:
        configs: the runs, each in a folder of its own.
        jobs: how many at a time. More than one means processes of their own; if one run cannot
            work, the others are ended and can be continued.
        on_round: called whenever a run may have got further.

    Returns:
        Run folder to the reason, for runs that could not go on: they diverged, or no client's work
        could be used.

    Raises:
        ValueError: a folder holds another run, or a run cannot work; names the remedy.
        FileNotFoundError: a file that is not there.
        NotImplementedError: the implementation cannot run on the device.
        StoppedRunError: a process of the several was ended from outside.
    """
    left = [config for config in configs if not finished(config)]
    if jobs == 1 or len(left) < 2:
        failures = {}
        for config in left:
            failures[config.out] = _train(config, on_round)
            on_round()
    else:
        failures = _in_processes(left, min(jobs, len(left)), on_round)
    return {folder: reason for folder, reason in failures.items() if reason}


def finished(config: SimulateConfig) -> bool:
    """Whether a run has come to its end.

    Raises:
        ValueError: its folder holds a run with other settings, or with more rounds.
    """
    folder = Path(config.out)
    if not config.resume:
        return False
    settings = folder / "config.json"
    saved = SimulateConfig(**merged(None, read_settings(settings), str(settings)))
    asked = checked_folder(config, content_checked=True)
    done = checkpoint.rounds_done(folder)
    summary = folder / "summary.json"
    # A run that is being extended has the summary of its earlier end; what lies elsewhere than it
    # did is compared when the run goes on.
    same = all(getattr(saved, name) == getattr(asked, name) for name in ("rounds", *LOCATED))
    ended = same and done == config.rounds and summary.is_file()
    return ended and "split" in read_object(summary)


def _train(config: SimulateConfig, on_round: Callable[[], None] = lambda: None) -> str:
    """Run or continue one simulation; return why it had to stop, or nothing."""
    try:
        simulate(
            # Another comparison, or an earlier trial, may have begun it since it was planned.
            replace(config, resume=(Path(config.out) / "config.json").is_file()),
            Watcher(on_round=lambda _: on_round()),
        )
    except StoppedRunError as error:
        return str(error)
    return ""


def _train_apart(config: SimulateConfig) -> str | Exception:
    """Train in a process of its own; return an error that is for the user, to be raised at home."""
    try:
        return _train(config)
    except Exception as error:
        if is_for_the_user(error):
            return error
        raise


def _reason(result: str | Exception) -> str:
    if isinstance(result, Exception):
        raise result
    return result


def _in_processes(
    configs: Sequence[SimulateConfig], jobs: int, on_round: Callable[[], None]
) -> dict[str, str]:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    failures: dict[str, str] = {}
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet) as pool:
        futures = {pool.submit(_train_apart, config): config.out for config in configs}
        waiting = set(futures)
        try:
            while waiting:
                ended, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                failures |= {futures[future]: _reason(future.result()) for future in ended}
                on_round()
        except BrokenProcessPool:
            raise StoppedRunError(
                "a process was ended from outside, as a system does that is out of memory; take "
                "fewer --jobs: the same command goes on where it was"
            ) from None
        except BaseException:
            # Ended at any moment, a run can be continued; waiting for it could take hours.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return failures


def _quiet() -> None:
    """Leave Ctrl-C to the process that was asked, and say what the command line says, only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
