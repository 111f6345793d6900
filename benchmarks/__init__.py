"""Measurements: layers and kernels by sketch ratio, models, memory, rounds, what a client saves.

``python -m benchmarks`` lists them. Every comparison runs both sides in one process, in turns, and
prints nothing while its correctness check fails.
"""
