"""Relative pose attention over views: a query is expressed in the frame of each camera whose keys it is compared with.

RePAST, Safin et al., 2023, arXiv 2304.00947.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from glocal.attention import merge
from glocal.nn.frame import Attention, Call
from glocal.patterns import Full, Keys
from glocal.poses import RelativePoses
from glocal.shapes import Bool, Float

__all__ = ["RelativePoseAttention"]

_NO_ORDER = "views have no order"


class RelativePoseAttention(Attention):
    """Softmax over the keys of all views, where a query is another one for each view: it knows its pose there.

    Queries are projections of ``[x; pose in the key's camera]``, keys of ``[x; pose in their own camera]``. The
    world's frame has no part in it, so that results do not depend on its choice. A projection of two things side by
    side is a sum of two: the content's part is computed once a query, the pose's once a query and view.

    Args:
        dim, num_heads: as in `Attention`, with its options but for ``rope``, ``lepe``, ``gate`` and causal uses.
        pose_dim: channels of the encoded poses, of `glocal.poses.RayEncoding`.
        query_pose: False where the input itself is one copy of each query for each camera, as in RePAST's decoder.
        value_pose: values see poses as keys do.
        out_bias: True unless told otherwise. A ``scale`` of 1.0 leaves scores as in the one public implementation.

    Raises:
        ValueError: options that it has not, or what `Attention` refuses.

    >>> import torch
    >>> from glocal.poses import RayEncoding
    >>> encoding, cameras = RayEncoding(), torch.eye(4).expand(1, 3, 4, 4)
    >>> poses = encoding.relative(cameras, torch.randn(1, 3, 5, 3))
    >>> layer = RelativePoseAttention(32, 4)
    >>> layer(torch.randn(1, 3, 5, 32), poses=poses).shape  # 3 views of 5 tokens
    torch.Size([1, 3, 5, 32])
    """

    uses: ClassVar[tuple[str, ...]] = ("noncausal-self", "noncausal-cross")
    refuses: ClassVar[dict[str, str]] = {"causal-self": _NO_ORDER, "causal-cross": _NO_ORDER}

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        pose_dim: int = 180,
        query_pose: bool = True,
        value_pose: bool = False,
        **options: Any,
    ) -> None:
        for name in ("rope", "lepe", "gate"):
            if options.get(name):
                raise ValueError(f"{name} must be left out: poses stand for positions; it was {options[name]!r}")
        if pose_dim < 1:
            raise ValueError(f"pose_dim must be at least 1; it was {pose_dim}")
        super().__init__(dim, num_heads, **{"out_bias": True, **options})
        self.pose_dim = pose_dim
        wide, narrow = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_pose = nn.Linear(pose_dim, wide, bias=False) if query_pose else None
        self.k_pose = nn.Linear(pose_dim, narrow, bias=False)
        self.v_pose = nn.Linear(pose_dim, narrow, bias=False) if value_pose else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, cut at two deviations of one over the root of all that goes into a projection; biases are zero."""
        pairs = (
            (self.q_proj, self.q_pose),
            (self.k_proj, self.k_pose),
            (self.v_proj, self.v_pose),
            (self.o_proj, None),
        )
        for pair in pairs:
            parts = [part for part in pair if part is not None]
            std = sum(part.in_features for part in parts) ** -0.5
            for part in parts:
                nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        at_q, at_k = call.at
        if at_k is None or at_k.dim() != 4:  # counted positions: no poses
            return super().mix(q, k, v, call)
        views, count = at_k.shape[1:3]
        # By view, (B, H, V, tokens, D).
        k, v = k.view(*k.shape[:2], views, count, -1), v.view(*v.shape[:2], views, count, -1)
        k = k + self.heads(self.k_pose(at_k), self.num_kv_heads)
        if self.v_pose is not None:
            v = v + self.heads(self.v_pose(at_k), self.num_kv_heads)
        if self.q_pose is not None:
            q = q.flatten(2, -2).unsqueeze(2) + self.heads(self.q_pose(at_q), self.num_heads)
        if self.qk_norm is not None:
            q, k = self._normalise(q, self.q_norm), self._normalise(k, self.k_norm)
        where = self.where(q, k, call)
        if where == Full() and self.score(call) is None:
            parts = self._views_at_once(q, k, v, call)
        else:
            parts = []
            flat = k.flatten(2, 3), v.flatten(2, 3)
            for view in range(views):
                own = torch.arange(views * count, device=q.device) // count == view
                here = where & Keys(own.expand(len(q), -1))
                parts.append(self.attend(q[:, :, view], *flat, here, call, return_lse=True))
        return merge(parts)

    def _views_at_once(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> list[tuple[Tensor, Tensor]]:
        """Attention to each view apart, as items of one batch; what and how much each query sees there."""
        views = k.shape[2]
        real = None if call.real is None else call.real.reshape(-1, k.shape[3])
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        out, lse = self.attend(q, k, v, Full(), call._replace(real=real), return_lse=True)
        return [(out[view::views], lse[view::views]) for view in range(views)]

    def forward(
        self,
        x: Float[Tensor, "B *grid_q dim"],
        context: Float[Tensor, "B *grid_k kv_dim"] | None = None,
        *,
        poses: RelativePoses | None = None,
        keys: Bool[Tensor, "B *grid_k"] | None = None,
        **more: Any,
    ) -> Float[Tensor, "B *grid dim"]:
        """Attend.

        Args:
            x: ``(B, V, L, dim)``, V views of L tokens; with a context, queries ``(B, N, dim)``, or with
                ``query_pose=False`` their copies ``(B, V, N, dim)``.
            context: views to attend to, ``(B, V, L, kv_dim)``; ``x`` where None.
            poses: of queries and keys, as made by `glocal.poses.RayEncoding.relative`. Where None there are none: it
                is attention by content, over any grid.
            keys: booleans ``(B, V, L)``, true for what is no padding.
            more: as in `Attention`, where there are no poses.

        Returns:
            ``(B, V, L, dim)``, or with a context ``(B, N, dim)``, for copies too.

        Raises:
            ValueError: shapes that do not fit.
        """
        if poses is None:
            return super().forward(x, context, keys=keys, **more)
        source = x if context is None else context
        self._check(x, context, poses, keys, more)
        at_q, at_k = (None if t is None else t.to(x.dtype) for t in poses)
        real = None if keys is None else keys.flatten(1)
        q, k, v = self.share(*self.make(x, source.flatten(1, 2)))
        call = Call(x, source, real, None, context is not None, (at_q, at_k))
        mixed = self.mix(q, k, v, call)
        mixed = mixed.view_as(q) if context is None else mixed
        out: Tensor = self.o_proj(self.combine(mixed, call).movedim(1, -2).flatten(-2))
        return out

    def _check(
        self, x: Tensor, context: Tensor | None, poses: RelativePoses, keys: Tensor | None, more: dict[str, Any]
    ) -> None:
        own, source = self.q_pose is None, x if context is None else context
        if more:
            raise ValueError(f"{', '.join(more)} must be left out where there are poses")
        if context is None and own:
            raise ValueError("context must be given with query_pose=False, which is for queries of other tokens")
        batch, views, count = source.shape[:3] if source.dim() == 4 else (0, 0, 0)
        if source.dim() != 4 or source.shape[-1] != (self.dim if context is None else self.kv_dim):
            name, width = ("x", self.dim) if context is None else ("context", self.kv_dim)
            raise ValueError(f"{name} must be (B, V, L, {width}); it was {tuple(source.shape)}")
        lead = (batch, views) if own else (batch,)
        if context is not None and (
            x.dim() != len(lead) + 2 or x.shape[: len(lead)] != lead or x.shape[-1] != self.dim
        ):
            want = ", ".join(map(str, (*lead, "N", self.dim)))
            raise ValueError(f"x must be ({want}) for context {tuple(source.shape)}; it was {tuple(x.shape)}")
        asks = views * count if context is None else x.shape[-2]
        wanted: dict[str, tuple[Tensor | None, tuple[int, ...] | None]] = {
            "keys of poses": (poses.keys, (batch, views, count, self.pose_dim)),
            "queries of poses": (poses.queries, None if own else (batch, views, asks, self.pose_dim)),
        }
        for name, (given, shape) in wanted.items():
            if (None if given is None else tuple(given.shape)) != shape:
                raise ValueError(f"{name} must be {shape}; it was {None if given is None else tuple(given.shape)}")
        if keys is not None and (keys.dtype != torch.bool or keys.shape != source.shape[:3]):
            raise ValueError(f"keys must be booleans {(batch, views, count)}; it was {keys.dtype} {tuple(keys.shape)}")

    def extra_repr(self) -> str:
        return f"pose_dim={self.pose_dim}"
