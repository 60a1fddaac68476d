"""PAINT: the newest token's scores of chosen image tokens are raised, those its vision tower finds local or central."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from glocal.steer.branch import Branch, fuse, lowered
from glocal.steer.hooks import Run, Site
from glocal.steer.method import Method, check_range
from glocal.steer.spans import PADDING, SpanMap, known, prompt_of
from glocal.steer.tower import TowerAttention, tower_layers

__all__ = ["PAINT", "local_set", "raised", "summary_set", "without_image"]


def local_set(attention: Tensor, share: float = 0.25) -> Tensor:
    """The ``share`` of patches with the most attention, booleans of the same shape ``(..., P)``.

    >>> local_set(torch.tensor([0.1, 0.4, 0.2, 0.3]), 0.5)
    tensor([False,  True, False,  True])
    """
    check_range("share", share, 0, 1)
    best = attention.topk(round(share * attention.shape[-1]), -1).indices
    return torch.zeros_like(attention, dtype=torch.bool).scatter(-1, best, True)


def summary_set(attention: Tensor, whisker: float = 1.5) -> Tensor:
    """Patches whose attention is an outlier, above the third quartile by ``whisker`` times the interquartile range.

    Args:
        attention: ``(..., P)``.
        whisker: 1.5 as in a box plot.

    Returns:
        Booleans of the same shape.

    >>> summary_set(torch.tensor([0.1, 0.1, 0.12, 0.13, 0.11, 0.9]))
    tensor([False, False, False, False, False,  True])
    """
    check_range("whisker", whisker, 0)
    wide = attention.double()
    low, high = (wide.quantile(q, -1, keepdim=True) for q in (0.25, 0.75))
    return wide > high + whisker * (high - low)


def raised(scores: Tensor, strength: Tensor) -> Tensor:
    """``e + strength * abs(e)``, of any shapes that broadcast; masked scores, minus infinity, stay.

    No shift of the scores before this is allowed: they are compared with 0.

    >>> raised(torch.tensor([2.0, -2.0, -torch.inf]), torch.tensor(0.5))
    tensor([ 3., -1., -inf])
    """
    return torch.where(scores.isinf(), scores, scores + strength * scores.abs())


@dataclass
class PAINT(Method):
    """Emphasis on local and summary image tokens (Arif et al., 2025, arXiv 2501.12206): fewer invented objects.

    In the layers it acts on, the newest row's scores become ``e + alpha |e|`` at local tokens, ``e + beta |e|`` at
    summary tokens, before the softmax, in prefill and decoding. From 0.8 on upstream texts degenerate; on pictures that
    are seen well enough it does harm. Negative scores rise towards 0, so that an irrelevant token gains too.

    The sets come from a CLIP-like tower whose patches are the image tokens (LLaVA; of LLaVA-NeXT the tokens of the
    whole view): local are those that the class token of its first layer looks at, summary the outliers in its last
    layer but one. Or they are given. It costs a second run of the tower a prompt.

    Args:
        model: a vision-language model of transformers.
        layers: all but the first two where None.
        local: for each row of the batch, positions ``(n,)`` among its image tokens, counted from the row's first one,
            or booleans ``(P,)`` over them. Where this or ``summary`` is given the tower is not read, and what is not
            given is empty.
        summary: the same; tokens in both are summary tokens.
        alpha, beta: emphasis on local and on summary tokens. Where both are 0 nothing changes.
        head_mode: ``uniform`` as in the authors' code; ``visual-share`` scales the emphasis of each head by its share
            of attention on the image in the prompt's last row relative to the layer's mean, at most twice. The paper
            promises weights of heads, its code has none: these are ours.
        local_share: of the patches.
        spatial_share: of the patches that other patches of the tower's first layer look at most, added to the local
            ones. Ours: the authors' own measure is a row sum of a softmax, always 1.
        whisker: as in `summary_set`.
        gamma: of the contrast with the prompt without its image (PAI, Liu et al., 2024, arXiv 2407.21771): logits
            are ``gamma z + (1 - gamma) z'``; 1 has no second branch.
        plausibility: with the contrast, the least probability relative to the likeliest; 0 rules none out.
        blind: the model's arguments without the image; the prompt without its image tokens where None.

    Attributes:
        sets: of the newest run, booleans ``(B, prompt)`` of local and of summary tokens.

    Raises:
        TypeError: no sets are given, and the model has no tower to make them of.
        ValueError: settings out of range; a prompt without image tokens, or whose last row is padding; patches that are
            not the image tokens; sets that do not fit the prompt; a contrast with BLIP-2 or InstructBLIP without
            ``blind``.

    Example::

        with PAINT(model, alpha=0.7, beta=0.4):
            model.generate(**inputs, max_new_tokens=512)
    """

    _: KW_ONLY
    local: Sequence[Tensor] | Tensor | None = None
    summary: Sequence[Tensor] | Tensor | None = None
    alpha: float = 0.7
    beta: float = 0.4
    head_mode: Literal["uniform", "visual-share"] = "uniform"
    local_share: float = 0.25
    spatial_share: float = 0.0
    whisker: float = 1.5
    gamma: float = 1.0
    plausibility: float = 0.1
    blind: Mapping[str, Tensor] | None = None
    sets: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "whisker"):
            check_range(name, getattr(self, name), 0)
        for name in ("local_share", "spatial_share", "plausibility"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("gamma", self.gamma, 1)
        if self.head_mode not in ("uniform", "visual-share"):
            raise ValueError(f"head_mode must be 'uniform' or 'visual-share'; it was {self.head_mode!r}")
        if self.local is None and self.summary is None:
            try:
                count = len(tower_layers(self.model))
                TowerAttention(self.model, layers=[0])
            except TypeError as error:
                raise TypeError(f"{error}; pass the sets yourself: local=..., summary=...") from None
            if count < 2:
                raise TypeError("the summary set is of the tower's last layer but one, it has one; pass the sets")
        self.fuses = self.gamma != 1
        if self.fuses and self.blind is None and getattr(self.model.config, "qformer_config", None) is not None:
            raise ValueError(
                f"{type(self.model).__name__} reads no prompt without a picture: pass blind=..., a grey one"
            )
        self._shares: dict[int, Tensor] = {}
        self._strength: Tensor | None = None
        self._branch: Branch | None = None
        self._blind: Mapping[str, Any] = {}

    def default_layers(self, count: int) -> frozenset[int]:
        """All but the first two."""
        if count < 3:
            raise ValueError(f"layers from 2 on are its default, the model has {count}: pass layers=...")
        return frozenset(range(2, count))

    def begin(self, run: Run) -> None:
        """Make the sets of this prompt."""
        self._drop()
        self.sets = None
        spans = known(run.spans)
        spans.check_images("PAINT")
        spans.check_ends()
        if self.local is None and self.summary is None:
            local, summary = self._see(run, spans)
        else:
            none = torch.zeros_like(spans.kinds, dtype=torch.bool)
            given = {"local": self.local, "summary": self.summary}
            local, summary = (
                none if sets is None else spans.marked(name, sets, "image") for name, sets in given.items()
            )
        self.sets = local & ~summary, summary
        self._strength = self.alpha * self.sets[0].float() + self.beta * summary.float()
        if self.fuses and run.generating:
            self._blind = self.blind if self.blind is not None else without_image(run.inputs, spans)

    @torch.no_grad()
    def _see(self, run: Run, spans: SpanMap) -> tuple[Tensor, Tensor]:
        pixels = run.inputs.get("pixel_values")
        if pixels is None:
            raise ValueError("the sets are read from pixel_values, which were not given; pass local=..., summary=...")
        kept = {name: run.inputs[name] for name in ("pixel_values", "image_sizes") if name in run.inputs}
        last = len(tower_layers(self.model)) - 2
        patches = TowerAttention(self.model, layers=[0], rows="mean")
        with TowerAttention(self.model, layers={0, last}) as seen, patches if self.spatial_share else nullcontext():
            self.model.get_image_features(**kept)
        first, late = (seen.maps[n].sum(1) for n in (0, last))
        local = local_set(first, self.local_share)
        if self.spatial_share:
            local |= local_set(patches.maps[0].sum(1), self.spatial_share)
        return _placed(self.model, run, spans, torch.stack([local, summary_set(late, self.whisker)]))

    def edits(self, site: Site) -> bool:
        """Not in the first pieces of a prompt that is read in pieces."""
        return (self.alpha > 0 or self.beta > 0) and site.first_key + site.keys >= site.run.prompt

    def rows(self, site: Site) -> Tensor:
        """The newest token's."""
        return site.last

    def scores(self, site: Site, scores: Tensor) -> Tensor:
        """Raise those of the two sets."""
        assert self._strength is not None
        strength = site.over_keys(self._strength).to(scores.device)[:, None, None]
        if self.head_mode == "visual-share":
            if site.prefill:
                image = site.where("image").to(scores.device)[:, None, None]
                self._shares[site.layer] = (scores.softmax(-1) * image).sum(-1, keepdim=True)
            share = site.repeated(self._shares[site.layer])
            weight = share / share.mean(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
            strength = strength * weight.clamp(0, 2)
        return torch.where(strength > 0, raised(scores, strength), scores)

    def logits(self, run: Run, logits: Tensor) -> Tensor:
        """The contrast with the prompt without its image."""
        if not self.fuses:
            return logits
        if self._branch is None:
            self._branch = Branch(self.model, self._blind, len(logits))
        other = self._branch.logits(run.chosen).to(logits.device)
        return lowered(fuse(self.gamma * logits, other, 1 - self.gamma), logits, self.plausibility)

    def end(self, run: Run) -> None:
        """Drop what is of this run only."""
        self._drop()

    def _drop(self) -> None:
        self._shares, self._strength, self._branch, self._blind = {}, None, None, {}


def _placed(model: Any, run: Run, spans: SpanMap, sets: Tensor) -> tuple[Tensor, Tensor]:
    """Sets ``(2, pictures, P)`` of the tower's patches at the prompt's image tokens, two of ``(B, prompt)``."""
    sets = sets.to(spans.kinds.device)
    found = sets.new_zeros(2, *spans.kinds.shape)
    image, patches = spans.mask("image"), sets.shape[2]
    pinpoints, sizes = getattr(model.config, "image_grid_pinpoints", None), run.inputs.get("image_sizes")
    if pinpoints is not None and sizes is not None:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        side, tile = model.config.vision_config.image_size, 0
        counts = iter([image_size_to_num_patches(size, pinpoints, side) for size in sizes.tolist()])
        for row in range(len(image)):
            for at in spans.images(row):
                if len(at) < patches:
                    raise ValueError(_misfit(patches, len(at)))
                found[:, row, at[:patches]] = sets[:, tile]
                tile += next(counts)
    else:
        if int(image.sum()) != sets[0].numel():
            raise ValueError(_misfit(sets[0].numel(), int(image.sum())))
        found[:, image] = sets.flatten(1)
    return found[0], found[1]


def _misfit(patches: int, tokens: int) -> str:
    return f"the tower has {patches} patches, the prompt {tokens} image tokens; pass the sets: local=..., summary=..."


def without_image(inputs: Mapping[str, Any], spans: SpanMap) -> dict[str, Tensor]:
    """A model's arguments for the same prompts without their image tokens, padded on the left.

    Args:
        inputs: with ``input_ids`` or ``inputs_embeds``; of the others only what has a number for each position stays.
        spans: what the positions are.

    Raises:
        ValueError: no prompt.

    >>> ids = torch.tensor([[1, 9, 9, 5]])
    >>> without_image({"input_ids": ids}, SpanMap.of(ids, image_token=9))["input_ids"]
    tensor([[1, 5]])
    """
    prompt_of(inputs)
    keep = (spans.kinds != PADDING) & ~spans.mask("image")
    length = int(keep.sum(1).max())
    given = dict(inputs) | {"attention_mask": keep.long()}
    found = {}
    for name, value in given.items():
        if isinstance(value, Tensor) and value.shape[:2] == keep.shape and name != "position_ids":
            rows = []
            for row, kept in zip(value, keep.to(value.device), strict=True):
                some = row[kept]
                rows.append(torch.cat([some.new_zeros(length - len(some), *some.shape[1:]), some]))
            found[name] = torch.stack(rows)
    return found
