"""VAR: image tokens that draw attention without use are found, and their attention goes to the other image tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch
from torch import Tensor

from glocal.steer.hooks import Run, Site
from glocal.steer.method import Method, check_range, layer_range
from glocal.steer.spans import ANSWER, QUESTION, known
from glocal.steer.steering import Steering, language_layers

__all__ = ["VAR", "find_sink_dims", "redistributed", "sink_scores"]

_EPSILON = 1e-6


def sink_scores(states: Tensor, dims: Iterable[int]) -> Tensor:
    """How far a token's state stands out in the sink dimensions: ``max |x_d| / sqrt(mean(x^2) + 1e-6)`` over ``dims``.

    Args:
        states: of the residual stream, ``(..., C)``; half precision is widened.
        dims: where massive activations are.

    Returns:
        ``(...)`` in float32 or wider; at most ``sqrt(C)``.

    Raises:
        ValueError: no dimension, or one that is not there.

    >>> sink_scores(torch.tensor([[3.0, 0.0, 0.0, 4.0]]), [0])
    tensor([1.2000])
    """
    numbers = sorted(layer_range(dims, states.shape[-1], "dims"))
    return _normalised(states)[..., numbers].abs().amax(-1)


def _normalised(states: Tensor) -> Tensor:
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return wide * (wide.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()


def find_sink_dims(
    model: Any, inputs: Mapping[str, Any], *, tau: float = 20.0, layers: Iterable[int] | None = None
) -> tuple[int, ...]:
    """The dimensions in which a model's first token has massive activations: those of its sinks.

    The model reads the prompts once. A dimension counts where the first token's normalised value is beyond ``tau`` in
    more than half of the layers and rows. For LLaVA-1.5 the authors have 1415 and 2533 (7B), 2100 and 4743 (13B).

    Args:
        model: a transformers model with a causal language model in it.
        inputs: its arguments, any prompts; the first token is the first that is not padding.
        tau: the least normalised value.
        layers: whose input is read; the middle half where None.

    Returns:
        Their numbers in order; empty where there are none.

    Raises:
        TypeError: a model without a causal language model.
        ValueError: layers that are not there; a tau that cannot be reached at the model's width.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, bos_token_id=None, eos_token_id=None))
    >>> model.get_input_embeddings().weight.data[1, 7] = 100.0
    >>> find_sink_dims(model, {"input_ids": torch.tensor([[1, 5, 6]])}, tau=4.0)
    (7,)
    """
    count = len(language_layers(model))
    _check_tau(model, tau)
    probe = _First(model, layers=range(count // 4, count - count // 4) if layers is None else layers)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}
    with torch.no_grad(), Steering.of(model).only(probe):
        model(**tensors, use_cache=False)
    beyond = torch.stack([(_normalised(first).abs() > tau).double().mean(0) for first in probe.firsts])
    return tuple(int(n) for n in (beyond.mean(0) > 0.5).nonzero()[:, 0])


@dataclass
class _First(Method):
    """Keeps the first token's state at the entry of each layer."""

    firsts: list[Tensor] = field(default_factory=list, init=False)

    acts_in_attention = False

    def residual(self, layer: int, run: Run, states: Tensor) -> Tensor:
        mask = run.inputs.get("attention_mask")
        at = torch.zeros(len(states), dtype=torch.long, device=states.device)
        if mask is not None and mask.shape == states.shape[:2]:
            at = mask.to(at).argmax(1)
        self.firsts.append(states[torch.arange(len(states), device=states.device), at].cpu())
        return states


def _check_tau(model: Any, tau: float) -> None:
    width = model.config.get_text_config(decoder=True).hidden_size
    if not 0 < tau < width**0.5:
        raise ValueError(
            f"tau must be from 0 to {width**0.5:.3g}, the square root of the model's width {width}: no token exceeds "
            f"that; it was {tau:g}"
        )


def redistributed(
    weights: Tensor, image: Tensor, sinks: Tensor, *, removed: float = 0.6, rho: float = 0.8, share: float = 0.2
) -> Tensor:
    """Attention of image-centric rows, a part of that on sinks moved to the image tokens that are none.

    A row, of any head, is image-centric where its weight ``v`` on the image is at least ``share``, and of that at least
    ``rho`` is on tokens that are no sinks. There sinks of image and text keep ``1 - removed`` of their weight, and the
    image's other tokens share what is taken in proportion to what they have. Sums stay.

    Args:
        weights: after the softmax, ``(B, H, R, K)``.
        image: which keys are image tokens, booleans ``(B, K)``.
        sinks: which keys are sinks, the same.
        removed: the part taken. The authors' README names what stays.
        rho: the least part of the image's weight on tokens that are no sinks.
        share: the least weight on the image.

    Returns:
        ``(B, H, R, K)``; rows that are not image-centric are bit for bit as they were.

    Raises:
        ValueError: settings that are not from 0 to 1, or shapes that do not fit.

    >>> row = torch.tensor([0.2, 0.2, 0.1, 0.5]).view(1, 1, 1, 4)
    >>> keys = torch.tensor([[True, True, True, False]]), torch.tensor([[True, False, False, False]])
    >>> redistributed(row, *keys, removed=0.5, rho=0.5).flatten()
    tensor([0.1000, 0.2667, 0.1333, 0.5000])
    """
    for name, value in (("removed", removed), ("rho", rho), ("share", share)):
        check_range(name, value, 0, 1)
    wanted = (weights.shape[0], weights.shape[-1])
    for name, mask in (("image", image), ("sinks", sinks)):
        if mask.shape != wanted:
            raise ValueError(f"{name} must be (B, K), here {wanted}; it was {tuple(mask.shape)}")
    image, sinks = image[:, None, None], sinks[:, None, None]
    seen = (weights * image).sum(-1, keepdim=True)
    useful = (weights * (image & ~sinks)).sum(-1, keepdim=True)
    chosen = (seen >= share) & (useful >= rho * seen) & (useful > 0)
    budget = removed * (weights * sinks).sum(-1, keepdim=True)
    more = weights + weights * (budget / torch.where(chosen, useful, 1.0))
    changed = torch.where(sinks, (1 - removed) * weights, torch.where(image, more, weights))
    return torch.where(chosen, changed, weights)


@dataclass
class VAR(Method):
    """Visual attention redistribution (Kang et al., 2025, arXiv 2503.03321): attention on sinks put to use.

    Some image tokens draw attention whatever is asked; they are known by massive activations in a few dimensions of
    the residual stream. Their tokens are found while the prompt is read, at the entry of each layer, and stay sinks.
    In heads that look at the picture, `redistributed` moves a part of the attention on them, and on the sinks of the
    text, to the other image tokens: for the rows of the text after the first image, and for every token generated.

    Args:
        model: a vision-language model of transformers.
        layers: from the third to the last but one where None. The authors' code has the last one too, by an oversight.
        removed: the part of the sinks' attention that is taken. The authors' code keeps 0.6: that is 0.4 here.
        rho: a head acts where at least this part of its attention on the image is on tokens that are no sinks. 0.8 in
            general, 0.5 against hallucination, 0.9 for questions of vision. The code's own rho bounds the sinks' part.
        share: and where at least so much of its attention is on the image.
        tau: a token is a sink where its normalised value is above.
        dims: the sink dimensions; where None, `find_sink_dims` finds them at the first prompt, by one more run of it.
        sinks: instead of all that, for each row of the batch the positions ``(n,)`` of its sinks in the prompt, or
            booleans ``(prompt,)``; the same for every layer.
        decode_only: leave the prompt's rows alone, the one that chooses the first token among them.

    Attributes:
        found: the sink dimensions in use.
        flags: of the newest run, for each layer which positions of the prompt are sinks, ``(B, prompt)``.

    Raises:
        TypeError: as in `Method`.
        ValueError: settings out of range; no layer from the third to the last but one; a prompt without image tokens,
            sinks that do not fit it; a model without massive activations beyond tau in its first token.

    Example::

        with VAR(model, rho=0.5):
            model.generate(**inputs)
    """

    _: KW_ONLY
    removed: float = 0.6
    rho: float = 0.8
    share: float = 0.2
    tau: float = 20.0
    dims: Iterable[int] | None = None
    sinks: Sequence[Tensor] | Tensor | None = None
    decode_only: bool = False
    found: tuple[int, ...] = field(default=(), init=False)
    flags: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("removed", "rho", "share"):
            check_range(name, getattr(self, name), 0, 1)
        if self.sinks is None:
            _check_tau(self.model, self.tau)
            if self.dims is not None:
                width = self.model.config.get_text_config(decoder=True).hidden_size
                self.found = tuple(sorted(layer_range(self.dims, width, "dims")))
        elif self.dims is not None:
            raise ValueError("sinks are given, or found in dims; both were given")

    def default_layers(self, count: int) -> frozenset[int]:
        """From the third to the last but one."""
        if count < 4:
            raise ValueError(f"layers from 2 to the last but one are its default, the model has {count}: pass layers=")
        return frozenset(range(2, count - 1))

    def begin(self, run: Run) -> None:
        """Check the prompt; find the dimensions, once."""
        self.flags = {}
        spans = known(run.spans)
        spans.check_images("VAR")
        if self.sinks is not None:
            self.flags = dict.fromkeys(self.numbers, spans.marked("sinks", self.sinks))
        elif not self.found and self.removed > 0:
            self.found = find_sink_dims(self.model, run.inputs, tau=self.tau)
            if not self.found:
                raise ValueError(
                    f"no dimension of the first token's states is beyond tau={self.tau:g} in most middle layers: the "
                    "model has no such sinks, or pass dims=... or sinks=..."
                )

    def residual(self, layer: int, run: Run, states: Tensor) -> Tensor:
        """Flag the prompt's sinks, piece by piece where it is read in pieces."""
        if self.sinks is None and self.removed > 0:
            before = self.flags.get(layer)
            if before is None or before.shape[1] < run.prompt:
                flags = sink_scores(states.detach(), self.found) > self.tau
                self.flags[layer] = flags if before is None else torch.cat([before, flags], 1)
        return states

    def edits(self, site: Site) -> bool:
        """In decoding, and in the prompt unless ``decode_only``."""
        return self.removed > 0 and not (site.prefill and self.decode_only)

    def rows(self, site: Site) -> Tensor:
        """Text after the first image of some row, and what is generated."""
        return _text(site).any(0).nonzero()[:, 0]

    def weights(self, site: Site, weights: Tensor) -> Tensor:
        """Move attention off the sinks."""
        flags = site.over_keys(self.flags[site.layer]).to(weights.device)
        image = site.where("image").to(weights.device)
        changed = redistributed(weights, image, flags, removed=self.removed, rho=self.rho, share=self.share)
        return torch.where(_text(site).to(weights.device)[:, None, :, None], changed, weights)


def _text(site: Site) -> Tensor:
    """Which of the rows at hand are text after an image, booleans ``(B, R)``."""
    kinds = site.spans().kinds.to(site.rows.device)[:, site.rows]
    return (kinds == QUESTION) | (kinds == ANSWER)
