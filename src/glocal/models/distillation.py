"""Other blocks in the place of a trained model's self-attention, taught by that model, which stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from glocal.nn import Attention
from glocal.nn.convert import replace_layers

__all__ = ["DistilLoss", "Distillation", "replace_layers"]


class DistilLoss(NamedTuple):
    """The three parts of the loss, each a mean of squares, unweighted, and their weighted sum."""

    noise: Tensor
    """Of the student's output against what it should be."""
    output: Tensor
    """Of the student's output against the teacher's."""
    features: Tensor
    """Of the student's hidden states against the teacher's, added up over the layers."""
    total: Tensor


class Distillation(nn.Module):
    """A trained model, its copy with other layers, and the loss that trains these.

    Both run on the same input, each on its own hidden states. Only the new layers learn; all else is frozen. Dong et
    al., 2025, arXiv 2504.21292: AdamW at 3e-4, betas .9 and .99, weight decay .01, 500 steps of warm-up, batch 16,
    60,000 steps.

    Args:
        teacher: the trained model; it is put in evaluation mode and takes no gradients from here on.
        make, kind: as in `replace_layers`.
        hidden: names of the modules whose inputs are the hidden states that are compared. Where None, the ``norm2`` of
            each block with a new layer, as `glocal.nn.Block` has it: what comes out of the layer's residual.
        noise, output, features: weights of the loss's parts.

    Attributes:
        student: the copy.
        replaced: names of the new layers in it.

    Raises:
        ValueError: as in `replace_layers`; no new layer, no ``norm2``, a name that is no module, negative weights.

    >>> from glocal.models.vision.denoiser import Denoiser
    >>> from glocal.nn import DeltaConv
    >>> distillation = Distillation(Denoiser(16, 2, 2), lambda name, layer: DeltaConv(layer.dim, 5))
    >>> x, noise = torch.randn(2, 2, 1, 8, 8).unbind()
    >>> distillation(x, torch.rand(2), target=noise).total.backward()
    >>> distillation.replaced, distillation.hidden
    (['blocks.0.attention', 'blocks.1.attention'], ['blocks.0.norm2', 'blocks.1.norm2'])
    """

    def __init__(
        self,
        teacher: nn.Module,
        make: Callable[[str, Any], nn.Module | None],
        *,
        kind: type[nn.Module] | tuple[type[nn.Module], ...] = Attention,
        hidden: Sequence[str] | None = None,
        noise: float = 1.0,
        output: float = 1.0,
        features: float = 0.001,
    ) -> None:
        super().__init__()
        weights = {"noise": noise, "output": output, "features": features}
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative; it was {value}")
        self.weights = (noise, output, features)
        student = copy.deepcopy(teacher)
        self.replaced = replace_layers(student, make, kind)
        if not self.replaced:
            raise ValueError("make must give a module for one layer at least; it gave None for all")
        self.hidden = [_after(name) for name in self.replaced] if hidden is None else list(hidden)
        known = dict(teacher.named_modules())
        for name in self.hidden:
            if name not in known:
                raise ValueError(
                    f"hidden must name modules of {type(teacher).__name__}, such as a norm; {name!r} is none"
                )
        for part in (teacher, student):
            part.requires_grad_(False)
        for p in (p for name in self.replaced for p in student.get_submodule(name).parameters()):
            p.requires_grad_(True)
        self.teacher, self.student = teacher, student
        self.train()

    def train(self, mode: bool = True) -> Self:
        """The student's new layers only; the teacher, and what the student has of it, stay in evaluation mode."""
        super().train(False)
        self.training = mode
        for name in self.replaced:
            self.student.get_submodule(name).train(mode)
        return self

    def learned(self) -> list[nn.Parameter]:
        """The parameters of the new layers."""
        return [p for p in self.student.parameters() if p.requires_grad]

    def forward(self, *inputs: Any, target: Tensor) -> DistilLoss:
        """The loss of a batch.

        Args:
            inputs: what both models take.
            target: what the output should be: the noise that was added.
        """
        with torch.no_grad(), _inputs_of(self.teacher, self.hidden) as theirs:
            wanted = self.teacher(*inputs)
        with _inputs_of(self.student, self.hidden) as mine:
            found = self.student(*inputs)
        none = found.new_zeros(())
        features = sum((mse_loss(a, b) for a, b in zip(_all(mine), _all(theirs), strict=True)), none)
        parts = (mse_loss(found, target), mse_loss(found, wanted), features)
        total = sum((w * part for w, part in zip(self.weights, parts, strict=True)), none)
        return DistilLoss(*parts, total)


def _after(name: str) -> str:
    parent = name.rpartition(".")[0]
    return f"{parent}.norm2" if parent else "norm2"


def _all(kept: dict[str, Tensor | None]) -> Iterable[Tensor]:
    for name, value in kept.items():
        if value is None:
            raise ValueError(f"hidden must name modules that the model calls; {name!r} was not called")
        yield value


@contextmanager
def _inputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor | None]]:
    """What the modules are given in a call, by name."""
    kept: dict[str, Tensor | None] = dict.fromkeys(names)

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, given: kept.update({name: given[0]})

    hooks = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in kept]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
