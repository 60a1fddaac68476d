"""The smallest model of the shipped kind, with random weights, in a folder as the recipe writes it."""

import runpy
from functools import cache
from pathlib import Path

import torch

RECIPE = Path(__file__).parents[2] / "examples" / "train_scenes.py"


@cache
def recipe():
    """The recipe's names."""
    return runpy.run_path(str(RECIPE))


def write(folder: Path) -> Path:
    """Weights large enough that answers depend on the picture."""
    script = recipe()
    model = script["start"](32, 4, lr=1e-3, seed=0).model.llava.eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed_tokens" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 1.5 / parameter[0].numel() ** 0.5)
    model.save_pretrained(folder)
    script["processor"](script["tokenizer"]()).save_pretrained(folder)
    return folder
