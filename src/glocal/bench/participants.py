"""Who takes part in `glocal.bench.understanding`: local causal language models by likelihood, and simulated ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from glocal.bench.understanding import Item
from glocal.nn.modes import evaluating
from glocal.steer.credit import token_log_probs

__all__ = ["LikelihoodParticipant", "Mimic", "RandomParticipant", "Understander"]


class LikelihoodParticipant:
    """A causal language model: it samples, chooses by likelihood a token, and answers greedily.

    Args:
        logits: from ids ``(1, N)`` to logits ``(1, N, V)``.
        encode: a text's ids, without any that begin or end a text.
        decode: the text of ids.
        start: ids that begin every text.
        end: the id that ends one, where there is such.
        ask: how prompt, output and question become a text to go on with.
        temperature: of what is made; 0 is greedy.
        max_new_tokens: at most, of an output or an answer; both end at ``stop``.
        stop: where a text ends; it is cut off.
        seed: of samples and of choices among candidates that are alike.
        device: of the ids.

    Raises:
        ValueError: a temperature below 0, no new tokens, or nothing to stop at.

    >>> def counts(ids):  # the next byte is one more
    ...     return torch.nn.functional.one_hot((ids + 1) % 256, 256) * 50.0
    >>> someone = LikelihoodParticipant(counts, lambda text: list(text.encode()), lambda ids: bytes(ids).decode(),
    ...                                 max_new_tokens=3)
    >>> someone.generate("ab"), someone.select("ab", ["xyz", "cde"])
    ('cde', 1)
    """

    def __init__(
        self,
        logits: Callable[[Tensor], Tensor],
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        *,
        start: Sequence[int] = (),
        end: int | None = None,
        ask: str = "{prompt}{output}\n{question}\n",
        temperature: float = 1.0,
        max_new_tokens: int = 64,
        stop: str = "\n",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        if temperature < 0 or max_new_tokens < 1 or not stop:
            raise ValueError(
                f"temperature must be at least 0, max_new_tokens at least 1 and stop not empty; they were "
                f"{temperature}, {max_new_tokens} and {stop!r}"
            )
        self.logits, self.encode, self.decode = logits, encode, decode
        self.start, self.end, self.ask, self.stop = list(start), end, ask, stop
        self.temperature, self.max_new_tokens, self.device = temperature, max_new_tokens, device
        self._draw, self._choose = torch.Generator().manual_seed(seed), random.Random(seed)

    @classmethod
    def from_hf(cls, model: Any, tokenizer: Any, **options: Any) -> Self:
        """A model and a tokenizer of transformers; ``options`` as above. The model is left as it was."""

        def logits(ids: Tensor) -> Tensor:
            with evaluating(model):
                found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                return found

        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return cls(
            logits,
            lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]),
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)),
            **{"start": begin, "end": tokenizer.eos_token_id, "device": model.device, **options},
        )

    def generate(self, prompt: str) -> str:
        """Go on from the prompt until ``stop``, by samples."""
        return self._continue(prompt, self.temperature)

    def answer(self, prompt: str, output: str, question: str) -> str:
        """Go on from the question until ``stop``, with the likeliest tokens."""
        return self._continue(self.ask.format(prompt=prompt, output=output, question=question), 0.0)

    def select(self, prompt: str, candidates: Sequence[str]) -> int:
        """The candidate of the greatest mean log-probability a token, one of the best at random."""
        scores = [self.likelihood(prompt, candidate) for candidate in candidates]
        best = [n for n, score in enumerate(scores) if score == max(scores)]
        return self._choose.choice(best)

    @torch.no_grad()
    def likelihood(self, prompt: str, candidate: str) -> float:
        """Mean log-probability, in nats, of the candidate's tokens after the prompt.

        Raises:
            ValueError: a candidate or a prompt without tokens.
        """
        before, after = self._begin(prompt), self.encode(candidate)
        if not after:
            raise ValueError(f"candidates must have tokens; {candidate!r} has none")
        ids = torch.tensor([before + after], device=self.device)
        return float(token_log_probs(self.logits(ids), ids)[0, len(before) :].double().mean())

    @torch.no_grad()
    def _continue(self, text: str, temperature: float) -> str:
        ids, new = self._begin(text), list[int]()
        for _ in range(self.max_new_tokens):
            logits = self.logits(torch.tensor([ids + new], device=self.device))[0, -1].float().cpu()
            if temperature > 0:
                token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=self._draw))
            else:
                token = int(logits.argmax())
            if token == self.end:
                break
            new.append(token)
            if self.stop in self.decode(new):
                break
        return self.decode(new).partition(self.stop)[0]

    def _begin(self, text: str) -> list[int]:
        ids = self.start + self.encode(text)
        if not ids:
            raise ValueError(f"prompt must have tokens, or start be given; {text!r} has none")
        return ids


class _Simulated:
    """Knows the items by their prompts: what is good is the first reference, what is bad the wrong candidates."""

    def __init__(self, items: Sequence[Item], *, seed: int = 0) -> None:
        self.items = {item.prompt: item for item in items}
        if len(self.items) < len(items) or not all(item.references for item in items):
            raise ValueError("items must have prompts that are all different, and a reference each; these do not")
        self.random = random.Random(seed)

    def _made(self, prompt: str, good: bool) -> str:
        item = self.items[prompt]
        wrong = [c for n, c in enumerate(item.candidates) if n != item.correct]
        return item.references[0] if good else self.random.choice(wrong)

    def _is_right(self, prompt: str, candidate: str) -> bool:
        item = self.items[prompt]
        return candidate == item.candidates[item.correct]

    def _chosen(self, prompt: str, candidates: Sequence[str], right: bool) -> int:
        return self.random.choice([n for n, c in enumerate(candidates) if self._is_right(prompt, c) == right])

    def _said(self, prompt: str, output: str, question: str, right: bool) -> str:
        gold = next(probe.gold(prompt, output) for probe in self.items[prompt].probes if probe.text == question)
        return gold if right else f"not {gold}"


class Understander(_Simulated):
    """Makes by understanding: it draws proposals, half of them good, and keeps the first that it takes for good.

    Its judgement fails by item: some items, ``2 (1 - accuracy)`` of them, it does not understand, and tosses a coin
    for each verdict, so that so many verdicts are right as ``accuracy`` says.

    Args:
        items: with a reference each; prompts are all different.
        accuracy: of its verdicts, from 1/2 to 1.
        proposals: at most, of which the last is kept where none is accepted.
        seed: of all that is random.

    Raises:
        ValueError: an accuracy or a number of proposals outside that, or items without what it needs.
    """

    def __init__(self, items: Sequence[Item], *, accuracy: float = 0.9, proposals: int = 8, seed: int = 0) -> None:
        super().__init__(items, seed=seed)
        if not 0.5 <= accuracy <= 1 or proposals < 1:
            raise ValueError(
                f"accuracy must be from 0.5 to 1 and proposals at least 1; they were {accuracy} and {proposals}"
            )
        self.proposals = proposals
        self.understood = {prompt for prompt in self.items if self.random.random() >= 2 * (1 - accuracy)}

    def _verdict(self, prompt: str, good: bool) -> bool:
        return good if prompt in self.understood else self.random.random() < 0.5

    def generate(self, prompt: str) -> str:
        """The first proposal that it accepts."""
        good = False
        for _ in range(self.proposals):
            good = self.random.random() < 0.5
            if self._verdict(prompt, good):
                break
        return self._made(prompt, good)

    def select(self, prompt: str, candidates: Sequence[str]) -> int:
        """One of those that it accepts; any where it accepts none."""
        accepted = [n for n, c in enumerate(candidates) if self._verdict(prompt, self._is_right(prompt, c))]
        return self.random.choice(accepted or range(len(candidates)))

    def answer(self, prompt: str, output: str, question: str) -> str:
        """Right where it understands, else right or wrong by a coin."""
        return self._said(prompt, output, question, self._verdict(prompt, True))


class Mimic(_Simulated):
    """Makes well and understands little, the one without regard to the other.

    Args:
        items: as for `Understander`.
        generation: how probably what it makes is good.
        understanding: how probably it chooses, and answers, rightly.
        seed: of all that is random.

    Raises:
        ValueError: probabilities that are none, or items without what it needs.
    """

    def __init__(
        self, items: Sequence[Item], *, generation: float = 0.9, understanding: float = 0.6, seed: int = 0
    ) -> None:
        super().__init__(items, seed=seed)
        if not (0 <= generation <= 1 and 0 <= understanding <= 1):
            raise ValueError(
                f"generation and understanding must be from 0 to 1; they were {generation} and {understanding}"
            )
        self.generation, self.understanding = generation, understanding

    def generate(self, prompt: str) -> str:
        """Good with probability ``generation``."""
        return self._made(prompt, self.random.random() < self.generation)

    def select(self, prompt: str, candidates: Sequence[str]) -> int:
        """The right one with probability ``understanding``."""
        return self._chosen(prompt, candidates, self.random.random() < self.understanding)

    def answer(self, prompt: str, output: str, question: str) -> str:
        """Right with probability ``understanding``."""
        return self._said(prompt, output, question, self.random.random() < self.understanding)


class RandomParticipant(_Simulated):
    """Makes, chooses and answers by chance."""

    def generate(self, prompt: str) -> str:
        """Good or bad by a coin."""
        return self._made(prompt, self.random.random() < 0.5)

    def select(self, prompt: str, candidates: Sequence[str]) -> int:
        """Any candidate."""
        return self.random.randrange(len(candidates))

    def answer(self, prompt: str, output: str, question: str) -> str:
        """Right or wrong by a coin."""
        return self._said(prompt, output, question, self.random.random() < 0.5)
