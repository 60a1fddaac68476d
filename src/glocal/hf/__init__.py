"""Hugging Face transformers: run a pretrained model with another attention pattern, and leave it as it was."""

from glocal.hf.attention import attention, swapped
from glocal.hf.mass import KeptMass, recorded

__all__ = ["KeptMass", "attention", "recorded", "swapped"]
