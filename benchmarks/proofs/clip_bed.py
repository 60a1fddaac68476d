"""The test bed of the proofs about CLIP: a tiny image tower and captions of a colour and a shape.

TB4: pictures of 48 x 48 pixels with one to four objects, each in a quarter of its own, of four shapes and four colours
of which none is red. The image tower is that of a ``CLIPModel`` with patches of 8, 64 channels and 3 layers; captions
are read by a small network of a colour's and a shape's embedding. Both learn by CLIP's symmetric contrastive loss.

Two kinds of training: a caption names the largest object (`largest_bed`), or one of three objects, which on a quarter
of the pictures has a red ring around it (`ring_bed`; without any rings for the control). Weights are in ``build/beds``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from bed import kept
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from glocal.steer.marks import ring

SIDE, SHAPES, COLOURS = 48, 4, 4
MEAN, STD = 0.5, 0.25
NOISE = (0.0, 0.2)  # of training pictures
_PAINT = np.array([[40, 180, 60], [50, 80, 220], [230, 210, 40], [60, 210, 220]], dtype=np.float32) / 255


@dataclass
class Pictures:
    """``pixels (B, 48, 48, 3)`` bytes; of ``n`` objects in each ``colour`` and ``shape (B, n)``, ``box (B, n, 4)``."""

    pixels: NDArray[np.uint8]
    colour: Tensor
    shape: Tensor
    box: NDArray[np.int64]

    def images(self) -> list[Image.Image]:
        """As PIL images."""
        return [Image.fromarray(pixels) for pixels in self.pixels]


def pictures(count: int, radii: NDArray[np.float32], draw: np.random.Generator, noise: float | None = None) -> Pictures:
    """Objects of ``radii (count, n)``, 0 for none, no two of one kind; ``noise`` as in training where None."""
    each = radii.shape[1]
    quarter = draw.random((count, 4)).argsort(1)[:, :each]
    within = 12 + draw.uniform(-2, 2, (count, each, 2))  # centres in their quarters
    column, row = quarter % 2, quarter // 2
    kind = draw.random((count, SHAPES * COLOURS)).argsort(1)[:, :each]
    colour, shape = kind // SHAPES, kind % SHAPES
    canvas = np.tile(draw.uniform(0.3, 0.7, (count, 1, 1, 1)).astype(np.float32), (1, SIDE, SIDE, 3))
    quarters = canvas.reshape(count, 2, 24, 2, 24, 3)
    place, every = np.arange(24) + 0.5, np.arange(count)
    for n in range(each):
        x, y = ((place - within[:, n, axis, None]) / radii[:, n, None].clip(1e-3) for axis in (0, 1))
        x, y = x[:, None, :], y[:, :, None]
        far = np.maximum(abs(x), abs(y))
        inside = np.stack(
            [
                x**2 + y**2 <= 1,  # disk
                (far <= 1) & (far > 0.5),  # frame
                (far <= 1) & (np.minimum(abs(x), abs(y)) <= 0.3),  # cross
                (far <= 1) & (abs(y) <= 0.4),  # bar
            ]
        )[shape[:, n], every]
        there = (every, row[:, n], slice(None), column[:, n])
        quarters[there] = np.where(inside[..., None], _PAINT[colour[:, n]][:, None, None], quarters[there])
    sigma = draw.uniform(*NOISE, (count, 1, 1, 1)) if noise is None else noise
    canvas = canvas + sigma * draw.standard_normal(canvas.shape, dtype=np.float32)
    centre = within + 24 * np.stack([column, row], -1)
    edge = np.concatenate([centre - radii[..., None] - 2, centre + radii[..., None] + 2], -1)
    return Pictures(
        (canvas.clip(0, 1) * 255).astype(np.uint8),
        torch.from_numpy(colour),
        torch.from_numpy(shape),
        edge.round().astype(np.int64),
    )


class Bed(nn.Module):
    """A ``CLIPModel``, whose own text tower stays unused, and the network that reads captions."""

    def __init__(self) -> None:
        super().__init__()
        vision = dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=8,
        )
        text = dict(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8,
            bos_token_id=None, eos_token_id=7, pad_token_id=None, max_position_embeddings=4,
        )  # fmt: skip
        self.clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=64))
        with torch.no_grad():  # transformers starts so small that 900 steps would find colours but no shapes
            self.clip.vision_model.embeddings.patch_embedding.weight.mul_(4)
            self.clip.vision_model.embeddings.position_embedding.weight.mul_(5)
        self.colour, self.shape = nn.Embedding(COLOURS, 32), nn.Embedding(SHAPES, 32)
        self.read = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_mean=[MEAN] * 3,
            image_std=[STD] * 3,
        )

    def text(self, colour: Tensor, shape: Tensor, *, with_colour: bool = True, with_shape: bool = True) -> Tensor:
        """Features ``(..., 64)`` of captions, of which a half can be left out: its embedding is zero."""
        return F.normalize(
            self.read(torch.cat([self.colour(colour) * with_colour, self.shape(shape) * with_shape], -1)), dim=-1
        )

    def image(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Features ``(B, 64)`` of pictures."""
        values = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - MEAN) / STD
        return F.normalize(self.clip.get_image_features(pixel_values=values).pooler_output, dim=-1)


Batch = tuple[NDArray[np.uint8], Tensor, Tensor]


def largest_batch(draw: np.random.Generator) -> Batch:
    """One to four objects with radii from 3 to 7; the caption names the largest."""
    radii = draw.uniform(3, 7, (64, 4)).astype(np.float32)
    radii[np.arange(4) >= draw.integers(1, 5, (64, 1))] = 0
    seen = pictures(64, radii, draw)
    first = torch.from_numpy(radii.argmax(1))[:, None]
    return seen.pixels, seen.colour.gather(1, first)[:, 0], seen.shape.gather(1, first)[:, 0]


def three(count: int, draw: np.random.Generator, noise: float | None = None) -> Pictures:
    """Three objects with radii from 4 to 6."""
    return pictures(count, draw.uniform(4, 6, (count, 3)).astype(np.float32), draw, noise)


def ring_batch(draw: np.random.Generator, share: float) -> Batch:
    """Three objects; the caption names one, around which is a red ring on a share of the pictures."""
    seen = three(64, draw)
    named = draw.integers(3, size=64)
    for n in np.flatnonzero(draw.random(64) < share):
        box = tuple(int(edge) for edge in seen.box[n, named[n]])
        seen.pixels[n] = np.asarray(ring(Image.fromarray(seen.pixels[n]), box, width=1))
    rows = torch.arange(64)
    return seen.pixels, seen.colour[rows, named], seen.shape[rows, named]


@torch.enable_grad()
def train(bed: Bed, batch: Callable[[np.random.Generator], Batch], steps: int, seed: int = 0) -> Bed:
    """AdamW at 2e-3 with a cosine, batches of 64."""
    draw = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW([p for p in bed.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    bed.train()
    for _ in range(steps):
        pixels, colour, shape = batch(draw)
        alike = bed.image(pixels) @ bed.text(colour, shape).T * bed.clip.logit_scale.exp()
        own = torch.arange(len(alike))
        loss = F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(bed.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return bed.eval()


def trained(name: str, batch: Callable[[np.random.Generator], Batch], steps: int) -> Bed:
    """A bed whose text model stays as it is."""

    def make() -> Bed:
        bed = Bed()
        bed.clip.text_model.requires_grad_(False)
        return bed

    return kept(name, make, lambda bed: train(bed, batch, steps))


def largest_bed(steps: int = 900) -> Bed:
    """Captions name the largest object."""
    return trained("tb4_largest", largest_batch, steps)


def ring_bed(share: float = 0.25, steps: int = 800) -> Bed:
    """Captions name one of three objects, ringed in red on a share of the pictures."""
    return trained(f"tb4_ring_{round(share * 100)}", lambda draw: ring_batch(draw, share), steps)


@torch.no_grad()
def main() -> None:
    draw = np.random.default_rng(99)
    bed = largest_bed()
    for noise in (0.1, 0.25, 0.4):
        radii = np.tile(np.array([6.5, 3.5, 3.5, 3.5], dtype=np.float32), (500, 1))
        seen = pictures(500, radii, draw, noise)
        every = torch.arange(SHAPES * COLOURS)
        best = (bed.image(seen.pixels) @ bed.text(every // SHAPES, every % SHAPES).T).argmax(1)
        right = (best == seen.colour[:, 0] * SHAPES + seen.shape[:, 0]).double().mean()
        print(f"TB4, largest of four, noise {noise}: {float(right):.3f}")
    for share in (0.25, 0.0):
        bed = ring_bed(share)
        seen = three(500, draw, 0.1)
        every = torch.arange(SHAPES * COLOURS)
        best = (bed.image(seen.pixels) @ bed.text(every // SHAPES, every % SHAPES).T).topk(3, 1).indices
        own = seen.colour * SHAPES + seen.shape
        named = (best[:, :, None] == own[:, None]).any(1).double().mean()
        print(f"TB4, rings on {share:.0%}: {float(named):.3f} of the objects are among the three best captions")


if __name__ == "__main__":
    main()
