"""Turn a `compare.json` into Markdown tables, pictures and one self-contained HTML page."""

import json
from html import escape
from pathlib import Path

from fslora.disk import explained_errors, write_atomically
from fslora.report.comparison_plots import draw_comparison, has_bands
from fslora.report.comparison_tables import (
    Table,
    figure_name,
    final_table,
    markdown,
    notes,
    pair_table,
    paper_table,
    runs_table,
    search_table,
    target_tables,
    value_of,
    without_empty,
)
from fslora.report.page import document, figures, table
from fslora.report.records import Record, read_object
from fslora.report.units import counted, short_name

Pictures = dict[str, bytes]


def summary_table(folder: Path) -> Table:
    """Where each method ended: of one data set, or of several their figures side by side.

    Args:
        folder: holds a `compare.json`.
    """
    datasets = read_object(folder / "compare.json")["datasets"]
    return without_empty(final_table(datasets[0]) if len(datasets) == 1 else paper_table(datasets))


def write_comparison(folder: Path) -> Path:
    """Write `compare.md`, `report.html` and its pictures beside a `compare.json`.

    Returns:
        The path of `report.html`, which needs no other file.

    Raises:
        FileNotFoundError: there is no `compare.json`.
        ValueError: it cannot be read, matplotlib is not installed, or the folder cannot be
            written to.
    """
    datasets = read_object(folder / "compare.json")["datasets"]
    report = folder / "report.html"
    with explained_errors(folder):
        write_atomically(folder / "compare.md", render_markdown(datasets).encode())
    pictures = [draw_comparison(data) for data in datasets]
    with explained_errors(folder):
        for place, drawn in enumerate(pictures):
            number = "" if len(pictures) == 1 else f"{place + 1}-"
            for name, png in drawn.items():
                write_atomically(folder / f"{number}{name}", png)
        write_atomically(report, render_comparison(datasets, pictures).encode())
    return report


def render_markdown(datasets: list[Record]) -> str:
    """All tables as Markdown, the paper's first."""
    parts = [f"# {_title(datasets)}\n", markdown(paper_table(datasets))]
    for data in datasets:
        parts += [
            f"# {data['name']}\n",
            _sentence(data) + "\n",
            *(f"**{n}**\n" for n in notes(data)),
        ]
        parts += [markdown(found) for found in _open_tables(data) + _closed_tables(data)]
    return "\n".join(parts)


def render_comparison(datasets: list[Record], pictures: list[Pictures]) -> str:
    """The page as HTML text.

    Args:
        datasets: of `compare.json`.
        pictures: of each data set, as `draw_comparison` gives them; they are embedded.
    """
    title = escape(_title(datasets))
    sections = [f"<h1>{title}</h1>", _html(paper_table(datasets))]
    for data, drawn in zip(datasets, pictures, strict=True):
        sections += [
            f"<h1>{escape(data['name'])}</h1>",
            f"<p>{escape(_sentence(data))}</p>",
            *(f'<p class="note">{escape(note)}</p>' for note in notes(data)),
            figures([(png, _axis(name), caption(data, name)) for name, png in drawn.items()]),
            *map(_html, _open_tables(data)),
            *(
                f"<details><summary>{escape(found.title)}</summary>\n{_html(found, head=False)}\n"
                "</details>"
                for found in _closed_tables(data)
            ),
        ]
    return document(title, sections)


def caption(data: Record, name: str) -> str:
    """The sentence under a picture, with the comparison's own figures."""
    ended = {
        each["label"]: each["final"][data["figure"]]["mean"]
        for each in data["strategies"]
        if each["final"][data["figure"]]["mean"] is not None
    }
    best = (max if data["figure"] == "metric" else min)(ended, key=lambda label: ended[label])
    seeds = counted(len(data["seeds"]), "seed")
    text = f"{figure_name(data)} against {_axis(name)}, means over {seeds}"
    if len(data["seeds"]) > 1:
        text += f" with 95% intervals{'' if has_bands(data) else ' at their ends'}"
    if name == "rounds.png":
        text += f". The best mean at the end is {value_of(ended[best], data)}, of {best}"
    elif any(each["final"][_COST[name]]["mean"] == 0 for each in data["strategies"]):
        text += "; a dotted line across is a method that pays nothing, where it ended"
    return text[0].upper() + text[1:] + "."


_COST = {"bytes.png": "bytes", "time.png": "sim_seconds"}


def _axis(name: str) -> str:
    return {
        "rounds.png": "rounds",
        "bytes.png": "bytes moved",
        "time.png": "simulated time",
    }[name]


def _title(datasets: list[Record]) -> str:
    names = ", ".join(data["name"] for data in datasets)
    if len(datasets) > 3:  # as many as a heading can hold
        names = counted(len(datasets), "data set")
    labels = {each["label"] for data in datasets for each in data["strategies"]}
    return f"{counted(len(labels), 'way')} to federate LoRA on {names}"


def _sentence(data: Record) -> str:
    settings, seeds = data["settings"], counted(len(data["seeds"]), "seed")
    devices = "; devices and networks are simulated" if settings["devices"] else ""
    return (
        f"{counted(settings['clients'], 'client')}, {settings['per_round']} a round, for "
        f"{counted(settings['rounds'], 'round')} of "
        f"{counted(settings['local_steps'], 'local step')} of "
        f"{counted(settings['batch_size'], 'example')}; "
        f"{short_name(settings['model'])} on {short_name(settings['data'])}, partition "
        f"{settings['partition']}, rank {settings['rank']}; {seeds}, the "
        f"splits of each the same for all methods (checked){devices}."
    )


def _open_tables(data: Record) -> list[Table]:
    pairs = pair_table(data)
    return [final_table(data), *([pairs] if pairs else []), *target_tables(data)]


def _closed_tables(data: Record) -> list[Table]:
    tried = search_table(data)
    settings = [
        [key, value if isinstance(value, str) else json.dumps(value)]
        for key, value in data["settings"].items()
        if key not in ("strategy", "seed", "out", "resume")  # of single runs
    ]
    splits = [
        [seed, found["clients"], found["evaluation"]] for seed, found in data["splits"].items()
    ]
    return [
        *([tried] if tried else []),
        runs_table(data),
        Table("Splits", "Hashes of who trains on what.", ["seed", "clients", "evaluation"], splits),
        Table("Settings", "", ["setting", "value"], settings),
    ]


def _html(found: Table, *, head: bool = True) -> str:
    title = f"<h2>{escape(found.title)}</h2>\n" if head else ""
    note = f"<p>{escape(found.note)}</p>\n" if found.note else ""
    shown = without_empty(found)
    inner = table(shown.heads, shown.rows, "figures")
    return f'{title}{note}<div class="wide">{inner}</div>'
