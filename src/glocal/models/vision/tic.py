"""TiC: stages of attention by kernels, each layer with one convolution for all the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from glocal.models.registry import register
from glocal.nn.conv_attention import MSAConv
from glocal.shapes import Float

__all__ = ["TiC", "tic_ref"]


class TiC(nn.Module):
    """Vision transformer in convolution (Zhang et al., 2023, arXiv 2310.04134), in our reading: theirs is not public.

    A stem to a quarter of the image's size, stages of `MSAConv` of which the last layer leads to half the size and the
    next stage's channels, mean, classifier. No parameter depends on the size of the image.

    Args:
        dims, depths: channels and layers of each stage.
        kernel, num_heads, dilation, border, dropout: as in `MSAConv`, for all.
        shift: how far channels move in every second layer of a stage; half the kernel and 1 where None, 0 for never.
        pooling: between stages the largest of 2 x 2 places goes on, in place of a stride.
        num_classes: outputs; 0 gives the pooled features.
        channels: of the image.

    Images may have any size from 4.

    Raises:
        ValueError: no stages, or not one depth, at least 1, a stage.

    >>> import torch
    >>> from glocal.models.vision.tic import TiC
    >>> TiC((8, 16), (1, 2), kernel=3, num_classes=10).eval()(torch.randn(1, 3, 45, 60)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        *,
        kernel: int = 7,
        num_heads: int = 1,
        dilation: int = 1,
        border: str = "zero",
        dropout: float = 0.1,
        shift: int | None = None,
        pooling: bool = False,
        num_classes: int = 1000,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if not dims or len(dims) != len(depths) or min(depths) < 1:
            raise ValueError(
                f"dims and depths must have one entry a stage, depths from 1; they were {tuple(dims)} and "
                f"{tuple(depths)}"
            )
        shift = kernel // 2 + 1 if shift is None else shift
        common: dict[str, Any] = {"kernel": kernel, "num_heads": num_heads, "dilation": dilation, "border": border}
        self.stem = nn.Conv2d(channels, dims[0], 4, 4)
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if pooling else None
        stages = []
        for dim, then, depth in zip(dims, (*dims[1:], None), depths, strict=True):
            stage: list[nn.Module] = []
            for n in range(depth):
                leads = then is not None and n == depth - 1
                stage.append(
                    MSAConv(
                        *(dim, then if leads else dim),
                        stride=2 if leads and not pooling else 1,
                        dropout=dropout,
                        shift=shift if n % 2 else 0,
                        **common,
                    )
                )
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        # There are no norms: this start keeps the size of what passes the convolutions and their ReLU.
        for module in self.modules():
            if isinstance(module, MSAConv):
                nn.init.kaiming_normal_(module.conv.weight, nonlinearity="relu")

    def forward_features(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        """The map after each stage, ``(B, h, w, dim)``: the size and the channels are those of the next stage."""
        if x.dim() != 4 or min(x.shape[2:]) < 4:
            raise ValueError(f"x must be images (B, channels, H, W) of 4 pixels or more; it was {tuple(x.shape)}")
        x, maps = self.stem(x).movedim(1, -1), []
        for number, layers in enumerate(self.stages):
            x = layers(x)
            if self.pool is not None and number < len(self.stages) - 1:
                x = self.pool(x.movedim(-1, 1)).movedim(1, -1)
            maps.append(x)
        return tuple(maps)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B num_classes"]:
        """Images to logits."""
        out: Tensor = self.head(self.forward_features(x)[-1].mean((1, 2)))
        return out


@register
def tic_ref(**options: Any) -> TiC:
    """Our own sizes: the paper's are not known to us; 224 pixels."""
    return TiC(**options)
