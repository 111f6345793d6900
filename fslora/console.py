"""What a run shows in the terminal: a progress bar, a closing table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fslora.config import SimulateConfig
from fslora.records import ClientRecord, RoundRecord
from fslora.report import comparison_tables, format_bytes
from fslora.report.units import format_seconds
from fslora.simulate import Watcher

_AMPLE = 1000  # columns: any table fits


@contextmanager
def progress(config: SimulateConfig, console: Console) -> Iterator[Watcher]:
    """Show a bar over all client trainings, with loss, bytes so far, and time left."""
    total = config.rounds * config.cohort_size
    moved = 0
    columns = (
        TextColumn("round {task.fields[round]}/" + str(config.rounds)),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("clients  loss {task.fields[loss]}  eval {task.fields[eval]}"),
        TextColumn("{task.fields[bytes]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    bars = Progress(*columns, console=console)
    bar = bars.add_task("", total=total, round=1, loss="–", eval="–", bytes="0 B")
    loading = console.status("reading the data, loading the model")

    def on_data(sizes: dict[str, int]) -> None:
        console.print(data_line(sizes, config.partition), markup=False, highlight=False)

    def on_judging() -> None:
        loading.update("judging the model before training")

    def on_start(done: int, moved_before: int) -> None:
        nonlocal moved
        loading.stop()
        bars.start()
        moved = moved_before
        done_clients, following = done * config.cohort_size, min(done + 1, config.rounds)
        bars.update(bar, completed=done_clients, round=following, bytes=format_bytes(moved))

    def on_client(record: ClientRecord) -> None:
        nonlocal moved
        moved += record.bytes_up + record.bytes_down
        loss = "–" if record.loss is None else f"{record.loss:.3f}"
        bars.update(bar, advance=1, loss=loss, bytes=format_bytes(moved))
        if record.rejected is not None:
            bars.console.print(f"  {record.id}: left out, {record.rejected}", markup=False)
        elif record.fault is not None:
            bars.console.print(f"  {record.id}: used, though {record.fault}", markup=False)

    def on_round(record: RoundRecord) -> None:
        done = record.round * config.cohort_size  # some may not have been available
        bars.update(bar, completed=done, round=min(record.round + 1, config.rounds))
        if record.eval_loss is not None:
            bars.update(bar, eval=f"{record.eval_loss:.3f}")

    loading.start()
    try:
        yield Watcher(on_start, on_client, on_round, on_data, on_judging)
    finally:
        loading.stop()
        bars.stop()


def data_line(sizes: dict[str, int], partition: str) -> str:
    """Say who has how much, and what is left out.

    Args:
        sizes: as ``data.federated.sizes`` returns them.
        partition: the scheme.
    """
    fewest, most = sizes["fewest_texts"], sizes["most_texts"]
    each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    line = (
        f"{sizes['clients']:,} clients, {each} texts each; {sizes['held_out']:,} examples held out"
    )
    if sizes["judged_on"] < sizes["held_out"]:
        line += f", judged on {sizes['judged_on']:,}"
    if sizes["left_out_rows"]:
        column = partition.partition(":")[2]
        line += f"; {sizes['left_out_rows']:,} rows of {sizes['left_out_values']:,} other values "
        line += f"of {column} left out"
    return line


def closing_table(summary: dict[str, Any], console: Console) -> None:
    """Print one line for each capacity class and one for all."""
    rows = [
        (
            f"{row['ratio']:g}",
            str(row["sketch_size"]),
            str(row["clients"]),
            format_bytes(row["bytes_up"]),
            format_bytes(row["bytes_down"]),
            _share(row["share_of_full_rank"]),
            _change(row["loss_before"], row["loss_after"]),
        )
        for row in summary["classes"]
    ]
    moved = summary["bytes_up"] + summary["bytes_down"]
    full = summary["full_rank_bytes_up"] + summary["full_rank_bytes_down"]
    every = (
        "all",
        "",
        str(sum(row["clients"] for row in summary["classes"])),
        format_bytes(summary["bytes_up"]),
        format_bytes(summary["bytes_down"]),
        _share(moved / full if full else None),
        _change(summary["eval_loss_before"], summary["eval_loss_after"]),
    )
    table = Table(title="What each capacity class paid, and what it got", title_justify="left")
    for head in ("ratio", "S", "clients", "up", "down", "of full rank", "loss"):
        table.add_column(head, justify="right", no_wrap=True)
    for line in rows:
        table.add_row(*line)
    table.add_section()
    table.add_row(*every)
    if console.measure(table, options=console.options.update(width=_AMPLE)).maximum > console.width:
        for ratio, _, clients, up, down, share, loss in [*rows, every]:
            of_full = "" if share == "–" else f", {share} of full rank"
            who = ratio if ratio == "all" else f"ratio {ratio}"
            console.print(f"{who}: {clients} clients, {up} up, {down} down{of_full}")
            console.print(f"  loss {loss}")
    else:
        console.print(table)
    if summary["eval_metric_after"] is not None:
        change = _change(summary["eval_metric_before"], summary["eval_metric_after"])
        console.print(f"{summary['score']}: {change}")
    if summary["sim_seconds"] is not None:
        console.print(f"simulated time: {format_seconds(summary['sim_seconds'])}")
    if summary["epsilon"] is not None:
        delta = summary["delta"]
        console.print(f"privacy: ε = {summary['epsilon']:.3g} of each client, δ = {delta:g}")
    for row in summary["targets"]:
        console.print(_target_line(row))


def print_table(found: comparison_tables.Table, console: Console) -> None:
    """Print a table of a comparison, and the sentence on how to read it."""
    table = Table(title=found.title, title_justify="left")
    for head in found.heads:
        table.add_column(
            escape(head), justify="left" if head == "method" else "right", overflow="fold"
        )
    for row in found.rows:
        table.add_row(*map(escape, row))
    console.print(table)
    console.print(found.note, markup=False)


def _target_line(row: dict[str, Any]) -> str:
    name = f"{row['figure']} {row['value']:g}"
    if row["round"] is None:
        return f"{name}: not reached"
    moved = f"{format_bytes(row['bytes_up'])} up and {format_bytes(row['bytes_down'])} down"
    seconds = row["sim_seconds"]
    after = "" if seconds is None else f", {format_seconds(seconds)} simulated"
    return f"{name}: reached in round {row['round']} with {moved}{after}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def closing_lines(folder: Path, report: Path | None, console: Console, layers: int = 0) -> None:
    """Say where the adapter and the report lie, and of how many layers the adapter's base is."""
    base = f" on the base with num_hidden_layers={layers}" if layers else ""
    if (adapter := folder / "adapter").is_dir():
        console.print(
            f"adapter: {adapter} (load it with peft.PeftModel.from_pretrained{base})",
            markup=False,
            soft_wrap=True,
        )
    else:
        console.print("adapter: none, every client has a model of its own")
    if report is not None:
        console.print(f"report:  {report}", markup=False, soft_wrap=True)


def _change(before: float | None, after: float | None) -> str:
    return " → ".join("–" if value is None else f"{value:.3f}" for value in (before, after))
