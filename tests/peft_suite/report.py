"""What PEFT's tests say about the fused layer, compared and written down."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

# Share of the cases passed by vanilla PEFT that must pass fused: issue 4.
WANTED = 0.98
# Failures that are understood and none of the layer's fault: part of the test's id to the reason.
EXPLAINED = {
    "TestLayerRepr::": (
        "the test asks that the layer's repr begins with `lora.Linear`; a fused layer's names its "
        "own class, `lora.SketchedLoRALinear`, so that a printed model shows what is fused"
    ),
}
# Why a case fails without the network, whatever the layer: part of the message to the reason.
NOT_RUN = {
    "couldn't connect to": "needs a model of the hub",
    "backend tokenizer": "needs a tokenizer of the hub",
    "ZeroDivisionError": "needs a tokenizer of the hub (without one a prompt has no tokens)",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of the LoRA cases of one of PEFT's test files.

    Attributes:
        cases: LoRA cases: parametrised by LoraConfig, or seen to build a LoRA layer.
        passed: of these, ids that vanilla PEFT passes.
        named: of the passed, how many are parametrised by LoraConfig.
        failed: id to message: passes vanilla, fails fused.
        skipped: why PEFT's tests skip a case themselves, to how many.
        not_run: why vanilla fails here, to ids; also those that fail before they build a layer.
        fused: passed cases that had a fused layer.
        computed: of these, how many called our operation; the others never call such a layer, or
            only merged or disabled.
        calls: calls of our operation.
        delegated: calls of fused layers that ended without it: in PEFT's own code.
    """

    cases: int
    passed: list[str]
    named: int
    failed: dict[str, str]
    skipped: Counter = field(default_factory=Counter)
    not_run: dict[str, list[str]] = field(default_factory=dict)
    fused: int = 0
    computed: int = 0
    calls: int = 0
    delegated: int = 0

    @property
    def share(self):
        """Passed fused over passed vanilla; 0 where vanilla passes nothing."""
        return (len(self.passed) - len(self.failed)) / max(1, len(self.passed))

    @property
    def unexplained(self):
        """Ids of failures that nobody has understood yet."""
        return [name for name in self.failed if explanation(name) is None]


def is_lora(row):
    """Whether the vanilla run of a test shows it to be about LoRA."""
    return row["named"] or row["lora"] > 0


def to_fuse(vanilla):
    """Return the ids of the cases that are worth a fused run: what vanilla passes."""
    return [row["id"] for row in vanilla if row["outcome"] == "passed" and is_lora(row)]


def compare(vanilla, fused):
    """Judge the rows of a vanilla run and of a fused run of the same file.

    Raises:
        ValueError: a case that vanilla passes has no fused outcome.
    """
    passed = to_fuse(vanilla)
    outcomes = {row["id"]: row for row in fused}
    if missing := [name for name in passed if name not in outcomes]:
        raise ValueError(f"{len(missing)} cases have no fused outcome, {missing[0]} among them")
    rows = [outcomes[name] for name in passed]
    not_run = {}
    for row in vanilla:
        if row["outcome"] == "failed":
            known = [text for part, text in NOT_RUN.items() if part in row["reason"]]
            reason = known[0] if known else f"fails vanilla too: {row['reason']}"
            not_run.setdefault(reason, []).append(row["id"])
    return Verdict(
        cases=sum(is_lora(row) for row in vanilla),
        passed=passed,
        named=sum(row["named"] for row in vanilla if row["id"] in set(passed)),
        failed={row["id"]: row["reason"] for row in rows if row["outcome"] != "passed"},
        skipped=Counter(
            row["reason"] for row in vanilla if row["outcome"] == "skipped" and is_lora(row)
        ),
        not_run=not_run,
        fused=sum(row["fused"] > 0 for row in rows),
        computed=sum(row["computed"] > 0 for row in rows),
        calls=sum(row["computed"] for row in rows),
        delegated=sum(row["delegated"] for row in rows),
    )


def explanation(name):
    """Return why a failure is none of the layer's fault, or None."""
    return next((text for part, text in EXPLAINED.items() if part in name), None)


def markdown(verdicts, facts):
    """Write the verdicts, file name to ``Verdict``, as a page; ``facts`` say what was run."""
    lines = [
        "# PEFT's own tests, with every LoRA model fused",
        "",
        "Written by `python -m tests.peft_suite` (see its `--help`); not edited by hand. The tests "
        "of the installed PEFT run twice, unchanged: vanilla, and with `fslora_kernels.fuse` "
        "applied to every model right after an adapter is added to it. A LoRA case is a test "
        "parametrised by `LoraConfig`, or one that builds a LoRA layer. Models of the hub are "
        "replaced by tiny ones built from the config of the same architecture; there is no "
        "network.",
        "",
        *(f"- {fact}" for fact in facts),
        "",
        "| tests | LoRA cases | skipped by the test | vanilla passes | of these by LoraConfig "
        "| fused passes | share | had a fused layer | called it unmerged |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, v in verdicts.items():
        lines.append(
            f"| {name} | {v.cases} | {v.skipped.total()} | {len(v.passed)} | {v.named} "
            f"| {len(v.passed) - len(v.failed)} | {v.share:.2%} | {v.fused} | {v.computed} |"
        )
    calls = sum(v.calls for v in verdicts.values())
    delegated = sum(v.delegated for v in verdicts.values())
    passed = sum(len(v.passed) for v in verdicts.values())
    same = passed - sum(len(v.failed) for v in verdicts.values())
    lines += [
        "",
        f"Together {same:,} of {passed:,} cases that vanilla PEFT passes also pass fused "
        f"({same / max(1, passed):.2%}; {WANTED:.0%} are asked for in each file). "
        f"Our operation was called {calls:,} times; {delegated:,} calls of fused layers ended "
        "without it, as they must (merged, disabled, mixed-adapter batches, a variant beside plain "
        "LoRA). Cases without a fused layer adapt embeddings, convolutions, attention or "
        "parameters, or are variants such as DoRA: `fuse` leaves those layers alone.",
        "",
        "## Passes vanilla, fails fused",
        "",
    ]
    for v in verdicts.values():
        for name, message in v.failed.items():
            reason = explanation(name) or f"**not understood yet**: `{message}`"
            lines.append(f"- `{name.removeprefix('tests/')}`: {reason}")
    if not any(v.failed for v in verdicts.values()):
        lines.append("None.")
    lines += ["", "## Not run", ""]
    for file, v in verdicts.items():
        for reason, names in v.not_run.items():
            cases = ", ".join(f"`{name.split('::', 1)[-1]}`" for name in names)
            lines.append(f"- {file}, {reason} ({len(names)}): {cases}")
    if not any(v.not_run for v in verdicts.values()):
        lines.append("None.")
    lines += ["", "## Skipped by PEFT's tests themselves, in both modes", ""]
    skipped = sum((v.skipped for v in verdicts.values()), Counter())
    lines += [f"- {count}: {reason}" for reason, count in skipped.most_common()]
    return "\n".join(lines) + "\n"
