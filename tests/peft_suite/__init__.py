"""PEFT's own tests as the judge of the fused layer: ``python -m tests.peft_suite``."""
