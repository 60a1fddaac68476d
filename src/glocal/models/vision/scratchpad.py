"""Vision transformers that draw on the way to their answer: not at all, one picture, many, or from each to the next.

Lotfi et al., 2024, arXiv 2410.08165.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from glocal.models.registry import register
from glocal.nn import MLP, Attention, Block
from glocal.nn.frame import Call
from glocal.patterns import Pattern, Sliding
from glocal.shapes import Float

__all__ = [
    "Drawn",
    "FrameCausalAttention",
    "Rollout",
    "Scratchpad",
    "ScratchpadViT",
    "scratchpad_vit_b16",
    "scratchpad_vit_l16",
    "scratchpad_vit_s16",
    "scratchpad_vit_tiny",
]

Scratchpad = Literal["none", "single", "multi", "inductive"]
"""What is drawn: nothing; the last frame at once; each frame from all before it; each frame from the one before."""


class FrameCausalAttention(Attention):
    """Tokens of a frame see all tokens of their frame and of those before it: ``(B, T, N, dim)``, T frames."""

    uses: ClassVar[tuple[str, ...]] = ("noncausal-self",)

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        """As the class says."""
        if call.x.dim() != 4:
            raise ValueError(f"x must be frames of tokens, (B, T, N, {self.dim}); it was {tuple(call.x.shape)}")
        frames, tokens = k.shape[2:4]
        return Sliding((frames, tokens), (0, tokens))


class Drawn(NamedTuple):
    """What a model makes of a frame; with several frames, ``(B, T, ...)``."""

    label: Float[Tensor, "*B classes"]
    """Logits."""
    frame: Float[Tensor, "*B channels H W"] | None
    """The next frame, or the last one of a single scratchpad; None where nothing is drawn."""
    halt: Float[Tensor, "*B"] | None
    """Logit of whether the frame that was given is the last one, of inductive scratchpads."""


class Rollout(NamedTuple):
    """How an inductive model, or one of many frames, came to its answer."""

    label: Float[Tensor, "B classes"]
    """Logits at the step at which it halted, or at the last one."""
    frame: Float[Tensor, "B channels H W"]
    """The one on which the answer rests."""
    steps: Tensor
    """Frames that were drawn, ``(B,)``."""
    halted: Tensor
    """Which ones halted by themselves, ``(B,)``; the share of the others belongs into a report."""


class ScratchpadViT(nn.Module):
    """A vision transformer with a class token, learned positions and what it takes to draw.

    Args:
        dim, depth, num_heads: of the transformer.
        scratchpad: of `Scratchpad`.
        size: side of the pictures, in pixels.
        patch: side of a patch.
        channels: of the pictures.
        drawn: channels of what is drawn; as many as the pictures have where None.
        frames: the most that are given at once, of ``"multi"``.
        classes: of the label.
        stem: in place of the patch embedding, from ``(B, channels, H, W)`` to ``(B, dim, H / patch, W / patch)``.

    Raises:
        ValueError: settings that do not fit each other; at use, pictures of another shape.

    >>> model = ScratchpadViT(32, 1, 2, scratchpad="inductive", size=32)
    >>> out = model(torch.rand(2, 3, 32, 32))
    >>> out.label.shape, out.frame.shape, out.halt.shape
    (torch.Size([2, 2]), torch.Size([2, 3, 32, 32]), torch.Size([2]))
    >>> many = ScratchpadViT(32, 1, 2, scratchpad="multi", size=32, frames=4)
    >>> many(torch.rand(2, 4, 3, 32, 32)).frame.shape
    torch.Size([2, 4, 3, 32, 32])
    """

    def __init__(
        self,
        dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        *,
        scratchpad: Scratchpad = "inductive",
        size: int = 224,
        patch: int = 16,
        channels: int = 3,
        drawn: int | None = None,
        frames: int = 1,
        classes: int = 2,
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if scratchpad not in ("none", "single", "multi", "inductive"):
            raise ValueError(f"scratchpad must be 'none', 'single', 'multi' or 'inductive'; it was {scratchpad!r}")
        if size % patch or size < patch:
            raise ValueError(f"size must be a multiple of patch {patch}; it was {size}")
        if frames < 1 or (frames > 1 and scratchpad != "multi"):
            raise ValueError(f"frames must be 1, or more with scratchpad 'multi'; it was {frames}")
        self.scratchpad, self.size, self.patch, self.channels, self.frames = scratchpad, size, patch, channels, frames
        self.drawn = channels if drawn is None else drawn
        many = scratchpad == "multi"
        self.stem = nn.Conv2d(channels, dim, patch, stride=patch) if stem is None else stem
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.place = nn.Parameter(torch.zeros((size // patch) ** 2 + 1, dim))
        self.time = nn.Parameter(torch.zeros(frames, 1, dim)) if many else None
        layer = FrameCausalAttention if many else Attention
        self.blocks = nn.ModuleList(
            Block(dim, layer(dim, num_heads, qkv_bias=True, out_bias=True), MLP(dim, 4 * dim)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, classes)
        self.pixels = None if scratchpad == "none" else nn.Linear(dim, patch * patch * self.drawn)
        self.halt = nn.Linear(dim, 1) if scratchpad == "inductive" else None
        for weight in (self.token, self.place, *(() if self.time is None else (self.time,))):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, frames: Float[Tensor, "*B channels H W"]) -> Drawn:
        """A frame to the answer and the next frame.

        Args:
            frames: ``(B, channels, size, size)``, or ``(B, T, channels, size, size)`` with the scratchpad "multi".
        """
        many = self.time is not None
        wanted = (self.channels, self.size, self.size)
        if frames.dim() != 4 + many or tuple(frames.shape[-3:]) != wanted or (many and frames.shape[1] > self.frames):
            most = f"up to {self.frames}, " if many else ""
            raise ValueError(
                f"frames must be (B, {most}{', '.join(map(str, wanted))}) with scratchpad {self.scratchpad!r}; it was "
                f"{tuple(frames.shape)}"
            )
        lead = frames.shape[: 1 + many]
        x = self.stem(frames.flatten(0, -4)).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        if self.time is not None:
            x = x.unflatten(0, lead) + self.time[: lead[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        first, patches = x[..., 0, :], x[..., 1:, :]
        drawn = None if self.pixels is None else self._picture(self.pixels(patches))
        return Drawn(self.head(first), drawn, None if self.halt is None else self.halt(first)[..., 0])

    def _picture(self, rows: Tensor) -> Tensor:
        """``(..., patches, patch * patch * drawn)`` to ``(..., drawn, H, W)``."""
        side, p = self.size // self.patch, self.patch
        cells = rows.unflatten(-1, (self.drawn, p, p)).unflatten(-4, (side, side))  # (..., h, w, C, p, p)
        cells = cells.movedim(-3, -5).movedim(-2, -3)  # (..., C, h, p, w, p)
        picture: Tensor = cells.flatten(-2).flatten(-3, -2)
        return picture

    @torch.no_grad()
    def roll_out(self, frame: Float[Tensor, "B channels H W"], settle: Callable[..., Tensor], cap: int = 64) -> Rollout:
        """Draw until the model says that it is done, and answer from there.

        Args:
            frame: the puzzle, ``(B, channels, size, size)``.
            settle: rounds what was drawn, ``(B, drawn, size, size)``, with the frame before it as the second argument,
                to the next frame: this keeps long drawings from going astray. To colours of a palette,
                `glocal.models.vision.scratchpad_training.nearest_colour`.
            cap: frames that are drawn at most. With the scratchpad "multi", which does not halt, how many.

        Raises:
            ValueError: a model that draws at most once.
        """
        if self.scratchpad not in ("multi", "inductive"):
            raise ValueError(f"roll_out needs scratchpad 'multi' or 'inductive'; it was {self.scratchpad!r}")
        if cap < 0 or (self.time is not None and cap >= self.frames):
            raise ValueError(f"cap must be from 0, and below frames {self.frames} with 'multi'; it was {cap}")
        steps = torch.zeros(len(frame), dtype=torch.long, device=frame.device)
        halted = torch.zeros_like(steps, dtype=torch.bool)
        if self.time is not None:
            frames = frame[:, None]
            for _ in range(cap):
                last = self(frames).frame[:, -1]
                frames = torch.cat([frames, settle(last, frames[:, -1])[:, None]], 1)
            return Rollout(self(frames).label[:, -1], frames[:, -1], steps + cap, halted)
        out = self(frame)
        label = out.label
        for step in range(cap + 1):
            label = torch.where(halted[:, None], label, out.label)
            halted = halted | (out.halt > 0)
            if step == cap or bool(halted.all()):
                break
            drawn = settle(out.frame, frame)
            frame = torch.where(halted[:, None, None, None], frame, drawn)
            steps = steps + ~halted
            out = self(frame)
        return Rollout(label, frame, steps, halted)


def _sized(sizes: dict[str, Any], options: dict[str, Any]) -> ScratchpadViT:
    return ScratchpadViT(**(sizes | options))


@register
def scratchpad_vit_s16(**options: Any) -> ScratchpadViT:
    """ViT-S with patches of 16; options are those of `ScratchpadViT`."""
    return _sized({"dim": 384, "depth": 12, "num_heads": 6}, options)


@register
def scratchpad_vit_b16(**options: Any) -> ScratchpadViT:
    """ViT-B with patches of 16."""
    return _sized({"dim": 768, "depth": 12, "num_heads": 12}, options)


@register
def scratchpad_vit_l16(**options: Any) -> ScratchpadViT:
    """ViT-L with patches of 16."""
    return _sized({"dim": 1024, "depth": 24, "num_heads": 16}, options)


@register
def scratchpad_vit_tiny(**options: Any) -> ScratchpadViT:
    """For tests and small machines: 2 layers of 48 channels, pictures of 64 pixels in patches of 8."""
    return _sized({"dim": 48, "depth": 2, "num_heads": 4, "size": 64, "patch": 8}, options)
