"""What every kernel needs on every target, compiled ahead of time: no GPU, no times.

One line for each kernel, type, number of padded ranks and target, over all of its compilations or,
without ``--all``, over a few that are evenly spaced among them: how many were compiled, the most
registers and shared memory that any of them takes, spills, and the instruction of its products.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import track

from fslora_kernels import aot
from fslora_kernels.aot import TARGETS, Report, Target, Variant

Group = tuple[str, str, str, str]
"""Kernel, type, padded ranks, target."""


def groups(per_group: int | None) -> dict[Group, list[tuple[Variant, Target]]]:
    """Return what to compile, by line of the table.

    Args:
        per_group: so many of each at most, evenly spaced; None takes all.
    """
    found: dict[Group, list[tuple[Variant, Target]]] = {}
    for target in TARGETS:
        for variant in aot.variants(target):
            ranks = str(variant.constants.get("P", "–"))
            key = (variant.kernel, variant.dtype, ranks, target.name)
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


def table(found: dict[Group, list[Report]], every: dict[Group, int]) -> str:
    """Lay the groups out as a Markdown table."""
    lines = [
        "| kernel | type | ranks | target | compiled | products | registers | spills "
        "| shared memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (kernel, dtype, ranks, target), reports in found.items():
        most = worst(reports)
        spills = "none"
        if most.spilled or most.stack_bytes:
            spills = f"**{most.spilled} registers, {most.stack_bytes} B**"
        lines.append(
            f"| {kernel} | {dtype} | {ranks} | {target} | {len(reports)} of "
            f"{every[kernel, dtype, ranks, target]} | {most.matrix_unit} | {most.registers} | "
            f"{spills} | {most.shared_bytes / 1024:.0f} of "
            f"{most.shared_limit_bytes / 1024:.0f} KiB |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Compile, print the table, and return 1 if anything spills or does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--all", action="store_true", help="every compilation: an hour or two")
    parser.add_argument("--per-line", type=int, default=1, help="compilations of each line")
    parser.add_argument("--out", type=Path, help="write the table to this file too")
    chosen = parser.parse_args(arguments)
    every = {key: len(pairs) for key, pairs in groups(None).items()}
    wanted = groups(None if chosen.all else chosen.per_line)
    found: dict[Group, list[Report]] = {}
    with aot.private_cache():
        todo = [(key, *pair) for key, pairs in wanted.items() for pair in pairs]
        for key, variant, target in track(todo, description="compiling"):
            found.setdefault(key, []).append(aot.compile_variant(variant, target))
    text = table(found, every)
    print(text)
    if chosen.out:
        import triton

        head = (
            "# What the kernels need, compiled ahead of time\n\n"
            f"`python -m benchmarks compiled`, triton {triton.__version__}. The largest figure of "
            "each line's compilations;\n`ranks` is the padded number. No GPU took part, and "
            "nothing here is a time.\n\n"
        )
        chosen.out.write_text(head + text + "\n", encoding="utf-8")
    bad = [report for reports in found.values() for report in reports if report.problems()]
    for report in bad:
        print(f"{report.kernel} {report.dtype} {report.target}: {'; '.join(report.problems())}")
    return int(bool(bad))
