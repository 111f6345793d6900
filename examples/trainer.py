"""Hugging Face's Trainer, with a quarter of the adapter's ranks at a time."""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from fslora.data.python_docs import python_docs
from fslora.models import model_path
from fslora_kernels import SketchCallback


def main() -> None:
    """Fine-tune on the docstrings of Python's standard library, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="docs-base", help="a folder, or a hub id")
    parser.add_argument("--out", default="runs/trainer-example", help="where the adapter is saved")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()

    path = model_path(args.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "\n\n".join(row["text"] for row in python_docs())
    ids = tokenizer(text, verbose=False).input_ids
    starts = range(0, len(ids) - 127, 128)
    blocks = [{"input_ids": ids[k : k + 128], "labels": ids[k : k + 128]} for k in starts]

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    trainer = Trainer(
        model,
        TrainingArguments(args.out, max_steps=args.steps, learning_rate=5e-3, save_strategy="no"),
        train_dataset=blocks[64:],
        eval_dataset=blocks[:64],
        processing_class=tokenizer,
        callbacks=[SketchCallback(ratio=0.25, every=5)],  # fuses, and draws ranks every 5 steps
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]  # with the whole adapter
    print(f"held-out loss {before:.3f} -> {after:.3f}")
    trainer.save_model(args.out)  # a plain PEFT adapter
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
