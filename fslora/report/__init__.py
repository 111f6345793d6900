"""Turn a run folder, finished or interrupted, into pictures and one self-contained HTML page.

records (what the folder says) → plots (PNG bytes) and page (HTML text) → files beside the records.
matplotlib, the extra `[report]`, is imported by `write_report` only.
"""

from pathlib import Path

from fslora.report.page import render_page
from fslora.report.plots import draw_all
from fslora.report.records import read_run
from fslora.report.units import format_bytes

__all__ = ["format_bytes", "write_report"]


def write_report(run_folder: Path) -> Path:
    """Write `report.html` and its pictures (`loss.png`, …) into a run folder.

    Args:
        run_folder: holds `config.json`, `rounds.jsonl` and, if the run came to its end,
            `summary.json`. Files of an earlier report are replaced.

    Returns:
        The path of `report.html`, which needs no other file: its pictures are inside.

    Raises:
        FileNotFoundError: `config.json` or `rounds.jsonl` is missing.
        ValueError: one of them cannot be read, holds no round, or matplotlib is not installed.
    """
    run = read_run(run_folder)
    pictures = draw_all(run)
    for name, png in pictures.items():
        replace_file(run_folder / name, png)
    report = run_folder / "report.html"
    replace_file(report, render_page(run, pictures).encode())
    return report


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a reader never meets half of it."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
