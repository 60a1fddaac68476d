"""Which of three pictures is another arrangement: the Distorted Spatial Relationship Testbench.

Li et al., 2025, arXiv 2506.00718. One picture is intact and two are distorted versions of it with the same local
texture (`tile_shuffle`, or `glocal.bench.texture.synthesise`); the odd one is found by features alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from glocal.bench.table import Table
from glocal.nn.modes import evaluating
from glocal.shapes import Float

__all__ = [
    "Disrt",
    "Trials",
    "disrt",
    "disrt_table",
    "layer_features",
    "odd_one_out",
    "oddity_trials",
    "tile_shuffle",
    "wilson_interval",
]

Distortion = Callable[[Tensor, torch.Generator], Tensor]


class Trials(NamedTuple):
    """Three pictures a trial, and which of them is the odd one."""

    images: Float[Tensor, "T 3 C H W"]
    odd: Tensor


def tile_shuffle(
    images: Float[Tensor, "B C H W"],
    tile: int,
    generator: torch.Generator,
    *,
    blend: int = 2,
    keep_centre: bool = False,
) -> Float[Tensor, "B C H W"]:
    """Cut pictures into square tiles and put them together in another order, each in one of its own.

    Args:
        images: ``(B, C, H, W)``.
        tile: the side of a tile in pixels, which divides both sides of a picture.
        generator: draws the orders, on the CPU; an order is never the one that was.
        blend: over so many pixels two neighbours fade into each other at a seam; even, 0 for hard seams.
        keep_centre: the tile in the middle stays, where there is one.

    Raises:
        ValueError: a tile that does not divide the sides or leaves nothing to exchange; a blend that is odd, below 0 or
            wider than a tile; a centre to keep that is none.

    >>> image = torch.arange(4.0).view(1, 1, 2, 2)
    >>> sorted(tile_shuffle(image, 1, torch.Generator().manual_seed(0), blend=0).flatten().tolist())
    [0.0, 1.0, 2.0, 3.0]
    """
    height, width = images.shape[-2:]
    if images.dim() != 4 or tile < 1 or height % tile or width % tile:
        raise ValueError(f"tile must divide the sides of images (B, C, H, W); it was {tile} for {tuple(images.shape)}")
    if blend < 0 or blend % 2 or blend > tile:
        raise ValueError(f"blend must be even, from 0 to tile {tile}; it was {blend}")
    rows, columns = height // tile, width // tile
    if keep_centre and not rows % 2 == columns % 2 == 1:
        raise ValueError(f"keep_centre needs odd numbers of tiles; they were {rows} x {columns}")
    free = torch.arange(rows * columns)
    if keep_centre:
        free = free[free != rows * columns // 2]
    if len(free) < 2:
        raise ValueError(f"tile must leave two tiles to exchange; it was {tile} for {tuple(images.shape)}")
    orders = torch.arange(rows * columns).repeat(len(images), 1)
    for order in orders:
        while torch.equal(order[free], free):
            order[free] = free[torch.randperm(len(free), generator=generator)]
    tiles = images.unflatten(-1, (columns, tile)).unflatten(-3, (rows, tile)).movedim((-4, -2), (1, 2)).flatten(1, 2)
    index = orders.to(images.device).view(*orders.shape, 1, 1, 1)
    shuffled = tiles.gather(1, index.expand_as(tiles)).unflatten(1, (rows, columns)).movedim((1, 2), (-4, -2))
    out = shuffled.flatten(-4, -3).flatten(-2, -1)
    return _blended(_blended(out, -1, tile, blend), -2, tile, blend)


def _blended(x: Tensor, axis: int, tile: int, width: int) -> Tensor:
    """Pixels near a seam are mixed with their mirror image beyond it; sums stay."""
    if not width:
        return x
    at = torch.arange(x.shape[axis], device=x.device)
    # Signed distance to the nearest seam, in pixels: 0.5 just behind, -0.5 just before.
    offset = (at + tile // 2) % tile - tile // 2 + 0.5
    partner = (at - 2 * offset).long()
    share = ((1 - 2 * offset.abs() / width) / 2).clamp(min=0)
    share = share * ((partner >= 0) & (partner < len(at)))
    shape = (-1,) if axis == -1 else (-1, 1)
    mirrored = x.index_select(axis, partner.clamp(0, len(at) - 1))
    return x + share.to(x.dtype).view(shape) * (mirrored - x)


def oddity_trials(
    images: Float[Tensor, "T C H W"],
    distort: Distortion,
    generator: torch.Generator,
    *,
    odd: Literal["intact", "distorted"] = "intact",
) -> Trials:
    """A trial a picture, its three versions in random order.

    Args:
        images: ``(T, C, H, W)``, intact.
        distort: from pictures and a generator to distorted ones: ``lambda x, g: tile_shuffle(x, 8, g)``.
        generator: of distortions and orders, on the CPU.
        odd: ``"intact"``: beside two distorted versions; ``"distorted"``: one beside the picture and its mirror image.

    Raises:
        ValueError: another ``odd``, or images that are none.

    >>> trials = oddity_trials(torch.rand(5, 3, 8, 8), lambda x, g: tile_shuffle(x, 4, g), torch.Generator())
    >>> trials.images.shape, trials.odd.shape
    (torch.Size([5, 3, 3, 8, 8]), torch.Size([5]))
    """
    if odd not in ("intact", "distorted"):
        raise ValueError(f"odd must be 'intact' or 'distorted'; it was {odd!r}")
    if images.dim() != 4 or not len(images):
        raise ValueError(f"images must be (T, C, H, W), at least one; they were {tuple(images.shape)}")
    if odd == "intact":
        versions = [images, distort(images, generator), distort(images, generator)]
    else:
        versions = [distort(images, generator), images, images.flip(-1)]
    places = torch.rand(len(images), 3, generator=generator).argsort(1)
    stacked = torch.stack(versions, 1)
    index = places.to(images.device).view(-1, 3, 1, 1, 1).expand_as(stacked)
    return Trials(stacked.gather(1, index), (places == 0).int().argmax(1))


def odd_one_out(features: Float[Tensor, "T 3 D"], odd: Tensor, *, tolerance: float = 1e-6) -> Tensor:
    """Credit of each trial, ``(T,)`` in float64: is the odd one least like the two others?

    From features the mean over all pictures of all trials is taken, and they are brought to length 1. A picture's score
    is the sum of its similarities to the others, and the least is called odd; where several are least, credit is 1 over
    their number, so that features that tell nothing get exactly 1/3.

    Args:
        features: ``(T, 3, D)``.
        odd: which one is, ``(T,)``.
        tolerance: scores that are so close are alike; so are features that differ by less of their length.

    Raises:
        ValueError: other shapes.

    >>> odd_one_out(torch.tensor([[[1.0, 0], [0, 1], [0, 1]], [[1, 0], [1, 0], [0, 1]]]), torch.tensor([0, 1]))
    tensor([1., 0.], dtype=torch.float64)
    """
    if features.dim() != 3 or features.shape[1] != 3 or odd.shape != features.shape[:1]:
        raise ValueError(
            f"features and odd must be (T, 3, D) and (T,); they were {tuple(features.shape)} and {tuple(odd.shape)}"
        )
    wide = features.double()
    centred = wide - wide.mean((0, 1))
    # What is left of features that are all alike is rounding, which must not become a direction.
    lost = centred.norm(dim=-1, keepdim=True) <= tolerance * wide.norm(dim=-1, keepdim=True)
    unit = normalize(centred.masked_fill(lost, 0), dim=-1)
    similarities = unit @ unit.mT
    scores = similarities.sum(-1) - similarities.diagonal(dim1=1, dim2=2)
    least = scores <= scores.amin(1, keepdim=True) + tolerance
    hit = least.gather(1, odd.to(least.device)[:, None])[:, 0]
    return hit.double() / least.sum(1)


def wilson_interval(hits: float, count: int) -> tuple[float, float]:
    """Wilson's interval of 95 % of a share; hits may be fractions.

    Raises:
        ValueError: no trials, or more hits than trials.

    >>> wilson_interval(5, 10)
    (0.2365..., 0.7634...)
    """
    if count < 1 or not 0 <= hits <= count * (1 + 1e-9):
        raise ValueError(f"hits must be from 0 to count, and count at least 1; they were {hits} and {count}")
    z2, p = 1.959963984540054**2, hits / count
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = (z2 * (p * (1 - p) / count + z2 / (4 * count**2))) ** 0.5 / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def layer_features(
    model: nn.Module,
    images: Float[Tensor, "M C H W"],
    layers: Sequence[str],
    *,
    pool: Literal["mean", "first"] = "mean",
    batch: int = 64,
) -> dict[str, Float[Tensor, "M D"]]:
    """One vector a picture from layers of a model, which is left as it was.

    Args:
        model: called with a batch of pictures.
        images: ``(M, C, H, W)``.
        layers: names of modules, as in ``named_modules``; ``""`` is the model itself. Their outputs are maps
            ``(B, D, h, w)``, which are averaged, tokens ``(B, N, D)``, or vectors ``(B, D)``.
        pool: of tokens, ``"mean"`` of all, or the ``"first"``, a class token.
        batch: pictures at once.

    Raises:
        ValueError: no such layer, a layer that is not run or gives something else, another pooling.

    >>> model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    >>> {name: tuple(found.shape) for name, found in layer_features(model, torch.rand(7, 3, 8, 8), ["0", ""]).items()}
    {'0': (7, 5), '': (7, 5)}
    """
    if pool not in ("mean", "first"):
        raise ValueError(f"pool must be 'mean' or 'first'; it was {pool!r}")
    modules = dict(model.named_modules())
    if missing := [name for name in layers if name not in modules]:
        raise ValueError(f"layers must be modules of the model; it has no {', '.join(missing)}")
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda module, given, out: found[name].append(_pooled(name, out, pool))

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name in found:
            stack.callback(modules[name].register_forward_hook(keep(name)).remove)
        for part in images.split(batch):
            model(part)
    vectors = {name: torch.cat(parts) if parts else images.new_zeros(0, 0) for name, parts in found.items()}
    for name, each in vectors.items():
        if len(each) != len(images):
            raise ValueError(f"layers must run once a batch; {name!r} gave {len(each)} vectors for {len(images)}")
    return vectors


def _pooled(name: str, out: object, pool: str) -> Tensor:
    out = out[0] if isinstance(out, tuple) else out
    if not isinstance(out, Tensor) or out.dim() not in (2, 3, 4):
        raise ValueError(f"layers must give maps (B, D, h, w), tokens (B, N, D) or vectors (B, D); {name!r} does not")
    if out.dim() == 4:
        return out.mean((2, 3))
    if out.dim() == 3:
        return out[:, 0] if pool == "first" else out.mean(1)
    return out


@dataclass(frozen=True)
class Disrt:
    """How often the odd one was found.

    Args:
        layer: from which features.
        level: of distortion, by the caller's name.
        accuracy: chance is 1/3.
        low, high: Wilson's interval of 95 %.
        trials: how many.
        human: accuracy of people, where given.
    """

    layer: str
    level: str
    accuracy: float
    low: float
    high: float
    trials: int
    human: float | None = None

    @property
    def lead(self) -> float | None:
        """Accuracy less that of people."""
        return None if self.human is None else self.accuracy - self.human


def disrt(
    features: Callable[[Tensor], Mapping[str, Tensor]],
    trials: Mapping[str, Trials],
    *,
    human: Mapping[str, float] | None = None,
) -> list[Disrt]:
    """Find the odd one by the features of each layer, at each level of distortion.

    Args:
        features: from pictures ``(M, C, H, W)`` to vectors ``(M, D)`` of each layer:
            ``lambda x: layer_features(model, x, layers)``.
        trials: of each level.
        human: accuracy of people at each level.

    >>> trials = {"tile 2": oddity_trials(torch.rand(9, 1, 8, 8), lambda x, g: tile_shuffle(x, 2, g, blend=0),
    ...                                   torch.Generator())}
    >>> [(row.layer, round(row.accuracy, 3)) for row in disrt(lambda x: {"mean colour": x.mean((2, 3))}, trials)]
    [('mean colour', 0.333)]
    """
    rows = []
    for level, (images, odd) in trials.items():
        for layer, vectors in features(images.flatten(0, 1)).items():
            credit = odd_one_out(vectors.unflatten(0, images.shape[:2]), odd)
            hits = float(credit.sum())
            rows.append(
                Disrt(
                    layer=layer,
                    level=level,
                    accuracy=hits / len(odd),
                    low=(interval := wilson_interval(hits, len(odd)))[0],
                    high=interval[1],
                    trials=len(odd),
                    human=None if human is None else human.get(level),
                )
            )
    return rows


def disrt_table(rows: Sequence[Disrt]) -> Table:
    """The rows as a table."""
    return Table(
        "Odd one out of three",
        ("layer", "distortion", "accuracy", "interval", "over people"),
        ("", "", "share of trials in which the odd one was found; chance is 0.333", "Wilson's, 95 %", ""),
        tuple(
            (
                row.layer,
                row.level,
                f"{row.accuracy:.3f}",
                f"{row.low:.3f} to {row.high:.3f}",
                "-" if row.lead is None else f"{row.lead:+.3f}",
            )
            for row in rows
        ),
    )
