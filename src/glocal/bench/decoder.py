"""A pretrained causal language model from a local folder, pieces of text for it, and what it says of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache as remembered
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glocal.bench import folder as folder_of
from glocal.bench.corpus import SHIFT, python_source
from glocal.hf import adapt, byte_llama_folder, cache, far_heads, load_causal
from glocal.hf.mechanism import parse_call
from glocal.patterns import parse

__all__ = [
    "BYTES",
    "FAR_HEADS",
    "POLICIES",
    "Decoder",
    "Text",
    "Way",
    "decoded_nats",
    "forced",
    "greedy",
    "held",
    "load",
    "nats",
    "quarter",
    "read",
    "rows_at_once",
    "text",
]

BYTES = "bytes"
"""The name by which the model that glocal ships is asked for."""
POLICIES: dict[str, type[cache.PolicyCache]] = {
    "window": cache.WindowSinksCache,
    "h2o": cache.HeavyHitterCache,
    "less_is_more": cache.LessIsMoreCache,
    "moba": cache.BlocksCache,
    "cca": cache.CoreContextCache,
}
FAR_HEADS = "far_heads"
"""How the text of a parting by heads begins: ``far_heads(share=0.125, near='sliding(255, 0) | sinks(4)')``."""
_TOKENS = 16384  # of a batch
_LOGITS = 1 << 26  # numbers of a batch's logits


@dataclass(frozen=True)
class Decoder:
    """A model and its tokenizer. ``bytewise``: each token is a byte; ``start``: the token that begins every text."""

    name: str
    model: Any
    tokenizer: Any
    heads: int
    head_dim: int
    layers: int
    max_tokens: int
    bytewise: bool
    start: int | None = None

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, without any that the tokenizer would add."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def text(self, ids: list[int]) -> str:
        """The text of tokens."""
        found: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return found

    def size(self, ids: list[int]) -> int:
        """How many bytes of text these tokens are."""
        return sum(i >= SHIFT for i in ids) if self.bytewise else len(self.text(ids).encode())


@dataclass(frozen=True)
class Text:
    """Pieces ``ids (P, N)``; ``sizes (P, N)`` are the bytes of text up to and with each token."""

    source: str
    ids: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Way:
    """A way to attend: ``kind`` is ``"full"``, ``"pattern"``, ``"heads"``, ``"mechanism"`` or ``"cache"``.

    Full attention is the model as it comes, with transformers' own cache. A pattern decodes with that cache too, also
    one by heads, which `fitted` chooses; a mechanism with its own; a cache policy reads the prompt in full, or as its
    class in `glocal.hf.cache` says. ``text`` says which.
    """

    kind: str
    text: str
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @contextmanager
    def on(self, model: Any) -> Iterator[Callable[[], Any]]:
        """The model attends so, inside the statement; gives what makes an empty cache."""
        from transformers import DynamicCache

        if self.kind == "full":
            yield partial(DynamicCache, config=model.config)
            return
        where = self.settings["where"] if self.kind == "heads" else "full()" if self.kind == "cache" else self.text
        with adapt(model, where) as handle:
            if self.kind == "cache":
                yield partial(POLICIES[parse_call(self.text)[0]], model, **self.settings)
            else:
                yield handle.cache if self.kind == "mechanism" else partial(DynamicCache, config=model.config)

    @classmethod
    def heads(cls, text: str) -> Way:
        """Of the text of a parting by heads.

        Raises:
            ValueError: other settings than ``share`` and ``near``, or a pattern that does not parse.

        >>> Way.heads("far_heads(share=0.25,near='sliding(63, 0)')").text
        "far_heads(share=0.25, near='sliding(63, 0)')"
        """
        settings = parse_call(text)[1]
        if sorted(settings) != ["near", "share"] or not isinstance(settings["share"], int | float):
            raise ValueError(f"{FAR_HEADS} needs share and near, e.g. {FAR_HEADS}(share=0.125, near='sliding(255, 0)')")
        near = repr(parse(str(settings["near"])))
        return cls("heads", f"{FAR_HEADS}(share={settings['share']}, near={near!r})", settings)

    def fitted(self, decoder: Decoder, length: int) -> Way:
        """The same way, with the heads chosen on pieces of ``length`` tokens that no comparison is made on."""
        if self.kind != "heads":
            return self
        ids = _rows(decoder, bytes(python_source().tolist()), 8, length)
        where = far_heads(
            decoder.model, {"input_ids": torch.tensor(ids)}, str(self.settings["near"]), self.settings["share"]
        )
        return replace(self, settings=self.settings | {"where": where})

    @classmethod
    def policy(cls, text: str) -> Way:
        """Of a cache policy's text.

        Raises:
            ValueError: an unknown policy or setting.

        >>> Way.policy("window(window=60,sinks=4)").text
        'window(window=60, sinks=4)'
        """
        name, settings = parse_call(text)
        if name not in POLICIES:
            raise ValueError(f"{name!r} is no cache policy; there are {', '.join(POLICIES)}")
        known = dict(inspect.signature(POLICIES[name]).parameters)
        del known["model"]
        for key in settings:
            if key not in known:
                raise ValueError(f"{name} has no setting {key!r}; it has {', '.join(known)}")
        missing = [k for k, p in known.items() if p.default is p.empty and k not in settings]
        if missing:
            raise ValueError(f"{name} needs {', '.join(missing)}, e.g. {name}({missing[0]}=256)")
        said = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        return cls("cache", f"{name}({said})", settings)


def load(source: str | Path) -> Decoder:
    """Load a causal language model from a folder, offline, weights from safetensors only.

    Args:
        source: the folder; ``"bytes"`` is the byte-level Llama that glocal ships.

    Raises:
        ValueError: the folder is not there or lacks a part, or is no model that transformers can load.
    """
    folder = folder_of.check(byte_llama_folder() if source == BYTES else source)
    model, tokenizer = folder_of.loaded(folder, load_causal)
    config = model.config
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        raise ValueError(f"model {str(folder)!r} is a {type(model).__name__}, which has no attention heads to compare")
    limits = [getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None)]
    start = getattr(tokenizer, "bos_token_id", None)
    with_start = start is not None and tokenizer("a")["input_ids"][:1] == [start]
    return Decoder(
        name=BYTES if source == BYTES else folder.resolve().name,
        model=model,
        tokenizer=tokenizer,
        heads=heads,
        head_dim=getattr(config, "head_dim", None) or width // heads,
        layers=int(config.num_hidden_layers),
        max_tokens=min([n for n in limits if isinstance(n, int) and n > 0], default=1 << 20),
        bytewise=type(tokenizer).__name__ == "ByT5Tokenizer",
        start=start if with_start else None,
    )


def text(decoder: Decoder, input: str | Path | None, count: int, length: int) -> Text:
    """Up to ``count`` pieces of ``length`` tokens, spread evenly over a text, no two overlapping.

    Args:
        decoder: whose tokens.
        input: a UTF-8 file; the held-out modules of Python's standard library if None.
        count: pieces at most.
        length: tokens of a piece.

    Raises:
        ValueError: the file cannot be read, or has not enough text for one piece.
    """
    if input is None:
        raw, source = bytes(python_source(held_out=True).tolist()), "source of Python's standard library"
        source = f"held-out {source}" if decoder.name == BYTES else source
    else:
        source = Path(input).name
        try:
            raw = Path(input).read_bytes()
            raw.decode()
        except OSError as error:
            raise ValueError(f"input {str(input)!r} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ValueError(f"input {str(input)!r} is not UTF-8 text") from None
    rows = _rows(decoder, raw, count, length)
    if not rows:
        raise ValueError(
            f"{source}: not enough text for a piece of {length} tokens; give a longer one or less --lengths"
        )
    sizes = [_sizes(decoder, row) for row in rows]
    return Text(source, torch.tensor(rows), torch.tensor(sizes))


def _rows(decoder: Decoder, raw: bytes, count: int, length: int) -> list[list[int]]:
    """Tokens of up to ``count`` pieces of a text, spread evenly; none where there is not enough."""
    first = [] if decoder.start is None else [decoder.start]
    room = length - len(first)
    span = room if decoder.bytewise else min(len(raw), room * 8)  # few tokens are longer than that
    count = max(1, min(count, len(raw) // max(1, span)))
    rows = []
    for n in range(count):
        at = (len(raw) - span) * n // max(1, count - 1) if span <= len(raw) else 0
        if decoder.bytewise:
            ids = [b + SHIFT for b in raw[at : at + span]]
        else:
            ids = decoder.ids(raw[at : at + span].decode(errors="ignore"))[:room]
        if len(ids) == room:
            rows.append(first + ids)
    return rows


def _sizes(decoder: Decoder, row: list[int]) -> list[int]:
    """Bytes up to and with each token. Only those at quarters are asked for, so that decoding stays cheap."""
    if decoder.bytewise:
        return torch.tensor([i >= SHIFT for i in row]).cumsum(0).tolist()
    wanted = {0, quarter(len(row)) - 1, len(row) - 1}
    return [decoder.size(row[: n + 1]) if n in wanted else -1 for n in range(len(row))]


def quarter(length: int) -> int:
    """Where the last quarter begins: the tokens that caches decode."""
    return max(1, length * 3 // 4)


def held(cache: Any) -> int:
    """Bytes of keys and values that a cache holds."""
    own = getattr(cache, "nbytes", None)
    if own is not None:
        return int(own)
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


@torch.no_grad()
def nats(decoder: Decoder, ids: Tensor, step: Callable[[], None] = lambda: None) -> Tensor:
    """``-log p`` of each token but the first, ``(P, N - 1)``, from one parallel pass over ``ids (P, N)``."""
    found = []
    for rows in _batches(decoder, ids):
        logits = decoder.model(input_ids=rows, use_cache=False).logits
        found.append(_nats(logits[:, :-1], rows[:, 1:]))
        step()
    return torch.cat(found)


@torch.no_grad()
def read(decoder: Decoder, ids: Tensor, cache: Any) -> Tensor:
    """Logits after the last of these tokens, ``(P, vocabulary)``; they go into the cache."""
    options = {_cache_argument(type(decoder.model).forward): cache, "use_cache": True, "logits_to_keep": 1}
    out: Tensor = decoder.model(input_ids=ids, **options).logits[:, -1]
    return out


@torch.no_grad()
def forced(decoder: Decoder, ids: Tensor, start: int, cache: Any) -> Iterator[Tensor]:
    """Logits ``(P, vocabulary)`` for each token from ``start`` of ``ids (P, N)``, whatever was guessed before.

    The tokens before are read in parallel into the empty cache, then one a step, all rows at once.
    """
    logits = read(decoder, ids[:, :start], cache)
    yield logits
    for at in range(start, ids.shape[1] - 1):
        yield read(decoder, ids[:, at : at + 1], cache)


def decoded_nats(decoder: Decoder, ids: Tensor, start: int, cache: Any, step: Callable[[], None]) -> Tensor:
    """``-log p`` of the tokens from ``start``, ``(P, N - start)``, decoded with a cache; see `forced`."""
    found = []
    for at, logits in enumerate(forced(decoder, ids, start, cache), start):
        found.append(_nats(logits[:, None], ids[:, at : at + 1]))
        step()
    return torch.cat(found, 1)


@torch.no_grad()
def greedy(decoder: Decoder, prompt: Tensor, query: Tensor, count: int, cache: Any, by_token: bool) -> Tensor:
    """The ``count`` likeliest tokens, one after the other, ``(P, count)``, after a prompt and a query.

    Args:
        decoder: the model.
        prompt: ``(P, N)``, read in parallel.
        query: ``(P, M)``, read after it: one token a step where ``by_token``, else with the prompt.
        count: tokens wanted.
        cache: empty.
        by_token: as a policy that drops tokens after the prompt has to be asked, or it would drop nothing.
    """
    if by_token:
        logits = read(decoder, prompt, cache)
        for at in range(query.shape[1]):
            logits = read(decoder, query[:, at : at + 1], cache)
    else:
        logits = read(decoder, torch.cat([prompt, query], 1), cache)
    found = []
    for n in range(count):
        found.append(logits.argmax(-1, keepdim=True))
        if n + 1 < count:
            logits = read(decoder, found[-1], cache)
    return torch.cat(found, 1)


def rows_at_once(decoder: Decoder, length: int) -> int:
    """Rows of a parallel pass, so that tokens and logits stay within bounds."""
    return max(1, min(_TOKENS // length, _LOGITS // (length * int(decoder.model.config.vocab_size))))


def _batches(decoder: Decoder, ids: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = ids.split(rows_at_once(decoder, ids.shape[1]))
    return parts


def _nats(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)


@remembered
def _cache_argument(forward: Callable[..., Any]) -> str:
    """How the model's forward calls its cache, which has changed between versions of transformers."""
    names = inspect.signature(forward).parameters
    return "cache" if "cache" in names else "past_key_values"
