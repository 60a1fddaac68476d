"""Poses of cameras, rays in their frames, and what attention can compare of them: sines and cosines by octaves.

A camera is a rigid motion from the world to its own frame, ``(4, 4)``: a point p of the world is at ``R p + t``. That
is the inverse of what is often called the camera's pose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from glocal.shapes import Float

__all__ = ["RayEncoding", "Rays", "RelativePoses", "camera_centres", "octaves", "to_cameras"]


class Rays(NamedTuple):
    """Half lines, in the units of the cameras' translations."""

    origins: Float[Tensor, "*lead 3"]
    directions: Float[Tensor, "*lead 3"]
    """Of unit length."""


class RelativePoses(NamedTuple):
    """Encoded poses that do not depend on the choice of the world's frame. Made by `RayEncoding.relative`."""

    queries: Float[Tensor, "B V N P"] | None
    """Of each query in the frame of each camera; None where queries know of it by themselves."""
    keys: Float[Tensor, "B V L P"]
    """Of each key in the frame of its own camera."""


def octaves(x: Float[Tensor, "*lead n"], count: int, start: int = 0) -> Float[Tensor, "*lead channels"]:
    """Sines, then cosines, of each number at frequencies ``pi 2^s`` for ``s`` from ``start``; not learned.

    Args:
        x: ``(..., n)``.
        count: of frequencies.
        start: the lowest one's power of two; -5 has a period of 64.

    Returns:
        ``(..., 2 n count)``, a number's octaves side by side.

    >>> octaves(torch.tensor([0.5, 0.25]), 2).tolist()  # sines of pi/2, pi, pi/4, pi/2, and their cosines
    [1.0, -8.74...e-08, 0.707..., 1.0, -4.37...e-08, -1.0, 0.707..., -4.37...e-08]
    """
    steps = torch.arange(start, start + count, device=x.device, dtype=x.dtype)
    angles = (x.unsqueeze(-1) * (math.pi * 2**steps)).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], -1)


def camera_centres(cameras: Float[Tensor, "*lead 4 4"]) -> Float[Tensor, "*lead 3"]:
    """Where cameras stand in the world, ``-R^T t``.

    >>> camera = torch.eye(4)
    >>> camera[:3, 3] = torch.tensor([0.0, 0.0, 2.0])  # the world's origin is 2 before it
    >>> (camera_centres(camera) + 0).tolist()
    [0.0, 0.0, -2.0]
    """
    turn, shift = _parts(cameras)
    return -_turned(turn.mT, shift[..., None, :])[..., 0, :]


def to_cameras(cameras: Float[Tensor, "B V 4 4"], rays: Rays) -> Rays:
    """Rays of the world in the frame of every camera.

    Args:
        cameras: world to camera, ``(B, V, 4, 4)``.
        rays: ``(B, N, 3)`` origins and directions.

    Returns:
        ``(B, V, N, 3)`` each; directions are turned only.

    Raises:
        ValueError: shapes that do not fit.

    >>> rays = Rays(torch.zeros(2, 5, 3), torch.ones(2, 5, 3))
    >>> to_cameras(torch.eye(4).expand(2, 3, 4, 4), rays).origins.shape
    torch.Size([2, 3, 5, 3])
    """
    if cameras.dim() != 4:
        raise ValueError(f"cameras must be (B, V, 4, 4); it was {tuple(cameras.shape)}")
    turn, shift = _parts(cameras)
    for name, each in rays._asdict().items():
        if each.dim() != 3 or len(each) != len(cameras) or each.shape[-1] != 3:
            raise ValueError(f"{name} of rays must be ({len(cameras)}, N, 3); it was {tuple(each.shape)}")
    origins, directions = (_turned(turn, each[:, None]) for each in rays)
    return Rays(origins + shift[..., None, :], directions)


@dataclass(frozen=True)
class RayEncoding:
    """A ray as numbers that attention compares: `octaves` of its origin, and of its direction.

    With the 15 and 15 of RePAST (Safin et al., 2023, arXiv 2304.00947) the highest frequency is ``2^14 pi``, at which
    what float32 rounds shows in the second digit: take fewer where a change of the world's frame must change nothing.
    Octaves are fixed, so that the unit of length counts: the lowest has a period of ``2^(1 - start)``.

    Args:
        origin_octaves, origin_start: number and lowest power of two of the frequencies of origins.
        direction_octaves, direction_start: those of directions.

    Raises:
        ValueError: no octaves.

    >>> encoding = RayEncoding()
    >>> encoding.channels, encoding(Rays(torch.zeros(7, 3), torch.ones(7, 3))).shape
    (180, torch.Size([7, 180]))
    """

    origin_octaves: int = 15
    origin_start: int = -5
    direction_octaves: int = 15
    direction_start: int = 0

    def __post_init__(self) -> None:
        if min(self.origin_octaves, self.direction_octaves) < 1:
            raise ValueError(
                f"origin_octaves and direction_octaves must be at least 1; they were {self.origin_octaves} and "
                f"{self.direction_octaves}"
            )

    @property
    def channels(self) -> int:
        """Of what it makes."""
        return 6 * (self.origin_octaves + self.direction_octaves)

    def __call__(self, rays: Rays) -> Float[Tensor, "*lead channels"]:
        """``(..., 3)`` and ``(..., 3)`` to ``(..., channels)``, in float32 or the wider type of the rays."""
        wide = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in rays]
        origins = octaves(wide[0], self.origin_octaves, self.origin_start)
        return torch.cat([origins, octaves(wide[1], self.direction_octaves, self.direction_start)], -1)

    def relative(
        self,
        cameras: Float[Tensor, "B V 4 4"],
        directions: Float[Tensor, "B V L 3"],
        queries: Rays | None = None,
    ) -> RelativePoses:
        """Keys in the frames of their own cameras, and queries in those of all cameras.

        Args:
            cameras: world to camera, ``(B, V, 4, 4)``.
            directions: of the keys' rays in the world, from the centres of their cameras, ``(B, V, L, 3)``.
            queries: rays in the world, ``(B, N, 3)`` each; those of the keys, view by view, where None.

        Returns:
            Queries ``(B, V, N, channels)`` and keys ``(B, V, L, channels)``. Those of origins are constant for keys.

        Raises:
            ValueError: shapes that do not fit.

        >>> poses = RayEncoding().relative(torch.eye(4).expand(1, 2, 4, 4), torch.ones(1, 2, 5, 3))
        >>> poses.queries.shape, poses.keys.shape
        (torch.Size([1, 2, 10, 180]), torch.Size([1, 2, 5, 180]))
        """
        turn, _ = _parts(cameras)
        if directions.dim() != 4 or directions.shape[:2] != cameras.shape[:2] or directions.shape[-1] != 3:
            want = ", ".join(map(str, cameras.shape[:2]))
            raise ValueError(f"directions must be ({want}, L, 3); it was {tuple(directions.shape)}")
        if queries is None:
            centres = camera_centres(cameras)[:, :, None].expand(directions.shape)
            queries = Rays(centres.flatten(1, 2), directions.flatten(1, 2))
        own = _turned(turn, directions)
        return RelativePoses(self(to_cameras(cameras, queries)), self(Rays(torch.zeros_like(own), own)))


def _parts(cameras: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation and translation."""
    if cameras.dim() < 2 or cameras.shape[-2:] != (4, 4):
        raise ValueError(f"cameras must be (..., 4, 4), from the world to the camera; it was {tuple(cameras.shape)}")
    return cameras[..., :3, :3], cameras[..., :3, 3]


def _turned(turn: Tensor, x: Tensor) -> Tensor:
    """``turn (..., 3, 3)`` times each of ``x (..., N, 3)``; by no matrix product, which autocast would round."""
    return (turn[..., None, :, :] * x[..., None, :]).sum(-1)
