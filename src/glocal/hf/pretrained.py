"""Pretrained models from a folder, checked before use; and the small ones that glocal ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

__all__ = [
    "byte_llama",
    "byte_llama_folder",
    "load_causal",
    "load_vision_language",
    "scenes_llava",
    "scenes_llava_folder",
]


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


def scenes_llava_folder() -> Path:
    """Where the shipped vision-language model and its processor lie, as transformers' ``from_pretrained`` reads them.

    >>> (scenes_llava_folder() / "processor_config.json").exists()
    True
    """
    return Path(__file__).parent / "scenes_llava"


def scenes_llava() -> tuple[Any, Any]:
    """The shipped vision-language model and its processor: a LLaVA that knows rendered scenes on photographs.

    2.5 million parameters, pictures of 96 x 96 pixels in 64 tokens, a vocabulary of some sixty words. Trained by
    ``examples/train_scenes.py``; ``training.json`` in its folder holds the curve. A prompt is
    ``"<image> Is there a red square? Answer:"``, or what the processor's chat template makes of a message.

    Returns:
        A ``LlavaForConditionalGeneration`` in float32, in evaluation mode, and a ``LlavaProcessor``.

    >>> model, processor = scenes_llava()
    >>> model.config.image_seq_length
    64
    """
    return load_vision_language(scenes_llava_folder())


def load_causal(folder: str | Path) -> Any:
    """A causal language model of transformers from a local folder, in float32 and evaluation mode.

    Only safetensors are read, nothing is downloaded, and all weights must be there.

    Args:
        folder: with ``config.json`` and weights.

    Raises:
        ValueError: it is no such folder, the model is no causal one, or the weights are damaged or incomplete.
    """
    from transformers import AutoModelForCausalLM

    return _load(Path(folder), AutoModelForCausalLM, "causal language model")


def load_vision_language(folder: str | Path) -> tuple[Any, Any]:
    """A vision-language model of transformers and its processor, from a local folder; else as `load_causal`.

    Raises:
        ValueError: as there; or a folder without a processor that can be loaded here.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(folder)
    model = _load(folder, AutoModelForImageTextToText, "vision-language model")
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"{str(folder)!r} has no processor that can be loaded: {error}") from None
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"{str(folder)!r} has no processor of pictures and text, only a {type(processor).__name__}")
    return model, processor


def _load(folder: Path, loader: Any, what: str) -> Any:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} has no readable config.json: {error}") from None
    import torch
    from safetensors import SafetensorError

    try:
        model, info = loader.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"the weights in {str(folder)!r} are damaged: {error}") from None
    except (OSError, ValueError) as error:
        kind = config.get("model_type", "unknown")
        raise ValueError(f"{str(folder)!r} is no {what} that can be loaded ({kind}): {error}") from None
    lacking = [*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]
    if lacking:
        raise ValueError(f"the weights in {str(folder)!r} are incomplete: {lacking[0]} and {len(lacking) - 1} more")
    assert isinstance(model, nn.Module)
    return model.eval()
