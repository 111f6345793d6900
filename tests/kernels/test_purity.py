"""Importing these packages, and fusing one model, changes nothing for anybody else."""

import subprocess
import sys
import textwrap

# Every class and function of the modules that our layers stand on, by identity.
SNAPSHOT = """
import inspect
import json
import os
import sys
import warnings

warnings.simplefilter("ignore")
import peft
import peft.tuners.lora
import peft.tuners.tuners_utils
import torch
import transformers
import transformers.trainer_callback
from torch import nn


def snapshot():
    found = {}
    for name in ("peft", "peft.tuners.lora", "peft.tuners.lora.layer", "peft.tuners.lora.model",
                 "peft.tuners.tuners_utils", "peft.peft_model", "peft.mapping_func",
                 "torch", "torch.nn", "torch.nn.functional", "torch.nn.modules.module",
                 "torch.nn.modules.linear", "torch.optim", "torch.autograd",
                 "transformers", "transformers.pytorch_utils", "transformers.trainer_callback"):
        for key, value in vars(sys.modules[name]).items():
            if key.startswith("__") or inspect.ismodule(value):
                continue
            found[name, key] = id(value)
            if inspect.isclass(value):
                for attribute, member in vars(value).items():
                    found[name, key, attribute] = id(member)
    return found


def settings():
    return (
        dict(os.environ),
        list(warnings.filters),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        sys.excepthook,
        len(torch.nn.modules.module._global_forward_hooks),
    )
"""


def run(program):
    """Run a program after the snapshot's definitions, in a process that nothing has touched."""
    program = SNAPSHOT + textwrap.dedent(program)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_changes_nothing_that_was_there():
    run("""
        before, before_settings = snapshot(), settings()
        import fslora
        import fslora_kernels
        for name in fslora_kernels.__all__:
            getattr(fslora_kernels, name)
        after = snapshot()
        changed = [key for key in before if after.get(key) != before[key]]
        assert not changed, changed
        assert settings() == before_settings
    """)


def test_fusing_one_model_changes_no_other():
    run("""
        import fslora_kernels

        def adapted():
            torch.manual_seed(0)
            config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
            return peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)

        other, before = adapted(), snapshot()
        want = other(torch.ones(1, 6))
        model = adapted()
        fslora_kernels.fuse(model)
        model(torch.ones(1, 6)).sum().backward()
        assert snapshot() == before
        assert type(other.base_model.model[0]) is peft.tuners.lora.Linear
        assert torch.equal(other(torch.ones(1, 6)), want)
    """)


def test_the_check_sees_a_patch():
    run("""
        before = snapshot()
        nn.Linear.forward = lambda self, x: x
        assert snapshot() != before
    """)
