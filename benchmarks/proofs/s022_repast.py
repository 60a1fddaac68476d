"""Do relative poses make a network independent of the world's frame, at no loss where absolute ones are at home?

    python benchmarks/proofs/s022_repast.py [--seeds 2] [--steps 1500]

A light somewhere, three cameras in random poses around it, six random rays each. A token knows the cosine between its
ray and the direction from its camera to the light, and the distance. The question is the same cosine for new rays from
elsewhere. Two layers of cross-attention, of equal size: one sees rays encoded in the frame of camera 0, which is the
world's frame in training, the other is RePAST. Mean squared error on new scenes (1/3 is that of answering 0), then with
all of the world moved at random. Safin et al., 2023, arXiv 2304.00947.
"""

from __future__ import annotations

import argparse

import torch
from bed import fit
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from glocal.models.vision.repast import PoseBlock
from glocal.nn import MLP, RelativePoseAttention
from glocal.papers.verdict import verdict
from glocal.poses import RayEncoding, Rays, RelativePoses, camera_centres, to_cameras

VIEWS, RAYS, ASKED, BATCH, HEADS, DIM = 3, 6, 8, 64, 4, 64
ENCODING = RayEncoding(origin_octaves=6, origin_start=-3, direction_octaves=4)

Scenes = tuple[Tensor, Tensor, Tensor, Rays, Tensor]


def motions(count: int, views: int, generator: torch.Generator) -> Tensor:
    """Random rigid motions ``(count, views, 4, 4)``."""
    turn = torch.linalg.qr(torch.randn(count, views, 3, 3, generator=generator))[0]
    turn = turn * torch.linalg.det(turn)[..., None, None]
    out = torch.eye(4).repeat(count, views, 1, 1)
    out[..., :3, :3], out[..., :3, 3] = turn, torch.randn(count, views, 3, generator=generator)
    return out


def draw(count: int, generator: torch.Generator) -> Scenes:
    """Content ``(count, VIEWS, RAYS, 2)``, cameras, directions of the rays, rays that are asked about, their cosines.

    The world is in the frame of camera 0.
    """
    cameras = motions(count, VIEWS, generator)
    cameras[:, 0] = torch.eye(4)
    light = torch.randn(count, 1, 1, 3, generator=generator)
    directions = normalize(torch.randn(count, VIEWS, RAYS, 3, generator=generator), dim=-1)
    to_light = light - camera_centres(cameras)[:, :, None]
    cosine = cosine_similarity(directions, to_light, dim=-1)
    content = torch.stack([cosine, to_light.norm(dim=-1).expand_as(cosine)], -1)
    asked = Rays(
        torch.randn(count, ASKED, 3, generator=generator),
        normalize(torch.randn(count, ASKED, 3, generator=generator), dim=-1),
    )
    return content, cameras, directions, asked, cosine_similarity(asked.directions, light[:, 0] - asked.origins, dim=-1)


def moved(scenes: Scenes, generator: torch.Generator) -> Scenes:
    """The same in another frame of the world."""
    content, cameras, directions, asked, cosine = scenes
    motion = motions(len(cameras), 1, generator)[:, 0]
    turn, shift = motion[:, :3, :3], motion[:, :3, 3]
    asked = Rays(asked.origins @ turn.mT + shift[:, None], asked.directions @ turn.mT)
    return content, cameras @ motion.inverse()[:, None], directions @ turn.mT[:, None], asked, cosine


class Net(nn.Module):
    """The decoder of RePAST over tokens as they are; or one camera, the world, that sees all of them."""

    def __init__(self, relative: bool) -> None:
        super().__init__()
        width, self.relative = ENCODING.channels, relative
        self.token, self.query = nn.Linear(2, DIM), MLP(width, 2 * width)
        options = {"head_dim": DIM // HEADS, "kv_dim": DIM, "pose_dim": width, "query_pose": False, "value_pose": True}
        self.blocks = nn.ModuleList(
            PoseBlock(width, RelativePoseAttention(width, HEADS, **options), MLP(width, 2 * width)) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, content: Tensor, cameras: Tensor, directions: Tensor, asked: Rays) -> Tensor:
        tokens = self.token(content)
        if self.relative:
            keys = ENCODING.relative(cameras, directions, asked).keys
            x = ENCODING(to_cameras(cameras, asked))
        else:
            centres = camera_centres(cameras)[:, :, None].expand_as(directions)
            keys, tokens = ENCODING(Rays(centres, directions)).flatten(1, 2)[:, None], tokens.flatten(1, 2)[:, None]
            x = ENCODING(asked)[:, None]
        x = self.query(x)
        for block in self.blocks:
            x = block(x, context=tokens, poses=RelativePoses(None, keys))
        out: Tensor = self.head(self.norm(x.mean(1)))[..., 0]
        return out


def train(relative: bool, seed: int, steps: int) -> tuple[float, float]:
    """Error on new scenes, in the frame of training and in another."""
    torch.manual_seed(seed)
    model = Net(relative)
    generator = torch.Generator().manual_seed(seed)

    def error(scenes: Scenes) -> Tensor:
        return (model(*scenes[:-1]) - scenes[-1]).square().mean()

    fit(model, lambda: error(draw(BATCH, generator)), steps)
    with torch.no_grad():
        scenes = draw(2048, generator)
        return float(error(scenes)), float(error(moved(scenes, generator)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    print(f"{'':<6}{'absolute':>20}{'relative':>20}\n{'seed':<6}" + 2 * f"{'at home':>10}{'moved':>10}")
    for seed in range(args.seeds):
        found.append((*train(False, seed, args.steps), *train(True, seed, args.steps)))
        print(f"{seed:<6}" + "".join(f"{error:>10.5f}" for error in found[-1]), flush=True)
    home, away, own, other = (sum(column) / len(found) for column in zip(*found, strict=True))
    verdict(
        "repast",
        f"squared error in the training frame {own:.4f} with relative poses, {home:.4f} with absolute ones; in another "
        f"frame of the world {other:.4f} and {away:.4f}",
        abs(own - home) <= 0.15 * home and away >= 5 * home and all(abs(each[3] - each[2]) < 1e-3 for each in found),
    )


if __name__ == "__main__":
    main()
