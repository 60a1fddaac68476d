"""A vision-language model, how to ask it, and the ways of steering it that a comparison knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glocal.bench.run import short
from glocal.hf import load_vision_language, scenes_llava_folder

__all__ = ["SCENES", "Answer", "Vlm", "Way", "ask", "load", "read_picture"]

SCENES = "scenes"
"""The name by which the model that glocal ships is asked for."""


@dataclass(frozen=True)
class Vlm:
    """A model of transformers that answers questions on pictures, in eval mode, and its processor."""

    name: str
    model: Any
    processor: Any

    def prompt(self, question: str) -> str:
        """The text that asks a question: by the processor's chat template where it has one."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            found: str = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            return found
        return f"{getattr(self.processor, 'image_token', '<image>')}\n{question}"

    def inputs(self, images: Sequence[Any], questions: Sequence[str]) -> dict[str, Tensor]:
        """Arguments of the model for one picture a question, padded on the left."""
        texts = [self.prompt(question) for question in questions]
        found = self.processor(images=list(images), text=texts, return_tensors="pt", padding=True, padding_side="left")
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in found.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Args:
        text: the answer.
        first: probability of each token to be its first, ``(V,)``.
        tokens: how many it has.
    """

    text: str
    first: Tensor
    tokens: int


@dataclass(frozen=True)
class Way:
    """One way of answering.

    Args:
        name: as in a table.
        about: what it does, in a few words.
        enter: makes the ``with`` block around ``generate`` from model, pictures and questions.
        pictures: what it does to the pictures before.
    """

    name: str
    about: str
    enter: Callable[[Vlm, Sequence[Any], Sequence[str]], AbstractContextManager[Any]] = lambda *_: nullcontext()
    pictures: Callable[[Vlm, Sequence[Any], Sequence[str]], Sequence[Any]] = lambda vlm, images, questions: images


def ask(vlm: Vlm, images: Sequence[Any], questions: Sequence[str], way: Way, max_tokens: int = 8) -> list[Answer]:
    """Greedy answers, one a picture and question.

    Raises:
        ValueError: what the way refuses.
    """
    seen = way.pictures(vlm, images, questions)
    inputs = vlm.inputs(seen, questions)
    with way.enter(vlm, seen, questions), torch.no_grad():
        output = vlm.model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    said = output.sequences
    if "input_ids" in inputs and said.shape[1] > len(output.logits):
        said = said[:, inputs["input_ids"].shape[1] :]  # BLIP-2 gives the answer alone
    tokenizer = vlm.processor.tokenizer
    first = output.logits[0].float().softmax(-1)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    return [
        Answer(
            tokenizer.decode(row, skip_special_tokens=True).strip(),
            first[n],
            int((~torch.isin(row.cpu(), special)).sum()),
        )
        for n, row in enumerate(said)
    ]


def load(name: str = SCENES) -> Vlm:
    """A model from a folder; ``"scenes"`` is the one that glocal ships.

    Raises:
        ValueError: as in `glocal.hf.load_vision_language`.
    """
    return Vlm(name, *load_vision_language(scenes_llava_folder() if name == SCENES else name))


def read_picture(path: Path) -> Any:
    """A PIL picture.

    Raises:
        ValueError: it cannot be read as one.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {short(str(path))} cannot be read as a picture: {error}") from None
