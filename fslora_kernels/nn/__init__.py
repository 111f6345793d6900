"""The fused layer for Hugging Face models, and how it gets into them."""
