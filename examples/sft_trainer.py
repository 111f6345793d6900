"""TRL's SFTTrainer, with sketch ratios as a cohort of devices would have them."""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from fslora.data.python_docs import python_docs
from fslora.models import model_path
from fslora_kernels import SketchCallback, random_ratio


def main() -> None:
    """Fine-tune on the docstrings of Python's standard library, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="docs-base", help="a folder, or a hub id")
    parser.add_argument("--out", default="runs/sft-example", help="where the adapter is saved")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()

    path = model_path(args.model)
    data = Dataset.from_list(python_docs()).train_test_split(test_size=64, seed=0)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        SFTConfig(
            args.out,
            max_length=128,
            max_steps=args.steps,
            learning_rate=5e-3,
            save_strategy="no",
            bf16=torch.cuda.is_available(),
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        callbacks=[SketchCallback(random_ratio((0.125, 0.25, 0.5)))],  # fuses, and draws ranks
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]  # with the whole adapter
    print(f"held-out loss {before:.3f} -> {after:.3f}")
    trainer.save_model(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
