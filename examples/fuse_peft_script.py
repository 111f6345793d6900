"""An ordinary PEFT training loop, and the one line that makes its LoRA layers faster."""

import argparse
import time
from statistics import median

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import fslora_kernels
from fslora.data.python_docs import python_docs
from fslora.models import model_path


def adapted(path: str) -> PeftModel:
    """Put a fresh adapter on the base model, the same one at every call."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return get_peft_model(base, LoraConfig(r=64, target_modules="all-linear"))


def main() -> None:
    """Train the same model twice, as it is and fused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="docs-base", help="a folder, or a hub id")
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()

    path = model_path(args.model)
    text = "\n\n".join(row["text"] for row in python_docs())
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    blocks = ids[: len(ids) // 1024 * 1024].view(-1, 8, 128)
    batches = [blocks[step % len(blocks)] for step in range(args.steps)]

    models = {"PEFT": adapted(path), "fused": adapted(path)}
    fslora_kernels.fuse(models["fused"])  # <- the added line

    optimizers = {name: torch.optim.AdamW(m.parameters(), lr=2e-3) for name, m in models.items()}
    losses, times_ms = {name: [] for name in models}, {name: [] for name in models}
    for batch in batches:
        for name, model in models.items():  # in turns: what else the machine does slows both
            start = time.perf_counter()
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            times_ms[name].append(1000 * (time.perf_counter() - start))
            losses[name].append(loss.item())
    for name in models:
        first, last = losses[name][0], losses[name][-1]
        print(f"{name:5}  loss {first:.3f} -> {last:.3f}, {median(times_ms[name]):.1f} ms per step")


if __name__ == "__main__":
    main()
