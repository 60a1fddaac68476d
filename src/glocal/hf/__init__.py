"""Hugging Face transformers: run a pretrained model with another attention or cache, and leave it as it was."""

from glocal.hf import cache
from glocal.hf.adapt import Adapted, adapt, readapt
from glocal.hf.attention import attention
from glocal.hf.far import far_heads
from glocal.hf.mass import KeptMass, recorded
from glocal.hf.mechanism import MECHANISMS, Mechanism
from glocal.hf.pretrained import (
    byte_llama,
    byte_llama_folder,
    load_causal,
    load_vision_language,
    scenes_llava,
    scenes_llava_folder,
)
from glocal.hf.tuning import tune

__all__ = [
    "MECHANISMS",
    "Adapted",
    "KeptMass",
    "Mechanism",
    "adapt",
    "attention",
    "byte_llama",
    "byte_llama_folder",
    "cache",
    "far_heads",
    "load_causal",
    "load_vision_language",
    "readapt",
    "recorded",
    "scenes_llava",
    "scenes_llava_folder",
    "tune",
]
