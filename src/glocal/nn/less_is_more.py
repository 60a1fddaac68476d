"""LessIsMore: in decoding, a few layers choose one set of tokens for all heads, and the layers after them read it."""

from __future__ import annotations

from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn

from glocal.cache import SelectedTokens
from glocal.condense import best
from glocal.nn.frame import Attention, Call
from glocal.shapes import Bool, Float

__all__ = ["LessIsMore", "select_tokens", "unified_topk"]


def unified_topk(logits: Float[Tensor, "B H T"], m: int) -> Tensor:
    """One list of ``m`` tokens for all heads: every head's best, then every head's second best, without repeats.

    Ranks are joined, not values, so that a head with large logits does not decide alone. Inside a rank heads come in
    order; ties inside a head go to the earlier token. Nothing is looped over.

    Args:
        logits: ``(B, H, T)``, of query heads.
        m: tokens wanted.

    Returns:
        Integers ``(B, min(m, T))``, in the order in which they were found.

    >>> unified_topk(torch.tensor([[[9.0, 8.0, 0.0, 1.0], [0.0, 0.3, 0.1, 0.2]]]), 3).tolist()
    [[0, 1, 3]]
    """
    if logits.dim() != 3:
        raise ValueError(f"logits must be (B, H, T); it was {tuple(logits.shape)}")
    picks = best(logits, m).transpose(1, 2).flatten(1)  # rank by rank
    places = torch.arange(picks.shape[1], device=picks.device).expand_as(picks)
    first = torch.full((logits.shape[0], logits.shape[2]), picks.shape[1], device=picks.device)
    first = first.scatter_reduce(1, picks, places, "amin")
    return first.argsort(dim=-1, stable=True)[:, :m]


def select_tokens(
    q: Float[Tensor, "B H 1 D"],
    k: Float[Tensor, "B Hkv T D"],
    budget: int,
    ratio: float = 0.75,
    sinks: int = 4,
    *,
    real: Bool[Tensor, "B T"] | None = None,
) -> Tensor:
    """The tokens that one query may read: the first ones, the last ones, and between them those that heads ask for.

    ``int(ratio * budget)`` are chosen by `unified_topk` on ``q . k``; of the rest, ``sinks`` are the first tokens
    (none where the rest is smaller than that) and all others the most recent.

    Args:
        q: ``(B, H, 1, D)``, the newest query.
        k: ``(B, Hkv, T, D)``, all keys, its own included; ``H`` is a multiple of ``Hkv``.
        budget: tokens in all.
        ratio: share that is chosen.
        sinks: first tokens that are always read.
        real: booleans ``(B, T)``; padding is never read, and first and last are counted without it.

    Returns:
        Positions ``(B, min(T, budget))``, ascending; -1, at the end, where an item has fewer real tokens.

    Raises:
        ValueError: shapes or settings that do not fit.

    >>> q, k = torch.ones(1, 2, 1, 4), torch.arange(10.0).view(1, 1, 10, 1).expand(1, 1, 10, 4)
    >>> select_tokens(q, k, 4, ratio=0.5, sinks=1).tolist()
    [[0, 7, 8, 9]]
    """
    _check(budget, ratio, sinks)
    if q.dim() != 4 or q.shape[2] != 1 or k.dim() != 4 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q must be (B, H, 1, D) and k (B, Hkv, T, D); they were {tuple(q.shape)}, {tuple(k.shape)}")
    if real is not None and not bool(real.all()):
        rows = []
        for item, own in enumerate(real):
            at = own.nonzero().squeeze(1)
            found = select_tokens(q[item : item + 1], k[item : item + 1, :, at], budget, ratio, sinks)
            rows.append(nn.functional.pad(at[found[0]], (0, min(k.shape[2], budget) - found.shape[1]), value=-1))
        return torch.stack(rows)
    total = k.shape[2]
    every = torch.arange(total, device=k.device).expand(k.shape[0], -1)
    if budget >= total:
        return every
    chosen = int(budget * ratio)
    first = sinks if budget - chosen >= sinks else 0
    last = total - (budget - chosen - first)
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k[:, :, first:last].to(wide)
    logits = (q.squeeze(2).unflatten(1, (k.shape[1], -1)).to(wide) @ keys.mT).flatten(1, 2)
    between = unified_topk(logits, chosen).sort(-1).values + first
    return torch.cat([every[:, :first], between, every[:, last:]], 1)


class LessIsMore:
    """Decode with less: used as ``with LessIsMore(model, budget=...):``, nothing is trained and nothing is dropped.

    Inside the statement, caches made by the model's layers decode so: layers below ``start`` read everything. Layers
    ``start`` and ``correction`` read everything too, and choose the tokens (`select_tokens`) that all layers after
    them read, each item of the batch its own. Every step chooses anew. Several tokens at once (a prompt) and calls
    without a cache are left as they are. Yang et al., 2025, arXiv 2508.07101.

    Args:
        model: any stack of layers of `Attention` itself, such as `glocal.models.language.transformer.Transformer`;
            they are counted from 0 in the order of ``model.modules()``, other layers (windows, say) are left alone.
        budget: tokens that a sparse layer reads.
        ratio, sinks: as in `select_tokens`.
        start: the first layer that chooses; 2 in the paper.
        correction: the layer that chooses again; none where None. In the paper 12 of 36 layers.

    Raises:
        ValueError: numbers that do not fit the model; in decoding, a cache that was made outside the statement.

    >>> import torch
    >>> from glocal.models.language.transformer import Transformer
    >>> from glocal.nn import Attention, LessIsMore
    >>> model = Transformer(50, 16, [lambda dim: Attention(dim, 2, causal=True)] * 4)
    >>> with LessIsMore(model, budget=8, start=1, correction=2) as less:
    ...     tokens = model.generate(torch.randint(50, (2, 20)), 5)
    >>> tokens.shape, less.chosen.shape
    (torch.Size([2, 25]), torch.Size([2, 8]))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        budget: int,
        ratio: float = 0.75,
        sinks: int = 4,
        start: int = 2,
        correction: int | None = None,
    ) -> None:
        _check(budget, ratio, sinks)
        self.layers = [layer for layer in model.modules() if type(layer) is Attention and layer.causal]
        if not 0 <= start < len(self.layers):
            raise ValueError(f"start must be one of the {len(self.layers)} layers of full attention; it was {start}")
        if correction is not None and not start < correction < len(self.layers):
            raise ValueError(
                f"correction must be after start {start} and before {len(self.layers)}; it was {correction}"
            )
        self.budget, self.ratio, self.sinks, self.start, self.correction = budget, ratio, sinks, start, correction
        self.chosen: Tensor | None = None
        """The newest set, ``(B, K)``; None after a prompt."""

    def choose(self, q: Tensor, k: Tensor, real: Tensor | None) -> Tensor:
        """The set for ``q (B, H, 1, D)`` over ``k (B, Hkv, T, D)``; override it to choose otherwise.

        ``(B, K)`` for all heads, or ``(B, Hkv, K)``, in positions, -1 for none.
        """
        return select_tokens(q, k, self.budget, self.ratio, self.sinks, real=real)

    def __enter__(self) -> LessIsMore:
        for number, layer in enumerate(self.layers[self.start :], self.start):
            if number in (self.start, self.correction):
                vars(layer)["mix"] = partial(self._choosing, layer)
            else:
                vars(layer).update(new_cache=SelectedTokens, signals=self._signals, mix=partial(self._sparse, layer))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self.layers:
            for name in ("mix", "new_cache", "signals"):
                vars(layer).pop(name, None)

    def _choosing(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        step = call.cache is not None and q.shape[2] == 1
        self.chosen = self.choose(q, k, call.real) if step else None
        return Attention.mix(layer, q, k, v, call)

    def _signals(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> dict[str, Tensor]:
        if self.chosen is None:
            return {}
        sets = self.chosen.unsqueeze(1) if self.chosen.dim() == 2 else self.chosen
        return {"chosen": sets.unsqueeze(2)}

    def _sparse(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if call.cache is None or self.chosen is None:
            return Attention.mix(layer, q, k, v, call)
        if not isinstance(call.cache, SelectedTokens):
            raise ValueError(
                f"cache must be made inside the with statement, by new_cache; it was {type(call.cache).__name__}"
            )
        return layer.attend_kept(q, call._replace(real=None))  # what was chosen is real


def _check(budget: int, ratio: float, sinks: int) -> None:
    if budget < 1:
        raise ValueError(f"budget must be at least 1; it was {budget}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must be from 0 to 1; it was {ratio}")
    if sinks < 0:
        raise ValueError(f"sinks must not be negative; it was {sinks}")
