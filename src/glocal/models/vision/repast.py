"""RePAST: a scene representation transformer whose pictures are made of relative poses alone.

Safin et al., 2023, arXiv 2304.00947, over the transformer of Sajjadi et al., 2022, arXiv 2111.13152.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from glocal.models.registry import register
from glocal.nn import MLP, Block, RelativePoseAttention
from glocal.poses import RayEncoding, Rays, RelativePoses, to_cameras
from glocal.shapes import Float

__all__ = ["PoseBlock", "RePAST", "Scene", "repast_clevr", "repast_msn", "repast_tiny"]


class Scene(NamedTuple):
    """What `RePAST.encode` makes of pictures, and `RePAST.decode` looks at."""

    tokens: Float[Tensor, "B V L dim"]
    poses: Float[Tensor, "B V L P"]
    """Encoded rays of the tokens in their own cameras."""
    cameras: Float[Tensor, "B V 4 4"]


class PoseBlock(Block):
    """A `glocal.nn.Block` that drops some of what attention gives, and gives it to all copies of a query.

    >>> import torch
    >>> attention = RelativePoseAttention(8, 2, query_pose=False, kv_dim=4)
    >>> block, views = PoseBlock(8, attention, MLP(8, 16)), torch.randn(1, 3, 5, 4)
    >>> poses = RelativePoses(None, torch.randn(1, 3, 5, 180))
    >>> block(torch.randn(1, 3, 7, 8), context=views, poses=poses).shape  # 7 queries, each once for 3 views
    torch.Size([1, 3, 7, 8])
    """

    def __init__(self, dim: int, attention: nn.Module, mlp: nn.Module, *, dropout: float = 0.0, **options: Any) -> None:
        super().__init__(dim, attention, mlp, **options)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """``(B, V, N, dim)`` to the same; options go to the attention."""
        mixed = self.dropout(self.attention(self.norm1(x), **options))
        x = x + (mixed if mixed.dim() == x.dim() else mixed.unsqueeze(1))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class RePAST(nn.Module):
    """Pictures of a scene with their cameras to tokens, and rays through the scene to colours.

    Pictures enter without any pose. Tokens of all views attend to each other with `glocal.nn.RelativePoseAttention`. A
    ray is one query for each camera, made of the ray in that camera's frame, and stays there to the end, where its
    copies are averaged.

    Args:
        dim, num_heads: of the encoder's blocks; the decoder attends with as many channels.
        depth, decoder_depth: blocks of the encoder and of the decoder.
        conv_dim: channels that the convolutions end with, a multiple of 8.
        render_hidden: channels of the layers that make colours.
        encoding: of rays; also the decoder's width.
        dropout: of feed-forwards and of what attention gives.
        options: of all attention, for example ``scale=1.0`` for weights of the public implementation, or
            ``value_pose``.

    Raises:
        ValueError: sizes that do not divide, or options that the layers refuse.

    >>> import glocal, torch
    >>> model = glocal.create("repast_tiny")
    >>> images, cameras = torch.rand(1, 2, 3, 16, 24), torch.eye(4).expand(1, 2, 4, 4)
    >>> scene = model.encode(images, cameras, torch.randn(1, 2, 16, 24, 3))
    >>> scene.tokens.shape, model.decode(scene, Rays(torch.zeros(1, 5, 3), torch.randn(1, 5, 3))).shape
    (torch.Size([1, 2, 6, 32]), torch.Size([1, 5, 3]))
    """

    def __init__(
        self,
        dim: int = 768,
        num_heads: int = 8,
        depth: int = 5,
        *,
        conv_dim: int = 768,
        decoder_depth: int = 2,
        render_hidden: int = 1536,
        encoding: RayEncoding | None = None,
        dropout: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__()
        if conv_dim < 8 or conv_dim % 8:
            raise ValueError(f"conv_dim must be a multiple of 8; it was {conv_dim}")
        if dim % num_heads:
            raise ValueError(f"dim {dim} must be a multiple of num_heads {num_heads}")
        self.encoding = RayEncoding() if encoding is None else encoding
        width = self.encoding.channels
        options = {"pose_dim": width, **options}
        self.stem = nn.Sequential(*_stem(conv_dim), nn.Conv2d(conv_dim, dim, 1))

        def block(size: int, attention: RelativePoseAttention) -> PoseBlock:
            mlp = MLP(size, 2 * dim, dropout=dropout)
            _xavier(mlp, 1e-6)
            return PoseBlock(size, attention, mlp, dropout=dropout, eps=1e-5)

        self.encoder = nn.ModuleList(block(dim, RelativePoseAttention(dim, num_heads, **options)) for _ in range(depth))
        cross = {"head_dim": dim // num_heads, "kv_dim": dim, "query_pose": False, **options}
        self.query = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.decoder = nn.ModuleList(
            block(width, RelativePoseAttention(width, num_heads, **cross)) for _ in range(decoder_depth)
        )
        layers: list[nn.Module] = []
        for wide, then in pairwise([width, *[render_hidden] * 4]):
            layers += [nn.Linear(wide, then), nn.LeakyReLU()]
        self.render = nn.Sequential(*layers, nn.Linear(render_hidden, 3), nn.Sigmoid())
        for part in (self.query, self.render):
            _xavier(part, 0.0)

    def encode(
        self,
        images: Float[Tensor, "B V 3 H W"],
        cameras: Float[Tensor, "B V 4 4"],
        directions: Float[Tensor, "B V H W 3"],
    ) -> Scene:
        """Look at a scene.

        Args:
            images: ``(B, V, 3, H, W)``, sides multiples of 8.
            cameras: world to camera, ``(B, V, 4, 4)``, in any frame of the world.
            directions: of each pixel's ray in the world, of unit length, ``(B, V, H, W, 3)``.

        Raises:
            ValueError: shapes that do not fit.
        """
        if images.dim() != 5 or images.shape[2] != 3 or not images.shape[1] or any(n % 8 for n in images.shape[3:]):
            raise ValueError(f"images must be (B, V, 3, H, W), sides multiples of 8; it was {tuple(images.shape)}")
        views, size = tuple(images.shape[:2]), tuple(images.shape[3:])
        if cameras.shape != (*views, 4, 4):
            raise ValueError(f"cameras must be {(*views, 4, 4)}; it was {tuple(cameras.shape)}")
        if directions.shape != (*views, *size, 3):
            raise ValueError(f"directions must be {(*views, *size, 3)}; it was {tuple(directions.shape)}")
        tokens = self.stem(images.flatten(0, 1)).flatten(2).mT.unflatten(0, views)
        # Of the 8 x 8 pixels of a token the one behind the middle.
        poses = self.encoding.relative(cameras, directions[:, :, 4::8, 4::8].flatten(2, 3))
        for block in self.encoder:
            tokens = block(tokens, poses=poses)
        return Scene(tokens, poses.keys, cameras)

    def decode(self, scene: Scene, rays: Rays) -> Float[Tensor, "B N 3"]:
        """Colours from 0 to 1 along rays of the world, ``(B, N, 3)``; each ray for itself.

        Raises:
            ValueError: rays that are not ``(B, N, 3)``.
        """
        x = self.query(self.encoding(to_cameras(scene.cameras, rays)).to(scene.tokens.dtype))
        poses = RelativePoses(None, scene.poses)
        for block in self.decoder:
            x = block(x, context=scene.tokens, poses=poses)
        out: Tensor = self.render(x.mean(1))
        return out

    def forward(
        self,
        images: Float[Tensor, "B V 3 H W"],
        cameras: Float[Tensor, "B V 4 4"],
        directions: Float[Tensor, "B V H W 3"],
        rays: Rays,
    ) -> Float[Tensor, "B N 3"]:
        """`decode` of `encode`."""
        return self.decode(self.encode(images, cameras, directions), rays)


def _stem(dim: int) -> list[nn.Module]:
    """Three times a 3 x 3 convolution and one that halves the sides."""
    layers: list[nn.Module] = []
    for last, wide, then in ((3, dim // 8, dim // 4), (dim // 4, dim // 4, dim // 2), (dim // 2, dim // 2, dim)):
        for channels, more, stride in ((last, wide, 1), (wide, then, 2)):
            layers += [nn.Conv2d(channels, more, 3, stride=stride, padding=1, bias=False), nn.ReLU()]
    return layers


def _xavier(module: nn.Module, bias: float) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=bias)


@register
def repast_clevr(**options: Any) -> RePAST:
    """The size for CLEVR-TR, which has 2 pictures to look at; scores are scaled, unlike in the public one."""
    return RePAST(**{"dim": 384, "num_heads": 6, "render_hidden": 768, **options})


@register
def repast_msn(**options: Any) -> RePAST:
    """The size for MultiShapeNet-Hard, which has 5 pictures to look at; scores are scaled, unlike in the public one."""
    return RePAST(**options)


@register
def repast_tiny(**options: Any) -> RePAST:
    """A small one for tests: 32 channels, 2 blocks and 1, few octaves."""
    sizes: dict[str, Any] = {"dim": 32, "num_heads": 4, "depth": 2, "decoder_depth": 1, "conv_dim": 32}
    return RePAST(**{**sizes, "render_hidden": 32, "encoding": RayEncoding(4, -2, 3), **options})
