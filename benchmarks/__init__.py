"""Measurements: what a round costs, what a client saves, what the kernels do on a GPU.

``python -m benchmarks`` lists them. Every comparison runs both sides in one process, in turns, and
prints nothing while its correctness check fails.
"""
