"""What the layer and kernel benchmarks print."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.compare import Result, Timed
from benchmarks.peers import BASE_BY_ONEDNN
from benchmarks.shapes import Cell, ratio_name
from benchmarks.timing import Interval

LEGEND = """\
  ms          median of forward and backward (dx, dA, dB)
  × base      over the bare base layer (its forward and dx), median and 95% interval
  × PEFT      over PEFT at rank R
  ours ÷      ours over this row, run beside it; above 1 ours is slower
  adapter     milliseconds beyond the bare base layer's in the same round; 'base, oneDNN' is that
              layer by the library that ours takes on this processor
  roof        least time of the cell, delta first (of the base: without an adapter), over the row's
  Mflop       executed, masked and padded ranks included; the cell's line says what is useful
  MB          read and written, each operation's tensors once
  ops         operations; on a GPU `benchmarks gpu` counts the kernels, after all timing
  saved, peak kept for the backward pass (x included), and most alive at once, in kB"""


def cell_title(cell: Cell) -> str:
    """Name a cell and what it is."""
    use = "may be tuned on" if cell.tuned else "unseen by tuning"
    return (
        f"{cell.id}: {cell.in_features}→{cell.out_features}, S/R = {ratio_name(cell.ratio)}, {use}"
    )


def cell_table(result: Result) -> str:
    """Lay out one cell."""
    lines = [cell_title(result.cell)]
    if result.spread is not None:
        rounds = min(len(row.seconds) for row in result.rows if row.seconds)
        lines.append(
            f"  {rounds} rounds, A/A of ours {result.spread}, useful "
            f"{result.useful_flops / 1e6:.0f} Mflop, least possible {1e3 * result.least_s:.3f} ms"
        )
    lines.append(
        f"  {'row':<24}{'ms':>9}  {'× base':<22}{'× PEFT':<22}{'ours ÷':<22}{'adapter':>8}"
        f"{'roof':>6}{'Mflop':>9}{'MB':>8}{'ops':>5}{'saved':>8}{'peak':>8}"
    )
    lines += [_line(row) for row in result.rows]
    if result.adapter_share is not None:
        by_onednn = any(row.name == BASE_BY_ONEDNN and not row.error for row in result.rows)
        beyond = f", beyond {BASE_BY_ONEDNN!r}" if by_onednn else ""
        lines.append(f"  adapter time at S over that at R{beyond}: {result.adapter_share}")
    return "\n".join(lines)


def _line(row: Timed) -> str:
    if row.error is not None:
        return f"  {row.name:<24}red: {row.error}"
    counted = "        –       –    –       –       –"
    if (c := row.counted) is not None:
        counted = (
            f"{c.flops / 1e6:>9.0f}{c.bytes_moved / 1e6:>8.1f}{c.launches or '–':>5}"
            f"{c.saved_bytes / 1e3:>8.0f}{c.peak_bytes / 1e3:>8.0f}"
        )
    return (
        f"  {row.name:<24}{1e3 * statistics.median(row.seconds):>9.3f}  {_shown(row.over_base):<22}"
        f"{_shown(row.over_peft):<22}{_shown(row.ours_over):<22}"
        f"{1e3 * row.adapter_s.median if row.adapter_s else 0.0:>8.3f}"
        f"{row.roofline or 0.0:>6.0%}{counted}"
    )


def _shown(interval: Interval | None) -> str:
    return "–" if interval is None else str(interval)


def summary(results: Sequence[Result]) -> str:
    """Say for every cell how ours stands against the best peer; unseen cells apart."""
    lines = []
    groups = (("cells that may be tuned on", True), ("cells never tuned on", False))
    for title, tuned in groups:
        group = [result for result in results if result.cell.tuned is tuned]
        if not group:
            continue
        lines += ["", title]
        lines.append(f"  {'cell':<38}{'ours × base':<22}{'ours ÷ best peer':<22}best peer")
        for result in group:
            ours, best = result.rows[0], result.best_peer
            if ours.error is not None or best is None:
                lines.append(f"  {result.cell.id:<38}red: {ours.error or 'no peer'}")
                continue
            verdict = "   SLOWER" if result.slower else ""
            lines.append(
                f"  {result.cell.id:<38}{_shown(ours.over_base):<22}"
                f"{_shown(best.ours_over):<22}{best.name}{verdict}"
            )
        slower = sum(result.slower for result in group)
        lines.append(f"  slower than the best peer in {slower} of {len(group)} cells")
    return "\n".join(lines).lstrip("\n")
