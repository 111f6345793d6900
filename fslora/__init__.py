"""Federated Sketching LoRA: the thin federated layer on top of ``fslora_kernels``.

Nothing heavy is imported here, so that ``fslora --help`` answers at once.
"""

__version__ = "0.1.0"
