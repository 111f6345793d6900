"""Take the adapter that trainer.py saved to a machine with PEFT alone, and merge it."""

import argparse
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer


def main() -> None:
    """Write some text, merge the adapter into the base model, and write the same text again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", default="runs/trainer-example", help="what trainer.py saved")
    parser.add_argument("--out", default="runs/merged-example", help="where the model is saved")
    args = parser.parse_args()
    if not Path(args.adapter).is_dir():
        parser.error(f"there is no adapter {args.adapter}; run examples/trainer.py first")

    tokenizer = AutoTokenizer.from_pretrained(args.adapter)
    model = AutoPeftModelForCausalLM.from_pretrained(args.adapter, dtype=torch.float32)
    prompt = tokenizer("Return True if", return_tensors="pt")

    def continuation() -> str:
        ids = model.generate(**prompt, max_new_tokens=30, do_sample=False)
        return str(tokenizer.decode(ids[0], skip_special_tokens=True))

    adapted = continuation()
    model = model.merge_and_unload()
    merged = continuation()
    print(adapted)
    print(f"{type(model).__name__} with the adapter merged writes the same: {merged == adapted}")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
