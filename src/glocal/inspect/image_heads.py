"""What a vision transformer's classes and class token do without each of its heads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from glocal.inspect.divergence import jensen_shannon
from glocal.inspect.heads import edit_heads
from glocal.inspect.importance import masked_heads
from glocal.inspect.recording import block_of
from glocal.nn.modes import evaluating

__all__ = ["ImageHeads", "image_heads"]


@dataclass(frozen=True, eq=False)
class ImageHeads:
    """What changes without each head, for each image, ``(layers, H, B)`` in float64. Made by `image_heads`.

    Entries are NaN for heads that a layer has not.

    Args:
        true: probability of the true class, with the head minus without it; of images that are misclassified it has
            the opposite sense. NaN without labels.
        predicted: the same of the class that the whole model gives.
        divergence: Jensen-Shannon divergence of the classes' probabilities, in bits, from 0 to 1.
        token: 1 - cosine of the class token, as it leaves the last block.
        flip: whether the first class is another, 0 or 1.
    """

    true: Tensor
    predicted: Tensor
    divergence: Tensor
    token: Tensor
    flip: Tensor

    def mean(self) -> dict[str, Tensor]:
        """Each over the images, ``(layers, H)``."""
        return {each.name: getattr(self, each.name).mean(-1) for each in fields(self)}

    def by_class(self, labels: Tensor) -> dict[str, Tensor]:
        """Each over the images of a class, ``(classes, layers, H)``; NaN for classes without images.

        Args:
            labels: of the images, ``(B,)``.
        """
        found = {}
        for name in (each.name for each in fields(self)):
            value = getattr(self, name)
            found[name] = torch.stack([value[..., labels == n].mean(-1) for n in range(int(labels.max()) + 1)])
        return found

    def rank_correlations(self) -> dict[tuple[str, str], float]:
        """Spearman's correlation over heads between the means of any two, by their names; NaN where one is constant."""
        from scipy.stats import spearmanr

        means = {name: value[~value.isnan()] for name, value in self.mean().items()}
        names = [name for name, value in means.items() if len(value)]
        pairs = [(a, b) for n, a in enumerate(names) for b in names[n + 1 :]]
        return {(a, b): float(spearmanr(means[a], means[b]).statistic) for a, b in pairs}


@torch.no_grad()
def image_heads(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    alone: bool = False,
    class_token: bool = True,
) -> ImageHeads:
    """Classify images without each head, one head at a time, or with one head alone in its layer.

    Only the block with the head and those after it run again: what blocks before it gave is kept, as many tensors as
    there are blocks. Li et al., 2023, arXiv 2303.13731.

    Args:
        model: of transformers or with layers of `glocal.nn`, whose blocks run one after the other, each once; it gives
            logits ``(B, classes)`` or an output with ``logits``.
        images: what it takes, ``(B, ...)``; few enough to be kept at once.
        labels: true classes, ``(B,)``.
        alone: remove all other heads of the layer instead.
        class_token: whether the first token is one; the mean over tokens stands for it where not.

    Raises:
        TypeError, ValueError: as `glocal.inspect.edit_heads`; labels that do not fit; an output that is no logits.

    >>> from glocal.nn import MLP, Attention, Block
    >>> class Small(nn.Sequential):
    ...     def forward(self, x):
    ...         return super().forward(x)[:, 0]
    >>> model = Small(*[Block(8, Attention(8, 2), MLP(8, 8)) for _ in range(3)])
    >>> image_heads(model, torch.randn(4, 5, 8)).mean()["divergence"].shape
    torch.Size([3, 2])
    """
    if labels is not None and tuple(labels.shape) != (len(images),):
        raise ValueError(f"labels must be ({len(images)},), one an image; it was {tuple(labels.shape)}")
    heads: dict[int, int] = {}
    given: dict[str, Any] = {}
    order: list[str] = []

    def note(number: int, out: Tensor) -> Tensor:
        heads[number] = out.shape[1]
        return out

    with evaluating(model):
        with edit_heads(model, note) as places:
            blocks = [block_of(place.name) for place in places]
            with _watched(model, blocks, given, order):
                probabilities, token = _read(model, images, given, order, class_token)
        kept = dict(given) if len(set(order)) == len(order) else {}  # a block that runs twice has two outputs
        size = (len(places), max(heads.values()), len(images))
        found = {each.name: torch.full(size, torch.nan).double() for each in fields(ImageHeads)}
        first = probabilities.argmax(-1)
        for number, count in heads.items():
            before = order[: order.index(blocks[number])] if kept else []
            for head in range(count):
                gone = [(number, other) for other in range(count) if (other == head) != alone]
                last: dict[str, Any] = {}
                skipped = _skipped(model, {name: kept[name] for name in before})
                with masked_heads(model, gone), skipped, _watched(model, blocks[-1:], last, []):
                    now, then = _read(model, images, last, order, class_token)
                change = probabilities - now
                if labels is not None:
                    found["true"][number, head] = change.gather(1, labels[:, None])[:, 0]
                found["predicted"][number, head] = change.gather(1, first[:, None])[:, 0]
                found["divergence"][number, head] = jensen_shannon(probabilities, now) / math.log(2)
                found["token"][number, head] = 1 - cosine_similarity(token, then, dim=-1)
                found["flip"][number, head] = (now.argmax(-1) != first).double()
    return ImageHeads(**found)


def _read(
    model: nn.Module, images: Tensor, given: dict[str, Any], order: list[str], class_token: bool
) -> tuple[Tensor, Tensor]:
    """Probabilities ``(B, classes)`` and the class token or what stands for it, ``(B, C)``, in float64."""
    out: Any = model(images)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        shape = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(f"model must give logits ({len(images)}, classes); it gave {shape}")
    states = given[order[-1]]
    states = (states[0] if isinstance(states, tuple) else states).flatten(1, -2).double()
    return logits.double().softmax(-1), states[:, 0] if class_token else states.mean(1)


@contextmanager
def _watched(model: nn.Module, names: list[str], given: dict[str, Any], order: list[str]) -> Iterator[None]:
    """Keep what blocks give, and in which order they ran, until the block ends."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            given[name] = out
            order.append(name)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in dict.fromkeys(names)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _skipped(model: nn.Module, given: dict[str, Any]) -> Iterator[None]:
    """Let blocks give what they once gave, without running."""

    def constant(out: Any) -> Any:
        return lambda *inputs, **options: out

    blocks = {name: vars(model.get_submodule(name)) for name in given}
    before = {name: block.get("forward") for name, block in blocks.items()}
    for name, block in blocks.items():
        block["forward"] = constant(given[name])
    try:
        yield
    finally:
        for name, block in blocks.items():
            block.pop("forward")
            if before[name] is not None:
                block["forward"] = before[name]
