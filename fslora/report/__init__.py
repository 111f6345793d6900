"""Turn a run folder, finished or interrupted, into pictures and one self-contained HTML page.

records (what the folder says) → plots (PNG bytes) and page (HTML text) → files beside the records.
matplotlib, the extra `[report]`, is imported by `write_report` only.
"""

from pathlib import Path

from fslora.disk import explained_errors, write_atomically
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
        ValueError: one of them cannot be read, holds no round, matplotlib is not installed, or
            the folder cannot be written to.
    """
    run = read_run(run_folder)
    pictures = draw_all(run)
    report = run_folder / "report.html"
    with explained_errors(run_folder):
        for name, png in pictures.items():
            write_atomically(run_folder / name, png)
        write_atomically(report, render_page(run, pictures).encode())
    return report
