"""Predictions of FSLoRA's theory as experiments that could refute them (docs/math.md)."""
