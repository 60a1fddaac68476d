"""Which positions of a prompt are system text, image, question and answer, and which grid an image's tokens form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KINDS", "Grid", "SpanMap", "known", "prompt_of"]

KINDS = ("padding", "system", "image", "question", "answer")
"""What a position can be, in the order of `SpanMap.kinds`' numbers."""
PADDING, SYSTEM, IMAGE, QUESTION, ANSWER = range(5)


def prompt_of(inputs: Mapping[str, Any]) -> Tensor:
    """The prompt among a model's arguments, by name: embeddings ``(B, N, C)``, or where none are given ids ``(B, N)``.

    Raises:
        ValueError: neither is given.

    >>> prompt_of({"input_ids": torch.tensor([[1, 2, 3]]), "inputs_embeds": None}).shape
    torch.Size([1, 3])
    """
    embeds = inputs.get("inputs_embeds")
    found = inputs.get("input_ids") if embeds is None else embeds
    if not isinstance(found, Tensor):
        raise ValueError("inputs must hold input_ids or inputs_embeds")
    return found


@dataclass(frozen=True)
class Grid:
    """Where the tokens of one view of an image stand: the whole, or one with finer patches.

    Args:
        index: ``(rows, columns)``, positions counted from the image's first token; row ends (newline tokens) are left
            out.
    """

    index: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.index.shape[0], self.index.shape[1]


@dataclass(frozen=True)
class SpanMap:
    """For each row of a batch, what each position is.

    Text before the first image is ``system``, text after it ``question``; a prompt without an image is all question.
    What is generated is ``answer``.

    Args:
        kinds: ``(B, N)`` in int64, numbers of `KINDS`.
        grids: for each row and each of its images, the grids that its tokens form; empty where none is known.

    >>> ids, pad = torch.tensor([[0, 5, 9, 9, 9, 9, 6]]), torch.tensor([[0, 1, 1, 1, 1, 1, 1]])
    >>> spans = SpanMap.of(ids, image_token=9, pad=pad)
    >>> [KINDS[kind] for kind in spans.kinds[0].tolist()]
    ['padding', 'system', 'image', 'image', 'image', 'image', 'question']
    >>> spans.positions(0, "image").tolist(), spans.grids[0][0][0].shape
    ([2, 3, 4, 5], (2, 2))
    """

    kinds: Tensor
    grids: tuple[tuple[tuple[Grid, ...], ...], ...] = field(default=())

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        *,
        image_token: int | None,
        pad: Tensor | None = None,
        grids: Sequence[Sequence[Grid]] | None = None,
    ) -> SpanMap:
        """Read a prompt.

        Args:
            input_ids: ``(B, N)``.
            image_token: the token that stands for each patch of an image; None for a model of text.
            pad: the attention mask ``(B, N)``, zeros where padding is.
            grids: for each image of the batch, in order, its grids; one square where None and it fits.

        Raises:
            ValueError: shapes that do not agree.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be (B, N); it was {tuple(input_ids.shape)}")
        real = torch.ones_like(input_ids, dtype=torch.bool) if pad is None else pad.bool()
        if real.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}; it was {tuple(real.shape)}"
            )
        image = torch.zeros_like(real) if image_token is None else (input_ids == image_token) & real
        after = image.cumsum(1) > 0
        kinds = torch.where(after, QUESTION, SYSTEM)
        kinds[~image.any(1)] = QUESTION
        kinds[image] = IMAGE
        kinds[~real] = PADDING
        found = cls(kinds)
        rows, at = [], 0
        for row in range(len(kinds)):
            row_grids = []
            for run in found.images(row):
                given = grids[at] if grids is not None and at < len(grids) else _square(len(run))
                row_grids.append(tuple(given))
                at += 1
            rows.append(tuple(row_grids))
        if grids is not None and at != len(grids):
            raise ValueError(f"{len(grids)} images are described, the prompts hold {at}")
        return replace(found, grids=tuple(rows))

    @classmethod
    def read(cls, model: Any, inputs: Mapping[str, Any]) -> SpanMap:
        """Of the inputs of a model: ``input_ids``, ``attention_mask``, and what says how an image was cut into tiles.

        Grids of tiles are known for LLaVA-NeXT and LLaVA-OneVision (``image_sizes``) and for Qwen2-VL and Qwen2.5-VL
        (``image_grid_thw``); the queries of BLIP-2 and InstructBLIP form none; else an image whose number of tokens is
        a square has that grid.

        Raises:
            ValueError: no ``input_ids``: then give the spans yourself.
        """
        ids = inputs.get("input_ids")
        if ids is None:
            raise ValueError("spans are read from input_ids, which were not given; pass spans=SpanMap(...)")
        token = getattr(model.config, "image_token_id", None)
        runs = [len(run) for row in cls.of(ids, image_token=token).images_of_all() for run in row]
        mask = inputs.get("attention_mask")
        pad = mask if mask is not None and mask.dim() == 2 and mask.shape == ids.shape else None
        return cls.of(ids, image_token=token, pad=pad, grids=_tiles(model.config, inputs, runs))

    def mask(self, kind: str) -> Tensor:
        """Booleans ``(B, N)``.

        Raises:
            ValueError: no such kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; it was {kind!r}")
        return self.kinds == KINDS.index(kind)

    def positions(self, row: int, kind: str) -> Tensor:
        """Positions of a kind in a row of the batch, ``(n,)``."""
        return self.mask(kind)[row].nonzero()[:, 0]

    def images(self, row: int) -> list[Tensor]:
        """Positions of each image of a row, each ``(n,)``: runs of image tokens."""
        at = self.positions(row, "image")
        if not len(at):
            return []
        ends = (at.diff() != 1).nonzero()[:, 0] + 1
        return list(at.tensor_split(ends.cpu()))

    def images_of_all(self) -> list[list[Tensor]]:
        """`images` of every row."""
        return [self.images(row) for row in range(len(self.kinds))]

    def marked(self, name: str, sets: Sequence[Any] | Tensor, kind: str | None = None) -> Tensor:
        """Sets of positions as a user gives them, as booleans ``(B, N)``; padding is in none.

        Args:
            name: of the argument that they are.
            sets: one for each row: numbers ``(n,)`` or booleans ``(P,)`` over the row's P positions of the kind.
            kind: whose positions are counted, from 0 at the row's first one; all positions where None.

        Raises:
            ValueError: another number of sets, positions that are not there, or another number of booleans.

        >>> spans = SpanMap.of(torch.tensor([[5, 9, 9, 6]]), image_token=9)
        >>> spans.marked("sets", [[1]], "image").tolist(), spans.marked("sets", [[1, 3]]).tolist()
        ([[False, False, True, False]], [[False, True, False, True]])
        """
        found = torch.zeros_like(self.kinds, dtype=torch.bool)
        if len(sets) != len(found):
            raise ValueError(f"{name} must have one set for each of {len(found)} rows; it had {len(sets)}")
        for row, some in enumerate(sets):
            every = torch.arange(found.shape[1], device=found.device)
            at = every if kind is None else self.positions(row, kind)
            some = torch.as_tensor(some).to(at.device)
            if some.dtype == torch.bool:
                fits = some.shape == at.shape
            else:
                fits = some.dim() == 1 and not some.is_floating_point() and bool(((some >= 0) & (some < len(at))).all())
            if not fits:
                raise ValueError(
                    f"{name} must be positions among the {len(at)} {kind or 'prompt'} tokens of row {row}, or as many "
                    f"booleans; it was {some.dtype} of shape {tuple(some.shape)}"
                )
            found[row, at[some]] = True
        return found & (self.kinds != PADDING)

    def check_images(self, who: str) -> None:
        """Raise a ValueError where a row has no image, which a method named so needs."""
        if not bool(self.mask("image").any(1).all()):
            raise ValueError(f"a prompt has no image tokens: {who} needs a picture in every row")

    def check_ends(self) -> None:
        """Raise a ValueError where a row ends with padding, so that the last position is none of its tokens."""
        if bool((self.kinds[:, -1] == PADDING).any()):
            raise ValueError("a prompt ends with padding, so that its last row is none: pad on the left")

    def extended(self, length: int) -> SpanMap:
        """The same map for ``length`` tokens: those after the prompt are the answer."""
        more = length - self.kinds.shape[1]
        if more <= 0:
            return self
        return replace(self, kinds=F.pad(self.kinds, (0, more), value=ANSWER))

    def repeated(self, rows: int) -> SpanMap:
        """The same map where each row stands ``rows // B`` times, as generate has it for several answers a prompt."""
        times = rows // len(self.kinds)
        if times == 1:
            return self
        grids = tuple(grid for grid in self.grids for _ in range(times))
        return SpanMap(self.kinds.repeat_interleave(times, 0), grids)


def known(spans: SpanMap | None) -> SpanMap:
    """What the prompt's positions are, where a method cannot do without.

    Raises:
        ValueError: it is not known: the prompt was given as embeddings, and no spans with it.
    """
    if spans is None:
        raise ValueError("the prompt has no input_ids to tell image from text: pass spans=SpanMap(...)")
    return spans


def _square(count: int) -> tuple[Grid, ...]:
    side = round(count**0.5)
    return (Grid(torch.arange(count).view(side, side)),) if side * side == count else ()


def _tiles(config: Any, inputs: Mapping[str, Any], runs: Sequence[int]) -> list[tuple[Grid, ...]] | None:
    if getattr(config, "qformer_config", None) is not None:
        return [() for _ in runs]
    grid = inputs.get("image_grid_thw")
    if grid is not None:
        merge = config.vision_config.spatial_merge_size
        found = []
        for frames, height, width in grid.tolist():
            rows, columns = height // merge, width // merge
            index = torch.arange(frames * rows * columns).view(frames, rows, columns)
            found.append(tuple(Grid(frame) for frame in index))
        return found
    sizes, pinpoints = inputs.get("image_sizes"), getattr(config, "image_grid_pinpoints", None)
    if sizes is None or pinpoints is None:
        return None
    side = config.vision_config.image_size // config.vision_config.patch_size
    return [_anyres(config, size, count, side, pinpoints) for size, count in zip(sizes.tolist(), runs, strict=True)]


def _anyres(config: Any, size: list[int], count: int, side: int, pinpoints: Any) -> tuple[Grid, ...]:
    """The whole in ``side * side`` tokens, then the tiles in rows, without what is padding, each row with an end."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    whole = Grid(torch.arange(side * side).view(side, side))
    down, across = get_anyres_image_grid_shape(size, pinpoints, config.vision_config.image_size)
    fine = torch.ones(1, down * side, across * side)
    rows, columns = unpad_image(fine, size).shape[1:]
    aspect = getattr(config, "vision_aspect_ratio", None)
    if aspect is not None:  # OneVision shrinks what has too many tokens
        ratio = (rows * columns / (int(aspect.rsplit("_", 1)[-1]) * side**2)) ** 0.5
        rows, columns = (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
    if side * side + rows * (columns + 1) != count:
        return (whole,) if count >= side * side else ()
    index = side * side + torch.arange(rows * (columns + 1)).view(rows, columns + 1)
    return whole, Grid(index[:, :columns])
