"""What the test beds share: a tiny Llama, how it is trained, and weights that are kept in ``build/beds``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

_BEDS = Path(__file__).parents[2] / "build" / "beds"

M = TypeVar("M", bound=nn.Module)


def tiny_llama(vocab: int, layers: int, *, heads: int = 4, positions: int = 64) -> LlamaForCausalLM:
    """64 channels, random weights, no special tokens."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=positions,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def fit(model: M, loss: Callable[[], Tensor], steps: int, muon: Iterable[nn.Module] = ()) -> M:
    """Steps at 3e-3 with a cosine, each on the loss of a new batch; the model in evaluation mode.

    By AdamW, but for the matrices of the layers in ``muon``, by Muon: with AdamW alone some seeds of the scene bed have
    learned nothing after 1,800 steps.
    """
    matrices = [p for layer in muon for p in layer.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=3e-3)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=3e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]
    model.train()
    for _ in range(steps):
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


def kept(name: str, make: Callable[[], M], train: Callable[[M], M]) -> M:
    """A bed made from seed 0, with the weights on disk, or trained and written."""
    path = _BEDS / f"{name}.safetensors"
    torch.manual_seed(0)
    bed = make()
    if path.exists():
        bed.load_state_dict(load_file(path), strict=False)
        return bed.eval()
    bed = train(bed)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in bed.state_dict().items()}, path)
    return bed
