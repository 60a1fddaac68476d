"""What each token chosen looked at in the picture: the newest row's attention, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.steer.hooks import Run, Site
from glocal.steer.method import Method
from glocal.steer.spans import Grid, SpanMap, known

__all__ = ["RecordRows", "attention_entropy"]


@dataclass
class RecordRows(Method):
    """Reads the attention by which each next token is chosen, and changes nothing.

    At each step of ``generate``, and once for a call of the model by itself, it keeps the newest position's weights
    after the softmax over the keys of the prompt, the mean over heads. Everything else stays on the fused kernel. Other
    methods that were entered before have acted on what it reads.

    Args:
        model: a transformers model with a causal language model in it.
        layers: which to read; all where None.

    Attributes:
        steps: of the newest run, for each step ``{layer: (B, prompt)}``, in float32 or the model's wider type.
        seen: what its prompt's positions are; None where that cannot be told.

    Raises:
        ValueError: beam search, whose rows move; a prompt that ends with padding.

    Example::

        with RecordRows(model) as record:
            model.generate(**inputs)
        record.images(0)[0]  # (steps, layers, tokens) of the first picture of the first prompt
    """

    steps: list[dict[int, Tensor]] = field(default_factory=list, init=False, repr=False)
    seen: SpanMap | None = field(default=None, init=False, repr=False)

    beams = False

    def begin(self, run: Run) -> None:
        """Forget the run before."""
        self.steps, self.seen = [], run.spans
        if run.spans is not None:
            run.spans.check_ends()

    def edits(self, site: Site) -> bool:
        """Whether the newest token is at hand: not in the first pieces of a prompt that is read in pieces."""
        return site.first_key + site.keys >= site.run.prompt

    def rows(self, site: Site) -> Tensor:
        """The newest token's."""
        return site.last

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Keep them. Keys that a sliding cache has dropped get no attention."""
        step = site.run.step
        if len(self.steps) <= step:
            self.steps.append({})
        prompt = max(0, site.run.prompt - site.first_key)
        kept = weights[:, :, -1, :prompt].detach().mean(1)
        self.steps[step][site.layer] = F.pad(kept, (site.run.prompt - kept.shape[-1], 0))
        return weights

    def prompt(self, row: int) -> Tensor:
        """Attention of a row of the batch to the prompt's positions, ``(steps, layers, prompt)``, layers in order.

        Raises:
            RuntimeError: nothing has run.
        """
        if not self.steps:
            raise RuntimeError("nothing is recorded: run the model inside the with block first")
        return torch.stack([torch.stack([step[n][row] for n in sorted(step)]) for step in self.steps])

    def images(self, row: int) -> list[Tensor]:
        """The same for the tokens of each picture of a row, each ``(steps, layers, tokens)``.

        Raises:
            RuntimeError: nothing has run.
            ValueError: the prompt was given as embeddings, and no spans with it.
        """
        found = self.prompt(row)
        return [found[..., at.to(found.device)] for at in self._spans().images(row)]

    def grids(self, row: int) -> tuple[tuple[Grid, ...], ...]:
        """For each picture of a row, the grids that its tokens form.

        Raises:
            RuntimeError, ValueError: as `images`.
        """
        return self._spans().grids[row]

    def _spans(self) -> SpanMap:
        if not self.steps:
            raise RuntimeError("nothing is recorded: run the model inside the with block first")
        rows = len(next(iter(self.steps[0].values())))
        return known(self.seen).repeated(rows)


def attention_entropy(weights: Tensor) -> Tensor:
    """Entropy in nats of attention ``(..., P)`` to a picture's tokens, scaled to sum to 1; ``(...)``.

    How spread it is: cluttered pictures spread it more, and answers are worse. Rows without attention have 0.

    >>> attention_entropy(torch.tensor([0.1, 0.1])).exp()
    tensor(2.)
    """
    total = weights.sum(-1, keepdim=True)
    found: Tensor = torch.special.entr(weights / torch.where(total > 0, total, 1.0)).sum(-1)
    return found
