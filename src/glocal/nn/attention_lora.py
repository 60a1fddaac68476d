"""Attention in the low-rank space of an adapter: earlier tokens steer how each token is adapted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glocal.attention import attend
from glocal.nn.convert import replace_layers
from glocal.patterns import Causal, Full, Keys, Pattern
from glocal.shapes import Bool, Float

__all__ = ["AdapterState", "AttentionLoRA", "adapters", "add_adapters", "remove_adapters", "streaming"]


class AdapterState(NamedTuple):
    """Keys and values of the tokens so far, ``(B, heads, n, r / heads)``: 2r numbers a token."""

    k: Tensor
    v: Tensor


class AttentionLoRA(nn.Module):
    """A frozen linear map plus an adapter of rank r whose inner r numbers attend to those of the tokens before.

    ``y = W0 x + alpha / r B (z + attention(z))`` with ``z = A x``. B starts at zero, so that the start is the frozen
    map, and so do the values' weights, so that without them it is LoRA. It cannot be merged into the map. It keeps no
    past by itself: decode within `streaming`, which takes the padding of a batch, too. After the abstract of "More
    Than Catastrophic Forgetting", 2024, arXiv 2405.17830; the form is ours.

    Args:
        base: the map to adapt; it is frozen.
        rank: r.
        num_heads: of the attention in it, a divisor of r.
        alpha: ``alpha / rank`` multiplies what the adapter gives.
        dropout: of the inputs of the adapter, in training.
        residual: whether ``z`` itself passes; else only what it attends to.
        where: ``"rank"`` attends among the r numbers; ``"output"`` among the outputs ``B z``, with weights as there.
        causal: tokens see themselves and what is before.

    Raises:
        ValueError: numbers that do not fit, another place, ``residual=False`` at the output.

    >>> layer = AttentionLoRA(nn.Linear(16, 24), rank=8, num_heads=4)
    >>> x = torch.randn(2, 10, 16)
    >>> torch.equal(layer(x), layer.base(x))
    True
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int = 8,
        num_heads: int = 4,
        alpha: float = 16.0,
        dropout: float = 0.05,
        residual: bool = True,
        where: str = "rank",
        causal: bool = True,
    ) -> None:
        super().__init__()
        if rank < 1 or num_heads < 1 or rank % num_heads:
            raise ValueError(f"rank must be a multiple of num_heads; they were {rank} and {num_heads}")
        if where not in ("rank", "output"):
            raise ValueError(f"where must be 'rank' or 'output'; it was {where!r}")
        if where == "output" and (base.out_features % num_heads or not residual):
            raise ValueError(
                f"where='output' needs out_features {base.out_features} a multiple of num_heads {num_heads}, and "
                f"residual=True"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1; it was {dropout}")
        self.base = base.requires_grad_(False)
        self.rank, self.num_heads, self.alpha, self.residual = rank, num_heads, alpha, residual
        self.where, self.causal, self.dropout = where, causal, nn.Dropout(dropout)
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Linear(base.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, base.out_features, bias=False, **like)
        self.q_proj, self.k_proj = (nn.Linear(rank, rank, bias=False, **like) for _ in range(2))
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(self.up.weight)
        if where == "rank":
            self.v_proj = nn.Linear(rank, rank, bias=False, **like)
            nn.init.zeros_(self.v_proj.weight)
        self.state: AdapterState | None = None
        """What a decoder has seen, while `streaming`."""
        self.keys: Tensor | None = None
        """Which tokens are no padding, ``(B, N)``, past ones included; set by `streaming` or by hand."""
        self.streams = False

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """Of the frozen map, for code that asks for its type or device."""
        return self.base.weight

    def forward(self, x: Float[Tensor, "B N d_in"]) -> Float[Tensor, "B N d_out"]:
        """The map and its adapter.

        Raises:
            ValueError: an input that is not ``(B, N, d_in)``, keys that do not fit.
        """
        if x.dim() != 3 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be (B, N, {self.in_features}): the adapter attends; it was {tuple(x.shape)}")
        z = self.down(self.dropout(x))
        if self.where == "output":
            adapted = self.up(z)
            adapted = adapted + self.attended(z, self._by_head(adapted))
        else:
            looked = self.attended(z, self._by_head(self.v_proj(z)))
            adapted = self.up(z + looked if self.residual else looked)
        out: Tensor = self.base(x) + self.alpha / self.rank * adapted
        return out

    def attended(self, z: Float[Tensor, "B N r"], v: Float[Tensor, "B h N e"]) -> Float[Tensor, "B N e"]:
        """What each token's ``z`` finds among the values of those that it sees."""
        q, k = self._by_head(self.q_proj(z)), self._by_head(self.k_proj(z))
        if self.streams:
            if self.state is not None:
                k, v = torch.cat([self.state.k, k], 2), torch.cat([self.state.v, v], 2)
            self.state = AdapterState(k, v)
        where: Pattern = Causal() if self.causal else Full()
        if self.keys is not None:
            if self.keys.shape != (z.shape[0], k.shape[2]) or self.keys.dtype != torch.bool:
                wanted = (z.shape[0], k.shape[2])
                raise ValueError(f"keys must be booleans {wanted}; it was {self.keys.dtype} {tuple(self.keys.shape)}")
            where = where & Keys(self.keys)
        out: Tensor = attend(q, k, v, where, scale=(self.rank / self.num_heads) ** -0.5)
        return out.movedim(1, -2).flatten(-2)

    def _by_head(self, t: Tensor) -> Tensor:
        split: Tensor = t.unflatten(-1, (self.num_heads, -1))
        return split.movedim(-2, 1)

    def merge(self) -> nn.Linear:
        """Refused: what attends is no linear map.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "an adapter that attends cannot be merged into a linear map; keep it, or remove_adapters(model)"
        )

    def unmerge(self) -> nn.Linear:
        """Refused, as `merge`.

        Raises:
            TypeError: always.
        """
        return self.merge()

    def extra_repr(self) -> str:
        return f"rank={self.rank}, num_heads={self.num_heads}, alpha={self.alpha}, where={self.where!r}"


def add_adapters(model: nn.Module, targets: Iterable[str] = ("q_proj", "v_proj"), **options: object) -> list[str]:
    """Put an `AttentionLoRA` in the place of each linear map whose last name is a target, and freeze all else.

    Args:
        model: changed in place.
        targets: last parts of the names.
        options: of `AttentionLoRA`.

    Returns:
        The names of the adapted maps.

    Raises:
        ValueError: a target that names no linear map of the model, options that do not fit, a model that has adapters.
            No map is exchanged then.

    >>> from glocal.nn import Attention
    >>> layer = Attention(16, 2)
    >>> add_adapters(layer, rank=4, num_heads=2)
    ['q_proj', 'v_proj']
    >>> sum(p.numel() for p in layer.parameters() if p.requires_grad)  # 2 maps: r (16 + 16) + 3 r^2
    352
    """
    wanted = tuple(targets)
    if any(adapters(model)):
        raise ValueError("model has adapters already; name all targets at once, or remove_adapters(model) first")
    found = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.split(".")[-1] in wanted]
    missing = [target for target in wanted if all(name.split(".")[-1] != target for name in found)]
    if missing:
        raise ValueError(f"targets must name linear maps of the model; it has no {', '.join(missing)}")

    def adapted(name: str, base: nn.Linear) -> AttentionLoRA | None:
        return AttentionLoRA(base, **options).train(model.training) if name in found else None  # type: ignore[arg-type]

    replace_layers(model, adapted, nn.Linear)
    learned = {id(p) for _, adapter in adapters(model) for p in adapter.parameters() if p.requires_grad}
    for p in model.parameters():
        p.requires_grad_(id(p) in learned)
    return found


def remove_adapters(model: nn.Module) -> None:
    """Put the maps back; all of the model can be trained again, what was frozen before included.

    Raises:
        ValueError: a model without adapters.
    """
    replace_layers(model, lambda name, adapter: adapter.base, AttentionLoRA)
    model.requires_grad_(True)


def adapters(model: nn.Module) -> Iterator[tuple[str, AttentionLoRA]]:
    """The adapters of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, AttentionLoRA):
            yield name, module


@contextmanager
def streaming(model: nn.Module, keys: Bool[Tensor, "B N"] | None = None) -> Iterator[None]:
    """Within it the adapters keep their keys and values, so that the tokens of a call follow those of the last one.

    As a model's own cache does; for ``generate`` of transformers, with the prompt's padding, if there is some::

        with streaming(model, inputs["attention_mask"].bool()):
            model.generate(**inputs)

    One sequence a row from first to last: what reorders or drops a cache's rows or tokens (beams, assisted generation)
    does not reach the adapters.

    Args:
        model: with adapters.
        keys: booleans of the prompt ``(B, N)``, true for what is no padding; tokens after it are real.

    Raises:
        ValueError: a model without adapters.
    """
    found = [adapter for _, adapter in adapters(model)]
    if not found:
        raise ValueError("model has no adapters; add_adapters(model) puts them in")

    def before(adapter: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(adapter, AttentionLoRA)
        if keys is not None:
            seen = 0 if adapter.state is None else adapter.state.k.shape[2]
            more = seen + args[0].shape[1] - keys.shape[1]
            shown = keys if more <= 0 else nn.functional.pad(keys, (0, more), value=True)
            adapter.keys = shown[:, : seen + args[0].shape[1]]

    hooks = [adapter.register_forward_pre_hook(before) for adapter in found]
    for adapter in found:
        adapter.streams, adapter.state = True, None
    try:
        yield
    finally:
        for adapter in found:
            adapter.streams, adapter.state, adapter.keys = False, None, None
        for hook in hooks:
            hook.remove()
