"""Hugging Face transformers: run a pretrained model with another attention or cache, and leave it as it was."""

from glocal.hf import cache
from glocal.hf.adapt import Adapted, adapt, readapt
from glocal.hf.attention import attention
from glocal.hf.mass import KeptMass, recorded
from glocal.hf.mechanism import MECHANISMS, Mechanism

__all__ = ["MECHANISMS", "Adapted", "KeptMass", "Mechanism", "adapt", "attention", "cache", "readapt", "recorded"]
