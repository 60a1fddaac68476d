"""Pretrained models from a folder, checked before use; and the small one that glocal ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["byte_llama", "byte_llama_folder", "load_causal"]


def byte_llama_folder() -> Path:
    """Where the shipped byte-level model lies: a folder as transformers' ``from_pretrained`` reads it.

    >>> (byte_llama_folder() / "config.json").exists()
    True
    """
    return Path(__file__).parent / "byte_llama"


def byte_llama() -> Any:
    """The shipped language model: a Llama over bytes, 3.2 million parameters, 2,048 tokens of context.

    Trained by ``examples/train_bytes.py`` on the source of Python's standard library; ``training.json`` in its folder
    holds the curve. Tokens are bytes plus 3 (`glocal.bench.corpus.to_ids`, transformers' ``ByT5Tokenizer``).

    Returns:
        A ``LlamaForCausalLM`` in float32, in evaluation mode.

    >>> model = byte_llama()
    >>> model.config.max_position_embeddings, model.num_parameters()
    (2048, 3214336)
    """
    return load_causal(byte_llama_folder())


def load_causal(folder: str | Path) -> Any:
    """A causal language model of transformers from a local folder, in float32 and evaluation mode.

    Only safetensors are read, nothing is downloaded, and all weights must be there.

    Args:
        folder: with ``config.json`` and weights.

    Raises:
        ValueError: it is no such folder, the model is no causal one, or the weights are damaged or incomplete.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} has no readable config.json: {error}") from None
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights in {str(folder)!r} are damaged: {error}") from None
    except (OSError, ValueError) as error:
        kind = config.get("model_type", "unknown")
        raise ValueError(f"{str(folder)!r} is no causal language model that can be loaded ({kind}): {error}") from None
    lacking = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if lacking:
        raise ValueError(f"the weights in {str(folder)!r} are incomplete: {lacking[0]} and {len(lacking) - 1} more")
    assert isinstance(model, nn.Module)
    return model.eval()
