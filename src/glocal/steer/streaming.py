"""An assistant that watches: after each frame it stays silent, looks closer or speaks, unasked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from glocal.steer.actions import Actions, choose
from glocal.steer.compression import (
    COMPRESSED,
    HIGH,
    LOW,
    QUESTION,
    REPLY,
    SYSTEM,
    Compressor,
    Place,
    Segments,
    check_cache,
    interleave,
    kept,
    select_cache,
)
from glocal.steer.method import check_range
from glocal.steer.steering import Steering, language_layers, speaker

__all__ = ["Session", "Step", "StreamingAssistant"]

Text = str | Tensor
"""A text, its token numbers ``(n,)``, or their embeddings ``(n, C)``."""


@dataclass(frozen=True)
class Step:
    """What happened at one frame.

    Args:
        frame: its number.
        time: in seconds.
        actions: names of what was chosen, first for the low view, then for the high one.
        silence: probability of silence at the low view.
        tokens: of the reply; empty where nothing was said.
        answer: the reply as text where there is a tokenizer.
        cached: tokens in the cache afterwards.
    """

    frame: int
    time: float
    actions: tuple[str, ...]
    silence: float
    tokens: tuple[int, ...]
    answer: str
    cached: int

    @property
    def spoke(self) -> bool:
        """Whether there is a reply."""
        return self.actions[-1] == "respond"


@dataclass
class StreamingAssistant:
    """A proactive assistant for streaming video (Zhang et al., 2025, arXiv 2510.14560).

    Each frame is fed to a causal language model in a few tokens; the next token's logits say whether to stay silent,
    to look at it in high resolution, or to respond. After a closer look the choice is between silence and a response.
    Replies are greedy. With a compressor the turn is read again after a reply, with compression tokens in it, and only
    system prompt, questions and compression tokens stay in the cache; positions go on from the true length.

    A model must be trained for it: `glocal.steer.targets` has the targets, `glocal.steer.compression` masks and maps.
    One stream at a time; what it remembers is in a `Session`, dropped at its end.

    Args:
        model: a transformers model that takes ``inputs_embeds``; put it into evaluation mode.
        actions: what stands for silence, response and the closer look.
        low: from a frame to its embeddings ``(n, C)``, as the language model is to read them.
        high: the same for the closer look; None goes without.
        threshold: silence under this probability is ruled out; to be tuned, see `glocal.bench.estp.sweep`.
        system: read first, kept for ever.
        tokenizer: for texts.
        prefix: fed between the response token and the reply.
        max_new_tokens: of a reply.
        end: tokens that end a reply.
        feed_actions: whether silence and asking are fed as tokens; the response token always is. A frame that is looked
            at again follows the asking token, also where the first choice was to respond.
        processor: of the reply's logits, as in transformers: from ``(1, n)`` tokens and ``(1, V)`` to ``(1, V)``.
        compressor: what compression tokens are; None keeps the whole past.
        places: where in a turn they stand.
        turn_tokens: a silent turn that has as many tokens ends too, so that the cache stays bounded; never where None.

    Raises:
        TypeError: a compressor, and a model whose layers do not all attend in full.
        ValueError: settings that do not fit each other.

    Example::

        assistant = StreamingAssistant(model, actions=Actions.of(tokenizer), low=low, high=high, tokenizer=tokenizer)
        for step in assistant.watch(frames, questions={0: "Tell me when the kettle boils."}):
            if step.spoke:
                print(step.time, step.answer)
    """

    model: Any
    _: KW_ONLY
    actions: Actions
    low: Callable[[Any], Tensor]
    high: Callable[[Any], Tensor] | None = None
    threshold: float = 0.5
    system: Text | None = None
    tokenizer: Any = None
    prefix: Text | None = None
    max_new_tokens: int = 64
    end: Collection[int] = ()
    feed_actions: bool = True
    processor: Callable[[Tensor, Tensor], Tensor] | None = None
    compressor: Compressor | None = None
    places: Place = field(default_factory=Segments)
    turn_tokens: int | None = None

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0)
        check_range("max_new_tokens", self.max_new_tokens, 1)
        if (self.high is None) != (self.actions.ask is None):
            raise ValueError("actions.ask and high belong together: give both or none")
        if self.turn_tokens is not None:
            check_range("turn_tokens", self.turn_tokens, 1)
            if self.compressor is None:
                raise ValueError("turn_tokens needs a compressor: without one nothing is dropped")
        if self.compressor is not None:
            check_cache(self.new_cache())

    def new_cache(self) -> Any:
        """An empty cache of the kind that the model uses."""
        from transformers import DynamicCache

        return DynamicCache(config=speaker(self.model).config.get_text_config(decoder=True))

    def session(self) -> Session:
        """A stream of its own, for a ``with`` block."""
        return Session(self)

    def watch(
        self, frames: Iterable[Any], questions: Mapping[int, Text] | None = None, *, fps: float = 2.0
    ) -> Iterator[Step]:
        """Watch frames as they come.

        Args:
            frames: what ``low`` and ``high`` take.
            questions: by the number of the frame before which they are asked.
            fps: frames a second.
        """
        with self.session() as session:
            for number, frame in enumerate(frames):
                if questions and number in questions:
                    session.ask(questions[number])
                yield session.see(frame, number / fps)


class Session:
    """One stream of a `StreamingAssistant`; its state lives as long as its ``with`` block.

    Attributes:
        kinds: what each token in the cache is, ``(cached,)``, numbers of `glocal.steer.compression.KINDS`.
        positions: where in the stream each of them stood, ``(cached,)``.
        length: tokens so far, with those that were dropped.
    """

    def __init__(self, assistant: StreamingAssistant) -> None:
        self.assistant = assistant
        self._model = speaker(assistant.model)
        self._words = self._model.get_input_embeddings()
        layers = language_layers(self._model).values()
        self._both_ways = not all(getattr(layer, "is_causal", True) for layer in layers)
        self._cache_name = Steering.of(self._model).cache_name
        self._open = ExitStack()
        self._cache: Any = None
        self._clear()

    def _clear(self) -> None:
        self._cache = None
        self.kinds = self.positions = torch.zeros(0, dtype=torch.long, device=self._words.weight.device)
        self.length = self._frame = self._piece = 0
        self._past = self._start = 0  # cached tokens, and true length, where this turn began
        self._turn: list[tuple[Tensor, int, int]] = []

    def __enter__(self) -> Self:
        if self._cache is not None:
            raise ValueError("the session is in its with block already")
        self._clear()
        assistant = self.assistant
        with ExitStack() as stack:
            if assistant.compressor is not None:
                stack.enter_context(assistant.compressor.on(assistant.model))
            stack.callback(self._clear)
            self._cache = assistant.new_cache()
            if assistant.system is not None:
                self._feed(self._embeds(assistant.system), SYSTEM)
                self._begin_turn()
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    @torch.no_grad()
    def ask(self, question: Text) -> None:
        """Put a question, at any time; it is never dropped."""
        self._piece += 1
        self._feed(self._embeds(question), QUESTION)

    @torch.no_grad()
    def see(self, frame: Any, time: float | None = None) -> Step:
        """Look at one frame, and act.

        Args:
            frame: what ``low`` and ``high`` take.
            time: in seconds; the frame's number where None.
        """
        assistant, actions = self.assistant, self.assistant.actions
        names = {actions.silent: "silent", actions.respond: "respond", actions.ask: "ask"}
        self._piece += 1
        logits = self._feed(assistant.low(frame), LOW)
        chosen, silence = choose(logits, actions, assistant.threshold)
        taken, kind = [int(chosen)], LOW
        if actions.ask is not None and assistant.high is not None and taken[0] != actions.silent:
            if assistant.feed_actions:
                self._feed(self._token(actions.ask), LOW)
            self._piece += 1
            kind = HIGH
            logits = self._feed(assistant.high(frame), HIGH)
            taken.append(int(choose(logits, actions, assistant.threshold, may_ask=False)[0]))
        tokens: tuple[int, ...] = ()
        if taken[-1] == actions.respond:
            tokens = self._reply()
        elif assistant.feed_actions:
            self._feed(self._token(actions.silent), kind)
        full = assistant.turn_tokens is not None and self.length - self._start >= assistant.turn_tokens
        if tokens or full:
            self._end_turn()
        answer = assistant.tokenizer.decode(tokens, skip_special_tokens=True) if assistant.tokenizer and tokens else ""
        number, self._frame = self._frame, self._frame + 1
        when = float(number) if time is None else time
        return Step(number, when, tuple(names[t] for t in taken), float(silence), tokens, answer, len(self.kinds))

    def _reply(self) -> tuple[int, ...]:
        assistant = self.assistant
        self._piece += 1
        logits = self._feed(self._token(assistant.actions.respond), REPLY)
        if assistant.prefix is not None:
            logits = self._feed(self._embeds(assistant.prefix), REPLY)
        tokens: list[int] = []
        while len(tokens) < assistant.max_new_tokens and (not tokens or tokens[-1] not in assistant.end):
            if assistant.processor is not None:
                so_far = torch.tensor([tokens], dtype=torch.long, device=logits.device)
                logits = assistant.processor(so_far, logits)
            tokens.append(int(logits.argmax(-1)))
            logits = self._feed(self._token(tokens[-1]), REPLY)
        return tuple(tokens)

    def _feed(self, embeds: Tensor, kind: int) -> Tensor:
        """The next token's logits ``(1, V)`` after embeddings ``(n, C)`` of a kind."""
        width = self._words.weight.shape[1]
        if embeds.dim() != 2 or not len(embeds) or embeds.shape[1] != width:
            raise ValueError(f"a frame or a text must be embeddings (n, {width}); they were {tuple(embeds.shape)}")
        if self.assistant.compressor is not None:  # what will be read again
            self._turn.append((embeds, kind, self._piece))
        return self._run(embeds, torch.full((len(embeds),), kind, device=self.kinds.device))

    @torch.no_grad()
    def _run(self, embeds: Tensor, kinds: Tensor) -> Tensor:
        if self._cache is None:
            raise ValueError("the session is over: its state lives in its with block")
        positions = torch.arange(self.length, self.length + len(kinds), device=self.kinds.device)
        more: dict[str, Any] = {self._cache_name: self._cache}
        if self.assistant.compressor is not None:
            more["compressed"] = (kinds == COMPRESSED)[None]
        if self._both_ways:
            # PaliGemma would let what is read at a time see itself both ways: a stream is read as it comes.
            more["attention_mask"] = _causal(len(kinds), len(self.kinds), self._words.weight)
        out = self._model(
            inputs_embeds=embeds.to(self._words.weight)[None],
            position_ids=positions[None],
            use_cache=True,
            logits_to_keep=1,
            **more,
        )
        self.kinds, self.positions = torch.cat([self.kinds, kinds]), torch.cat([self.positions, positions])
        self.length += len(kinds)
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def _end_turn(self) -> None:
        """Read the turn again with compression tokens in it, and drop what is raw."""
        compressor = self.assistant.compressor
        if compressor is not None:
            device = self.kinds.device
            sizes = torch.tensor([len(part) for part, _, _ in self._turn], device=device)
            kinds, pieces = (
                torch.tensor([part[n] for part in self._turn], device=device).repeat_interleave(sizes) for n in (1, 2)
            )
            counts = self.assistant.places(kinds, pieces)
            raw = torch.cat([part.to(self._words.weight) for part, _, _ in self._turn])
            embeds, kinds = interleave(raw, kinds, counts, compressor.embedding.detach())
            self._keep(torch.arange(self._past, device=device))
            self.length = self._start
            self._run(embeds, kinds)
            stays = kept(self.kinds)
            stays[: self._past] = True
            self._keep(stays.nonzero()[:, 0])
        self._begin_turn()

    def _keep(self, index: Tensor) -> None:
        select_cache(self._cache, index)
        self.kinds, self.positions = self.kinds[index], self.positions[index]

    def _begin_turn(self) -> None:
        self._past, self._start, self._turn = len(self.kinds), self.length, []

    def _token(self, token: int) -> Tensor:
        return self._embeds(torch.tensor([token]))

    def _embeds(self, text: Text) -> Tensor:
        if isinstance(text, str):
            if self.assistant.tokenizer is None:
                raise ValueError(f"tokenizer must be given for texts; one was {text!r}")
            text = torch.tensor(self.assistant.tokenizer.encode(text, add_special_tokens=False))
        if text.is_floating_point():
            return text
        if text.dim() != 1:
            raise ValueError(f"token numbers must be (n,); they were {tuple(text.shape)}")
        with torch.no_grad():
            found: Tensor = self._words(text.to(self._words.weight.device))
        return found


def _causal(rows: int, past: int, like: Tensor) -> Tensor:
    """What new tokens see, ``(1, 1, rows, past + rows)``, as numbers to add to scores."""
    least = torch.finfo(like.dtype).min
    return torch.full((1, 1, rows, past + rows), least, dtype=like.dtype, device=like.device).triu(past + 1)
