"""What an assistant for streams may do after a frame, how it chooses, and the tokens that it sees of a frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Actions", "choose", "frame_tokens"]


@dataclass(frozen=True)
class Actions:
    """The tokens that stand for what the assistant may do after a frame.

    Args:
        silent: go on watching.
        respond: speak.
        ask: look at the frame again in high resolution; None where there is no such view.
    """

    silent: int
    respond: int
    ask: int | None = None

    def __post_init__(self) -> None:
        if len(set(self.ids)) < len(self.ids):
            raise ValueError(f"actions must be different tokens; they were {self.ids}")

    @classmethod
    def of(cls, tokenizer: Any, *, silent: str = ",", respond: str = "]", ask: str | None = ".") -> Actions:
        """Look them up in a tokenizer: numbers that hold for one hold for no other.

        Raises:
            ValueError: a text that is not one token there.
        """
        found: list[Any] = []
        for name, text in (("silent", silent), ("respond", respond), ("ask", ask)):
            ids: list[Any] = [None] if text is None else tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1 or (text is not None and ids[0] == tokenizer.unk_token_id):
                raise ValueError(f"{name} must be one token of the tokenizer; {text!r} is {ids}")
            found.append(ids[0])
        return cls(*found)

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens, ``ask`` last where it is one."""
        return (self.silent, self.respond) if self.ask is None else (self.silent, self.respond, self.ask)


def choose(logits: Tensor, actions: Actions, threshold: float, *, may_ask: bool = True) -> tuple[Tensor, Tensor]:
    """What to do by the logits after a frame.

    Among the actions alone, silence is ruled out where its probability is under the threshold; then the likeliest is
    taken. With three actions that is not a bias: the others share what is left, and the larger share wins.

    Args:
        logits: ``(B, V)``.
        actions: the tokens.
        threshold: 0 takes the likeliest, above 1 is never silent.
        may_ask: whether asking is among the actions.

    Returns:
        Tokens ``(B,)``, and the probability of silence ``(B,)``.

    >>> actions = Actions(silent=0, respond=1, ask=2)
    >>> logits = torch.tensor([[0.6, 0.1, 0.3]]).log()
    >>> [int(choose(logits, actions, threshold)[0]) for threshold in (0.5, 0.7)]
    [0, 2]
    """
    ids = torch.tensor(actions.ids if may_ask else actions.ids[:2], device=logits.device)
    shares = logits[:, ids].float().softmax(-1)
    silence = shares[:, 0].clone()
    shares[:, 0] = torch.where(silence < threshold, -1.0, silence)
    return ids[shares.argmax(-1)], silence


def frame_tokens(patches: Tensor, side: int, summary: Tensor | None = None) -> Tensor:
    """One frame as 1 + side * side tokens: a summary, and means over a grid; 3 for the low view, 7 for the high one.

    Args:
        patches: the vision tower's, ``(rows, columns, C)``.
        side: of the grid.
        summary: its class token ``(C,)``; the mean over the patches where None.

    Returns:
        ``(1 + side * side, C)``, before the projector or after it, as ``patches`` is.

    >>> frame_tokens(torch.arange(4.0).view(2, 2, 1), 1).flatten().tolist()
    [1.5, 1.5]
    """
    if patches.dim() != 3 or side < 1:
        raise ValueError(f"patches must be (rows, columns, C), side at least 1; {tuple(patches.shape)} and {side}")
    grid = F.adaptive_avg_pool2d(patches.movedim(-1, 0).float(), side).flatten(1).T.to(patches.dtype)
    return torch.cat([(patches.mean((0, 1)) if summary is None else summary)[None], grid])
