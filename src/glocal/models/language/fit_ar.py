"""FIT as a decoder: causal inside a group, and from group to group through latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from glocal.cache import Cache
from glocal.models.registry import register
from glocal.models.vision.fit import Stage, make_stages, parse_layers
from glocal.nn import Attention
from glocal.shapes import Float

__all__ = ["FITAR", "FITState", "fit_ar_tiny"]


class FITState:
    """What decoding with `FITAR` keeps: the current group, and of earlier ones only latents."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.group, self.place = 0, 0
        self.across = [_caches(stage.across) for stage in stages]
        """For each stage, the cache of each global layer."""
        self.before: list[Tensor | None] = [None] * len(stages)
        """For each stage, the latents of the group before, ``(B, 1, m, latent_dim)``."""
        self.begin(stages)

    def begin(self, stages: Sequence[Stage]) -> None:
        """Forget the tokens of the current group."""
        self.local = [_caches(stage.local) for stage in stages]
        self.held: list[list[Tensor]] = [[] for _ in stages]


def _caches(blocks: nn.ModuleList) -> list[Cache]:
    return [cast(Attention, block.attention).new_cache() for block in blocks]


class FITAR(nn.Module):
    """A `FIT` that predicts a sequence token by token.

    Local layers are causal inside a group. The latents of a group see the whole group, and of the others those before
    it; so a token reads the latents of the group before its own, and the first group reads zeros.

    Args:
        vocab: tokens.
        layers: the layer string; it ends with local layers.
        groups, tokens, latents, dim, latent_dim, num_heads, latent_heads, cross_mlp, backend: as in `FIT`.

    Raises:
        ValueError: a layer string that ends with global layers, or what `FIT` refuses.

    >>> import torch, glocal
    >>> model = glocal.create("fit_ar_tiny")
    >>> model(torch.randint(256, (2, 64))).shape, model.generate(1, 20).shape
    (torch.Size([2, 64, 256]), torch.Size([1, 20]))
    """

    def __init__(
        self,
        vocab: int,
        layers: str,
        *,
        groups: int,
        tokens: int,
        latents: int,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_heads: int,
        cross_mlp: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.stages_of = parse_layers(layers)
        if self.stages_of[-1][1]:
            raise ValueError(f"layers must end with local layers, which logits are read from; it was {layers!r}")
        self.groups, self.tokens = groups, tokens
        self.embed = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.latents = nn.Parameter(0.02 * torch.randn(groups, latents, latent_dim))
        self.stages = make_stages(
            self.stages_of, dim, latent_dim, num_heads, latent_heads, latents, False, cross_mlp, backend
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, tokens: Tensor) -> Float[Tensor, "B N vocab"]:
        """Logits for each token from those before it, all at once; ``N`` is ``groups * tokens``.

        Raises:
            ValueError: another length.
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.groups * self.tokens:
            raise ValueError(f"tokens must be (B, {self.groups * self.tokens}); it was {tuple(tokens.shape)}")
        x = pad(self.embed(tokens)[:, :-1], (0, 0, 1, 0))  # nothing comes before the first token
        x = x.unflatten(1, (self.groups, self.tokens)) + self.position
        latents = self.latents.expand(x.shape[0], -1, -1, -1)
        for stage in cast("Sequence[Stage]", self.stages):
            x = stage.inside(x)
            latents = stage.gather(latents, x)
            x = stage.spread(x, pad(latents[:, :-1], (0, 0, 0, 0, 1, 0)))
        return self._logits(x.flatten(1, 2))

    def _logits(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(x) @ self.embed.weight.mT)

    def new_state(self) -> FITState:
        """The state before the first token."""
        return FITState(cast("Sequence[Stage]", self.stages))

    def step(self, last: Tensor | None, state: FITState, *, batch: int = 1) -> Float[Tensor, "B vocab"]:
        """Logits for the next token.

        Args:
            last: the token before, ``(B,)``; None for the first step.
            state: of `new_state`; it moves on by one token.
            batch: sequences, where ``last`` is None.

        Raises:
            ValueError: the sequence is complete, or ``last`` is missing or too early.
        """
        if state.group == self.groups:
            raise ValueError(f"the sequence is complete: it has {self.groups * self.tokens} tokens")
        if (last is None) != (state.group == state.place == 0):
            raise ValueError("last must be None for the first token, and the token before for every other one")
        stages = cast("Sequence[Stage]", self.stages)
        x = self.position.new_zeros(batch, self.position.shape[1]) if last is None else self.embed(last)
        x = (x + self.position[state.place])[:, None, None]
        for number, stage in enumerate(stages):
            x = stage.inside(x, state.local[number])
            state.held[number].append(x)
            before = state.before[number]
            if before is None:
                before = torch.zeros_like(self.latents[:1]).expand(x.shape[0], -1, -1, -1)
            x = stage.spread(x, before)
        state.place += 1
        if state.place == self.tokens:
            self._close(state, stages)
        return self._logits(x[:, 0, 0])

    def _close(self, state: FITState, stages: Sequence[Stage]) -> None:
        """The group is complete: its latents read it and the latents before, for the next group to read."""
        latents = self.latents[state.group].expand(state.held[0][0].shape[0], 1, -1, -1)
        for number, stage in enumerate(stages):
            latents = stage.gather(latents, torch.cat(state.held[number], 2), caches=state.across[number])
            state.before[number] = latents
        state.group, state.place = state.group + 1, 0
        state.begin(stages)

    @torch.no_grad()
    def generate(self, batch: int, count: int | None = None, *, temperature: float = 1.0) -> Tensor:
        """Sequences sampled from the start, the likeliest tokens where ``temperature`` is 0; complete where None."""
        state, last, out = self.new_state(), None, []
        for _ in range(self.groups * self.tokens if count is None else count):
            logits = self.step(last, state, batch=batch)
            if temperature > 0:
                last = torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)
            else:
                last = logits.argmax(-1)
            out.append(last)
        return torch.stack(out, 1)


_TINY: dict[str, Any] = {"dim": 32, "latent_dim": 64, "num_heads": 2, "latent_heads": 4}


@register
def fit_ar_tiny(**options: Any) -> FITAR:
    """An autoregressive model of 64 bytes in 8 groups, for tests and small machines."""
    settings = {"vocab": 256, "layers": "(1)1(1)1(1)", "groups": 8, "tokens": 8, "latents": 2, **_TINY}
    return FITAR(**(settings | options))
