"""What every kernel needs on every target, compiled ahead of time: no GPU, no times.

One line for each kernel, type, number of padded ranks and target, over all of its compilations or,
without ``--all``, over a few that are evenly spaced among them: how many were compiled, the most
registers and shared memory that any of them takes, spills, and the instruction of its products.
With ``--only`` the other lines of the file that ``--out`` names stay as they are.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from rich.progress import track

from benchmarks.flags import at_least
from fslora import disk
from fslora_kernels import aot
from fslora_kernels.aot import TARGETS, Report, Target, Variant

Group = tuple[str, str, str, str]
"""Kernel, type, padded ranks, target."""

HEAD = (
    "| kernel | type | ranks | target | compiled | products | registers | spills | shared memory |",
    "|---|---|---|---|---|---|---|---|---|",
)


def groups(
    per_group: int | None, words: Sequence[str] = ()
) -> dict[Group, list[tuple[Variant, Target]]]:
    """Return what to compile, by line of the table.

    Args:
        per_group: so many of each at most, evenly spaced; None takes all.
        words: that a line's own must all be among.
    """
    found: dict[Group, list[tuple[Variant, Target]]] = {}
    for target in TARGETS:
        for variant in aot.variants(target):
            ranks = str(variant.constants.get("P", "–"))
            key = (variant.kernel, variant.dtype, ranks, target.name)
            if set(words) <= set(" ".join(key).split()):
                found.setdefault(key, []).append((variant, target))
    if per_group is None:
        return found
    return {
        key: [pairs[i * len(pairs) // per_group] for i in range(min(per_group, len(pairs)))]
        for key, pairs in found.items()
    }


def worst(reports: Sequence[Report]) -> Report:
    """Return one report with the largest figure of each kind."""
    return replace(
        reports[0],
        registers=max(r.registers for r in reports),
        spilled=max(r.spilled for r in reports),
        stack_bytes=max(r.stack_bytes for r in reports),
        shared_bytes=max(r.shared_bytes for r in reports),
        matrix_unit="/".join(sorted({r.matrix_unit for r in reports})),
    )


def lines(found: dict[Group, list[Report]], every: dict[Group, int]) -> list[str]:
    """Lay each group out as a line of the table."""
    shown = []
    for group, reports in found.items():
        most = worst(reports)
        spills = "none"
        if most.spilled or most.stack_bytes:
            spills = f"**{most.spilled} registers, {most.stack_bytes} B**"
        shown.append(
            f"{_start(group)} {len(reports)} of {every[group]} | {most.matrix_unit} | "
            f"{most.registers} | {spills} | {most.shared_bytes / 1024:.0f} of "
            f"{most.shared_limit_bytes / 1024:.0f} KiB |"
        )
    return shown


def _start(group: Group) -> str:
    """How the line of a group begins."""
    return f"| {' | '.join(group)} |"


def updated(path: Path, new: Sequence[str], every: dict[Group, int]) -> list[str]:
    """Return the lines of a file's table with new ones in their places, in the order of all."""
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    of: dict[str, str] = {}
    starts = [_start(group) for group in every]
    for line in [*old, *new]:
        of |= {start: line for start in starts if line.startswith(start)}
    return [of[start] for start in starts if start in of]


def check_version(path: Path) -> None:
    """Check that the lines of a file that stay were compiled by this version of Triton.

    Raises:
        ValueError: they were compiled by another.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before = re.search(r"`, triton (\S+)\. ", text)
    if before and before[1] != version("triton"):
        raise ValueError(
            f"{path} is of triton {before[1]}, and this is {version('triton')}: its other lines "
            "cannot stay; leave out --only, or name another file"
        )


def main(arguments: Sequence[str]) -> int:
    """Compile, print the table, and return 1 if anything spills or does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    many = parser.add_mutually_exclusive_group()
    many.add_argument("--all", action="store_true", help="every compilation: an hour or two")
    many.add_argument("--per-line", type=at_least(1), default=1, help="compilations of each line")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="lines with all of: half sm_90 …"
    )
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    chosen = parser.parse_args(arguments)
    if chosen.out and chosen.only:
        check_version(chosen.out)
    every = {key: len(pairs) for key, pairs in groups(None).items()}
    wanted = groups(None if chosen.all else chosen.per_line, chosen.only)
    if not wanted:
        parser.error(f"no line has all of these words: {' '.join(chosen.only)}")
    found: dict[Group, list[Report]] = {}
    with aot.private_cache():
        todo = [(key, *pair) for key, pairs in wanted.items() for pair in pairs]
        for key, variant, target in track(todo, description="compiling"):
            found.setdefault(key, []).append(aot.compile_variant(variant, target))
    new = lines(found, every)
    print("\n".join([*HEAD, *new]))
    if chosen.out:
        title = (
            "# What the kernels need, compiled ahead of time\n\n"
            f"`python -m benchmarks compiled`, triton {version('triton')}. The largest figure of "
            "each line's compilations;\n`ranks` is the padded number. No GPU took part, and "
            "nothing here is a time.\n"
        )
        kept = updated(chosen.out, new, every) if chosen.only else new
        disk.write_atomically(chosen.out, "\n".join([title, *HEAD, *kept, ""]).encode())
    bad = [report for reports in found.values() for report in reports if report.problems()]
    for report in bad:
        print(f"{report.kernel} {report.dtype} {report.target}: {'; '.join(report.problems())}")
    return int(bool(bad))
