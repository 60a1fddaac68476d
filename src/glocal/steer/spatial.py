"""Spatial attention prompting: training pulls a token's attention onto the part of the picture it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.steer.hooks import Run, Site
from glocal.steer.method import Method, check_range
from glocal.steer.spans import SpanMap, known, prompt_of

__all__ = ["SpatialPrompting", "choose_objects", "mask_loss", "mask_shares", "spatial_loss"]

_EPS = 1e-6


def mask_shares(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Where attention should fall: each mask over a picture's tokens, in shares that sum to 1.

    A token belongs to a mask if any pixel of its cell does (adaptive max-pooling). The sum is ``1 - eps`` or so, as in
    the authors' code; an empty mask gives zeros.

    Args:
        masks: ``(S, height, width)``, inside where above 0; booleans or numbers.
        grid: rows and columns of tokens.

    Returns:
        ``(S, rows * columns)`` in float32 or wider.

    Raises:
        ValueError: another number of axes, or a grid without tokens.

    >>> mask_shares(torch.tensor([[[0, 1, 0, 0], [0, 0, 0, 1]]]), (1, 2))
    tensor([[0.5000, 0.5000]])
    """
    if masks.dim() != 3 or 0 in masks.shape[1:]:
        raise ValueError(f"masks must be (S, height, width); it was {tuple(masks.shape)}")
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"grid must be rows and columns, at least 1; it was {grid}")
    dtype = masks.dtype if masks.dtype == torch.float64 else torch.float32
    inside = F.adaptive_max_pool2d((masks > 0).to(dtype)[:, None], grid).flatten(1)
    return inside / (inside.sum(1, keepdim=True) + _EPS)


def spatial_loss(attention: Tensor, shares: Tensor) -> Tensor:
    """``sum m (log m - log(a + eps))`` over the tokens, the mean over rows whose mask is not empty.

    The divergence of attention from the mask (EarthMind; Shu et al., 2025, arXiv 2506.01667). Attention is not scaled
    to sum to 1 over the picture, so that it is also pulled onto the picture from elsewhere.

    Args:
        attention: to the picture's tokens after the softmax, mean over heads, ``(S, P)``.
        shares: `mask_shares` of the same rows, ``(S, P)``.

    Returns:
        A scalar; 0 where there is no row with a mask, with a gradient of 0.

    Raises:
        ValueError: shapes that differ.

    >>> shares = torch.tensor([[0.5, 0.5]])
    >>> float(spatial_loss(torch.tensor([[0.25, 0.25]]), shares).exp())
    1.99999...
    """
    if attention.dim() != 2 or attention.shape != shares.shape:
        raise ValueError(
            f"attention and shares must be (S, P) alike; they were {tuple(attention.shape)} and {tuple(shares.shape)}"
        )
    there = shares.sum(1) > 0
    if not bool(there.any()):
        return attention.sum() * 0.0
    wide = attention[there].to(torch.promote_types(attention.dtype, torch.float32))
    m = shares[there].to(wide)
    return (torch.xlogy(m, m) - m * (wide + _EPS).log()).sum() / len(m)


def choose_objects(count: int, wanted: int = 5, generator: torch.Generator | None = None) -> Tensor:
    """Which of a sample's objects a training step asks for: ``wanted`` numbers below ``count``, as upstream does it.

    Without repetition where there are enough; else all of them, and again from the first, as often as needed.

    Returns:
        ``(wanted,)`` in int64.

    Raises:
        ValueError: either number below 1.

    >>> choose_objects(2).tolist(), len(set(choose_objects(9).tolist()))
    ([0, 1, 0, 1, 0], 5)
    """
    for name, value in (("count", count), ("wanted", wanted)):
        check_range(name, value, 1)
    if count >= wanted:
        return torch.randperm(count, generator=generator)[:wanted]
    return torch.arange(wanted) % count


def mask_loss(
    logits: Tensor,
    masks: Tensor,
    *,
    points: int = 12544,
    weights: tuple[float, float] = (2.0, 0.5),
    eps: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """What a mask decoder is trained by beside it: cross-entropy and dice at points drawn evenly over the picture.

    Args:
        logits: of the decoder, ``(S, h, w)``.
        masks: inside where above 0, ``(S, height, width)``; read between pixels as the logits are.
        points: drawn for each mask.
        weights: of cross-entropy and dice.
        eps: added above and below in dice, so that empty masks ask for nothing but emptiness.
        generator: of the points.

    Returns:
        A scalar, the mean over masks.

    Raises:
        ValueError: other shapes, or no points.

    >>> masks = torch.zeros(1, 8, 8)
    >>> masks[:, :, :4] = 1
    >>> bool(mask_loss(40 * masks - 20, masks) < 1 < mask_loss(20 - 40 * masks, masks))
    True
    """
    if logits.dim() != 3 or masks.dim() != 3 or not len(logits) or len(logits) != len(masks):
        raise ValueError(
            f"logits and masks must be (S, h, w); they were {tuple(logits.shape)} and {tuple(masks.shape)}"
        )
    check_range("points", points, 1)
    device = logits.device if generator is None else generator.device
    at = torch.rand(len(logits), points, 1, 2, generator=generator, device=device).to(logits.device) * 2 - 1
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    inside = (masks > 0).to(wide)
    mine, true = (
        F.grid_sample(each[:, None], at.to(wide), padding_mode="border", align_corners=False).flatten(1)
        for each in (wide, inside)
    )
    entropy = F.binary_cross_entropy_with_logits(mine, true)
    shares = mine.sigmoid()
    dice = 1 - (2 * (shares * true).sum(1) + eps) / (shares.sum(1) + true.sum(1) + eps)
    return weights[0] * entropy + weights[1] * dice.mean()


@dataclass
class SpatialPrompting(Method):
    """Records, with gradient, how chosen tokens look at the picture, for a loss beside the model's own.

    The rows of these tokens alone are computed with weights, and the gradient goes through them; all other rows stay on
    the fused kernel, where the authors' code needs eager attention everywhere. Outputs are those of the model, up to
    rounding in those rows. Nothing remains at inference: the loss shapes weights.

    With gradient checkpointing (``use_reentrant=False``) call ``backward`` inside the block: layers run again there.

    Args:
        model: a transformers model with a causal language model in it, in training or not.
        queries: the tokens that look: the id of a token such as ``[SEG]``, or booleans ``(B, N)`` over the prompt.
        layers: whose attention; the last where None.
        grid: rows and columns of the picture's tokens, where ``spans`` or the model's inputs do not tell.

    Attributes:
        weights_of: of the newest call, for each layer ``{position: (B, N)}``, the mean over heads.

    Raises:
        TypeError, ValueError: as in `Method`; in use, dropout of attention weights above 0, a prompt without such
            tokens, ``queries`` of another shape, gradient checkpointing that is reentrant.

    Example::

        with SpatialPrompting(model, queries=tokenizer.convert_tokens_to_ids("[SEG]")) as prompting:
            loss = model(**inputs).loss + 0.1 * prompting.loss(masks)
        loss.backward()
    """

    _: KW_ONLY
    queries: int | Tensor
    grid: tuple[int, int] | None = None
    weights_of: dict[int, dict[int, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.queries
        if isinstance(given, Tensor) and (given.dim() != 2 or given.dtype != torch.bool):
            was = f"{given.dtype} {tuple(given.shape)}"
            raise ValueError(f"queries must be a token's id or booleans (B, N); it was {was}")
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise ValueError(f"grid must be rows and columns, at least 1; it was {self.grid}")
        self._looking: Tensor | None = None
        self._spans: SpanMap | None = None
        self._grad = False

    def default_layers(self, count: int) -> frozenset[int]:
        """The last, as in the paper."""
        return frozenset([count - 1])

    def begin(self, run: Run) -> None:
        """Find the tokens that look, and the pictures."""
        self.weights_of, self._spans = {}, run.spans
        self._grad = torch.is_grad_enabled() and not run.generating
        config = self.model.config.get_text_config(decoder=True)
        dropped = getattr(config, "attention_dropout", 0.0) or 0.0
        if self.model.training and dropped:
            raise ValueError(f"attention_dropout must be 0 where attention is trained; the model's is {dropped}")
        ids, queries = run.inputs.get("input_ids"), self.queries
        if isinstance(queries, Tensor):
            shape = tuple(prompt_of(run.inputs).shape[:2])
            if shape != tuple(queries.shape):
                raise ValueError(f"queries must be of the prompt's {shape}; it was {tuple(queries.shape)}")
            looking = queries
        elif ids is None:
            raise ValueError("queries must be booleans (B, N) where the prompt has no input_ids")
        else:
            looking = ids == queries
        if not bool(looking.any()):
            raise ValueError("no position of the prompt is among queries")
        self._looking = looking

    def edits(self, site: Site) -> bool:
        """While the prompt is read."""
        return site.prefill

    def rows(self, site: Site) -> Tensor:
        """Those of any row of the batch."""
        assert self._looking is not None
        wanted = F.pad(self._looking.any(0), (0, site.first_key + site.keys))
        return wanted.to(site.rows.device)[site.rows].nonzero()[:, 0]

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Keep their mean over heads."""
        if self._grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "attention is recorded without gradient: gradient checkpointing must be use_reentrant=False"
            )
        kept = self.weights_of.setdefault(site.layer, {})
        mean = F.pad(weights.mean(1), (site.first_key, 0))
        kept.update(zip(site.rows.tolist(), mean.unbind(1), strict=True))
        return weights

    def maps(self, row: int, layer: int | None = None) -> Tensor:
        """Attention of a row's looking tokens to its picture, ``(S, P)``: tokens in the order of the picture's grid.

        Args:
            row: of the batch.
            layer: which of those recorded; the last of them where None.

        Raises:
            RuntimeError: nothing has run.
            ValueError: not one picture, or one whose grid is not known.
        """
        if not self.weights_of or self._looking is None:
            raise RuntimeError("nothing is recorded: run the model inside the with block first")
        number = max(self.weights_of) if layer is None else layer
        kept = self.weights_of[number]
        at = self._picture(row)[0]
        positions = self._looking[row].nonzero()[:, 0].tolist()
        columns = [kept[position][row, at.to(kept[position].device)] for position in positions]
        some = next(iter(kept.values()))
        return torch.stack(columns) if columns else some.new_zeros(0, len(at))

    def loss(self, masks: Sequence[Tensor | None]) -> Tensor:
        """`spatial_loss` of each row with its masks, the mean over rows and layers.

        Args:
            masks: for each row of the batch ``(S, height, width)``, one for each of its looking tokens in order, or
                None where the row is left out: upstream trains pictures of a single sensor only.

        Returns:
            A scalar; rows whose masks are all empty, or None, do not count; 0 where none does. Its weight in the paper
            is 0.1.

        Raises:
            RuntimeError, ValueError: as in `maps`; another number of rows or of masks.
        """
        if not self.weights_of or self._looking is None:
            raise RuntimeError("nothing is recorded: run the model inside the with block first")
        if len(masks) != len(self._looking):
            raise ValueError(f"masks must be of {len(self._looking)} rows; they were of {len(masks)}")
        losses = []
        for row, each in enumerate(masks):
            count = int(self._looking[row].sum())
            if each is None or not count:
                continue
            if len(each) != count:
                raise ValueError(f"masks of row {row} must be {count}, one a looking token; they were {len(each)}")
            shares = mask_shares(each, self._picture(row)[1])
            if bool((shares > 0).any()):
                maps = [self.maps(row, layer) for layer in sorted(self.weights_of)]
                losses += [spatial_loss(found, shares.to(found.device)) for found in maps]
        some = next(iter(self.weights_of[max(self.weights_of)].values()))
        return torch.stack([each.to(some.device) for each in losses]).mean() if losses else some.sum() * 0.0

    def _picture(self, row: int) -> tuple[Tensor, tuple[int, int]]:
        """Positions of a row's one picture by rows of its grid, and the grid."""
        spans = known(self._spans)
        images = spans.images(row)
        if len(images) != 1:
            raise ValueError(f"row {row} must have one picture; it has {len(images)}")
        at, grids = images[0], spans.grids[row][0] if spans.grids else ()
        if self.grid is not None:
            if self.grid[0] * self.grid[1] != len(at):
                raise ValueError(f"grid {self.grid} does not fit the picture's {len(at)} tokens")
            return at, self.grid
        if not grids:
            raise ValueError(f"the grid of the picture's {len(at)} tokens is not known: pass grid=(rows, columns)")
        whole = grids[0]
        return at[whole.index.flatten().to(at.device)], whole.shape
