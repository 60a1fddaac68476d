"""Two sensors' tokens of one place in one sequence, each scaled by a gate that is learned."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.shapes import Float

__all__ = ["SensorFusion", "contrastive_alignment", "squared_alignment"]


class SensorFusion(nn.Module):
    """Gated concatenation of optical and radar tokens (EarthMind; Shu et al., 2025, arXiv 2506.01667).

    ``coded`` is the authors' code: one number a place, ``s_n = sum_kc Q_kc S_nc R_nc``, and both tokens of the place
    times ``sigmoid(s_n)``; the released inference leaves the gates out. ``s_n`` grows with the channels, so that the
    gates are near 0 or 1 at first, and they cannot prefer one sensor.

    ``adaptive`` is what the paper describes, as we read it: each sensor has a query of its own, the gates are twice the
    softmax over the two of ``<q, norm(token)> / sqrt(C)``, in training and after. Queries begin at 0, and the gates at
    1: it begins as plain concatenation.

    Args:
        dim: channels C of the tokens.
        fusion: ``coded`` or ``adaptive``.
        gate_at_inference: whether gates act in ``eval`` mode; where None, as said above.
        temperature: of the contrastive alignment.

    Raises:
        ValueError: another fusion, ``dim`` below 1, a temperature not above 0; in use, tokens of other shapes.

    >>> fuse = SensorFusion(8, fusion="adaptive")
    >>> optical, radar = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    >>> torch.equal(fuse(optical, radar), torch.cat([radar, optical], 1))
    True
    """

    def __init__(
        self,
        dim: int,
        *,
        fusion: Literal["coded", "adaptive"] = "coded",
        gate_at_inference: bool | None = None,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        if fusion not in ("coded", "adaptive"):
            raise ValueError(f"fusion must be 'coded' or 'adaptive'; it was {fusion!r}")
        if dim < 1:
            raise ValueError(f"dim must be at least 1; it was {dim}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0; it was {temperature}")
        self.fusion, self.temperature = fusion, temperature
        self.gate_at_inference = fusion == "adaptive" if gate_at_inference is None else gate_at_inference
        adaptive = fusion == "adaptive"
        self.query = nn.Parameter(torch.zeros(2, dim) if adaptive else torch.randn(2, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2)) if adaptive else None

    def gates(self, optical: Float[Tensor, "B N dim"], radar: Float[Tensor, "B N dim"]) -> Float[Tensor, "2 B N"]:
        """What the tokens are multiplied by: optical, then radar."""
        _alike(optical, radar, self.query.shape[1])
        if self.norms is None:
            # Only the sum of the two queries matters.
            score = (optical * radar) @ self.query.sum(0)
            return score.sigmoid().expand(2, -1, -1)
        scale = optical.shape[-1] ** -0.5
        pairs = zip(self.norms, self.query, (optical, radar), strict=True)
        scores = torch.stack([(norm(tokens) @ query) * scale for norm, query, tokens in pairs])
        return 2 * scores.softmax(0)

    def forward(self, optical: Float[Tensor, "B N dim"], radar: Float[Tensor, "B N dim"]) -> Float[Tensor, "B M dim"]:
        """``(B, 2 N, C)``: radar's tokens, then the optical ones."""
        _alike(optical, radar, self.query.shape[1])
        if self.training or self.gate_at_inference:
            gate = self.gates(optical, radar)
            optical, radar = (t * g[..., None].to(t.dtype) for t, g in zip((optical, radar), gate, strict=True))
        return torch.cat([radar, optical], 1)

    def alignment(self, optical: Float[Tensor, "B N dim"], radar: Float[Tensor, "B N dim"]) -> Float[Tensor, ""]:
        """The loss that makes the two sensors' tokens of a place alike: squared (``coded``) or contrastive; weight 1.

        Args:
            optical, radar: the projected tokens, before fusion.
        """
        _alike(optical, radar, self.query.shape[1])
        if self.fusion == "coded":
            return squared_alignment(optical, radar)
        return contrastive_alignment(optical, radar, self.temperature)

    def extra_repr(self) -> str:
        return f"{self.query.shape[1]}, fusion={self.fusion!r}, gate_at_inference={self.gate_at_inference}"


def squared_alignment(optical: Float[Tensor, "B N dim"], radar: Float[Tensor, "B N dim"]) -> Float[Tensor, ""]:
    """Mean squared difference of the two sensors' tokens."""
    _alike(optical, radar)
    return F.mse_loss(optical.float(), radar.float()) if _half(optical) else F.mse_loss(optical, radar)


def contrastive_alignment(
    optical: Float[Tensor, "B N dim"], radar: Float[Tensor, "B N dim"], temperature: float = 0.07
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: a token should be nearest to the other sensor's of its place, among those of its picture.

    The mean over places, pictures and both directions of the cross-entropy of cosines over the temperature. Other
    pictures of the batch are no negatives, so that a picture's loss does not depend on its neighbours.

    >>> eye = torch.eye(4)[None]
    >>> bool(contrastive_alignment(eye, eye) < 1e-4 < contrastive_alignment(eye, eye.flip(1)))
    True
    """
    _alike(optical, radar)
    one, other = (F.normalize(t.float() if _half(t) else t, dim=-1) for t in (optical, radar))
    logits = one @ other.mT / temperature
    target = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape[:2])
    both = [F.cross_entropy(each.flatten(0, 1), target.flatten()) for each in (logits, logits.mT)]
    return (both[0] + both[1]) / 2


def _half(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)


def _alike(optical: Tensor, radar: Tensor, dim: int | None = None) -> None:
    if optical.dim() != 3 or optical.shape != radar.shape or (dim is not None and optical.shape[-1] != dim):
        width = "C" if dim is None else dim
        raise ValueError(
            f"optical and radar must be (B, N, {width}) alike; they were {tuple(optical.shape)} and "
            f"{tuple(radar.shape)}"
        )
