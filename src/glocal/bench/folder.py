"""A model's folder in Hugging Face layout: what kind of model it holds, and loading it offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["check", "kind", "loaded", "loaded_image"]

SUPPORTED = "supported are causal language models (...ForCausalLM) and text encoders (BERT, RoBERTa and their like)"


def check(source: str | Path) -> Path:
    """The folder, with what loading needs.

    Raises:
        ValueError: it is not there, or lacks ``config.json`` or weights in safetensors.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(f"model {str(folder)!r} is not a folder; give a local folder with config.json and safetensors")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {str(folder)!r} has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model {str(folder)!r} has no .safetensors weights (other formats can run code, and are refused)"
        )
    return folder


def kind(source: str | Path) -> str:
    """``"causal"`` or ``"encoder"``, by ``config.json``.

    Raises:
        ValueError: as in `check`, or it is neither.
    """
    folder = check(source)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name, named = config.get("model_type"), [str(a) for a in config.get("architectures") or ()]
    except (OSError, ValueError, AttributeError, TypeError):
        raise ValueError(f"model {str(folder)!r} cannot be loaded: its config.json cannot be read") from None
    from transformers.models.auto import modeling_auto as auto

    causal, masked = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not named and name is None:
        raise ValueError(f"model {str(folder)!r} cannot be loaded: its config.json names no model_type; {SUPPORTED}")
    both_ways = config.get("is_encoder_decoder") is True
    if not both_ways and (
        any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in named)
        or config.get("is_decoder") is True
        or (not named and name in causal and name not in masked)
    ):
        return "causal"
    if not both_ways and name in masked:
        return "encoder"
    raise ValueError(f"model {str(folder)!r} is a {', '.join(named) or name}; {SUPPORTED}")


def loaded(folder: Path, load: Callable[[Path], Any]) -> tuple[Any, Any]:
    """Model and tokenizer, from files of that folder only; no code of its is run.

    Args:
        folder: as `check` gave it.
        load: what makes the model, given the folder.

    Raises:
        ValueError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    return _quietly(folder, load, AutoTokenizer)


def loaded_image(folder: Path) -> tuple[Any, Any]:
    """An image model without its head, and its image processor; else as `loaded`.

    Raises:
        ValueError: transformers cannot load them.
    """
    from transformers import AutoImageProcessor, AutoModel

    settings: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    return _quietly(folder, lambda path: AutoModel.from_pretrained(path, **settings), AutoImageProcessor)


def _quietly(folder: Path, load: Callable[[Path], Any], processor: Any) -> tuple[Any, Any]:
    from transformers.utils import logging as hf_logging

    logging: Any = hf_logging
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        reads = processor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return load(folder).eval(), reads
    except Exception as error:  # transformers raises whatever its parts raise
        raise ValueError(f"model {str(folder)!r} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    finally:
        if bar:
            logging.enable_progress_bar()
