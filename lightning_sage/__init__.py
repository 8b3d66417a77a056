"""Saliency-guided sparse backward passes for fine-tuning transformers with Lightning."""
