"""Strategies side by side: the same splits, schedules and budgets, several seeds, one report.

settings (what is compared) → runs (each an ordinary, resumable simulation) → table (means,
intervals, paired differences) → `compare.json`, from which `fslora.report` draws and writes.
"""
