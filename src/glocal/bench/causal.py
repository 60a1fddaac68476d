"""Patterns, mechanisms and cache policies on a pretrained causal language model: what they keep, and what they cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glocal.bench import decoder as models
from glocal.bench import recall
from glocal.bench.decoder import Decoder, Text, Way, quarter
from glocal.bench.run import Interrupted, Step, check_lengths, short
from glocal.hf.cache import PolicyLayer
from glocal.hf.install import attention_modules
from glocal.hf.mechanism import Mechanism, own_window
from glocal.nn import Attention
from glocal.patterns import Causal, Full, Pattern, Sliding, parse

__all__ = ["CACHES", "LADDER", "Comparison", "Cost", "Row", "Settings", "compare"]

LADDER = (
    "sliding(511, 0) | sinks(4)",
    "sliding(255, 0) | sinks(4)",
    "sliding(127, 0) | sinks(4)",
    "sliding(63, 0)",
    "strided(8) | sliding(127, 0)",
    "moba(block_size=64, top_k=4)",
    "far_heads(share=0.125, near='sliding(255, 0) | sinks(4)')",
)
CACHES = (
    "window(window=508, sinks=4)",
    "h2o(heavy=256, recent=256)",
    "less_is_more(budget=512)",
    "moba(block_size=64, top_k=8)",
    "cca(group_size=16, window=384)",
)
_QUICK = (LADDER[1], LADDER[3])
_QUICK_CACHES = CACHES[:2]
_CONTEXT = 2048  # tokens, also for models that could read more
_SHORTEST = 192  # tokens that hold a needle and a span that comes twice
_STEPS = 16  # tokens whose decoding is timed


@dataclass(frozen=True)
class Settings:
    """What to compare. ``quick`` makes all that is not given small; either of ``where`` and ``cache`` alone is enough.

    Args:
        model: a folder, or ``"bytes"`` for the model that glocal ships.
        input: a UTF-8 text file; Python's standard library if None.
        where: texts of patterns and mechanisms.
        cache: texts of cache policies.
        passages: pieces of text at most.
        lengths: tokens at which cost is measured; the longest is the context of all else.
        quick: a small run.
    """

    model: str = models.BYTES
    input: str | None = None
    where: tuple[str, ...] = ()
    cache: tuple[str, ...] = ()
    passages: int | None = None
    lengths: tuple[int, ...] = ()
    quick: bool = False

    def ways(self) -> list[Way]:
        """Full attention, patterns and mechanisms, then cache policies, each once.

        Raises:
            ValueError: a text cannot be read, or names what is unknown.
        """
        given = bool(self.where or self.cache)
        wheres = self.where if given else _QUICK if self.quick else LADDER
        caches = self.cache if given else _QUICK_CACHES if self.quick else CACHES
        found = {Way("full", "full()"): None} | {_attention(text): None for text in wheres}
        for text in caches:
            try:
                found[Way.policy(text)] = None
            except ValueError as error:
                raise ValueError(f"cache {short(text)}: {short(str(error), str)}") from None
        return list(found)

    def count(self) -> int:
        """How many pieces at most."""
        return self.passages or (4 if self.quick else 16)

    def sizes(self, most: int) -> tuple[int, ...]:
        """The lengths at which cost is measured, ascending, for a model that reads ``most`` tokens."""
        top = min(most, _CONTEXT)
        return tuple(sorted(set(self.lengths))) or ((top // 2, top) if self.quick else (top // 4, top // 2, top))


@dataclass(frozen=True)
class Cost:
    """What one sequence takes at one length.

    Args:
        length: tokens, the decoded ones included.
        prefill: seconds to read all but the last tokens, the whole model's.
        token: seconds to decode a token after that.
        bytes: that the cache holds at the end.
    """

    length: int
    prefill: float
    token: float
    bytes: int


@dataclass(frozen=True)
class Row:
    """One way to attend. None, or an empty tuple, is what was not measured, or cannot be.

    Args:
        kind: ``"full"``, ``"pattern"``, ``"heads"``, ``"mechanism"`` or ``"cache"``.
        text: the pattern's, the mechanism's, or the policy's.
        read: keys that the last token of the context reads over all that came so far, mean over heads and layers.
        bytes: of the cache at the end of the context, for one sequence.
        bits: bits per byte of whole pieces, in parallel.
        late: bits per byte of the last quarter of the pieces: in parallel, and decoded for a cache policy.
        error: the standard error, over pieces, of the difference of ``late`` to full attention's.
        perplexity: per token, of the last quarter.
        needle: share of a needle's characters that were found, by depth.
        copy: share of a repeated span's tokens that were guessed, by distance.
        cost: by length.
    """

    kind: str
    text: str
    read: float
    bytes: int
    bits: float | None
    late: float
    error: float | None
    perplexity: float
    needle: tuple[float, ...] = ()
    copy: tuple[float, ...] = ()
    cost: tuple[Cost, ...] = ()

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"cache {self.text}" if self.kind == "cache" else self.text


@dataclass(frozen=True)
class Comparison:
    """All that was measured. The first row is full attention, the reference.

    ``passages`` pieces of ``length`` tokens; ``depths`` and ``distances`` belong to the rows' ``needle`` and ``copy``;
    each of these figures is over ``texts`` texts.
    """

    model: str
    source: str
    passages: int
    length: int
    layers: int
    heads: int
    head_dim: int
    threads: int
    depths: tuple[float, ...]
    distances: tuple[int, ...]
    texts: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def compare(settings: Settings, step: Step = lambda what, done, total: None) -> Comparison:
    """Measure it all. ``step(what, done, total)`` is called along the way.

    Raises:
        ValueError: a setting is wrong; the message names it.
        Interrupted: on Ctrl-C once there is something to show.
    """
    if settings.passages is not None and settings.passages < 1:
        raise ValueError(f"passages must be at least 1; it was {settings.passages}")
    check_lengths(settings.lengths, _SHORTEST)
    ways = settings.ways()
    step("loading the model", 0, 1)
    decoder = models.load(settings.model)
    sizes = settings.sizes(decoder.max_tokens)
    if sizes[-1] > decoder.max_tokens:
        raise ValueError(f"lengths: {decoder.name} reads up to {decoder.max_tokens} tokens; one was {sizes[-1]}")
    for way in ways[1:]:
        _fits(decoder, way, sizes)
    step("choosing heads", 0, 1)
    ways = [way.fitted(decoder, sizes[-1]) for way in ways]
    step("reading text", 0, 1)
    text = models.text(decoder, settings.input, settings.count(), sizes[-1])
    texts = 2 if settings.quick else 3
    needles, copies = recall.needles(decoder, text.ids, texts), recall.copies(decoder, text.ids, texts)
    result = Comparison(
        model=decoder.name,
        source=text.source,
        passages=len(text.ids),
        length=sizes[-1],
        layers=decoder.layers,
        heads=decoder.heads,
        head_dim=decoder.head_dim,
        threads=torch.get_num_threads(),
        depths=recall.DEPTHS,
        distances=copies.distances,
        texts=texts,
        rows=(),
    )
    try:
        for row in _rows(decoder, ways, text, step):
            result = replace(result, rows=(*result.rows, row))
        for n, (needle, copy) in enumerate(_probes(decoder, ways, needles, copies, step)):
            rows = (*result.rows[:n], replace(result.rows[n], needle=needle, copy=copy), *result.rows[n + 1 :])
            result = replace(result, rows=rows)
        for costs in _costs(decoder, ways, text, sizes, 2 if settings.quick else 3, step):
            rows = tuple(replace(r, cost=(*r.cost, c)) for r, c in zip(result.rows, costs, strict=True))
            result = replace(result, rows=rows)
    except KeyboardInterrupt:
        raise Interrupted(result) from None
    return result


def _attention(text: str) -> Way:
    try:
        if text.strip().startswith(f"{models.FAR_HEADS}("):
            return Way.heads(text)
        if Mechanism.names(text):
            return Way("mechanism", str(Mechanism.parse(text)))
        pattern = parse(text)
        return Way("full", "full()") if isinstance(pattern, Full | Causal) else Way("pattern", repr(pattern))
    except (ValueError, TypeError) as error:
        raise ValueError(f"where {short(text)}: {short(str(error), str)}") from None


def _fits(decoder: Decoder, way: Way, sizes: tuple[int, ...]) -> None:
    """Complain before any work about what the model or the lengths do not allow."""
    option = "cache" if way.kind == "cache" else "where"
    try:
        if way.kind == "heads":
            way.fitted(decoder, sizes[0])
            return
        with way.on(decoder.model) as new_cache:
            new_cache()
        if way.kind == "pattern":
            for length in sizes:
                parse(way.text).check(length)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{option} {short(way.text)}: {short(str(error), str)}") from None


class _Ticks:
    """Counts what is done of a whole, and tells ``step``."""

    def __init__(self, step: Step, total: int) -> None:
        self.step, self.total, self.done, self.what = step, total, 0, ""

    def start(self, what: str) -> None:
        self.what = what
        self.step(what, self.done, self.total)

    def __call__(self, count: int = 1) -> None:
        self.done += count
        self.step(self.what, self.done, self.total)


def _rows(decoder: Decoder, ways: list[Way], text: Text, step: Step) -> Iterator[Row]:
    """Bits and what is read, a row as it is ready."""
    start, length = quarter(text.ids.shape[1]), text.ids.shape[1]
    tick = _Ticks(step, len(ways) * length)
    late_bytes = text.sizes[:, -1] - text.sizes[:, start - 1]
    all_bytes = text.sizes[:, -1] - (text.sizes[:, 0] if decoder.start is None else 0)
    reference: Tensor | None = None
    for number, way in enumerate(ways, 1):
        tick.start(f"bits: {way.text}")
        with way.on(decoder.model) as new_cache:
            if way.kind == "cache":
                late, bits = models.decoded_nats(decoder, text.ids, start, new_cache(), tick), None
            else:
                nats = models.nats(decoder, text.ids).double()
                late, bits = nats[:, start - 1 :], _bits(nats.sum(), all_bytes.sum())
            read, held = _used(decoder, way, text.ids[:1], new_cache)
        late = late.double()
        each = late.sum(1) / late_bytes / torch.log(torch.tensor(2.0).double())
        reference = each if reference is None else reference
        apart = each - reference
        count = len(apart)
        yield Row(
            kind=way.kind,
            text=way.text,
            read=read,
            bytes=held,
            bits=bits,
            late=_bits(late.sum(), late_bytes.sum()),
            error=float(apart.std()) / count**0.5 if count > 1 and way.kind != "full" else None,
            perplexity=float(late.mean().exp()),
        )
        tick.done = number * length


def _bits(nats: Tensor, count: Tensor) -> float:
    return float(nats / count / torch.log(torch.tensor(2.0).double()))


@torch.no_grad()
def _used(decoder: Decoder, way: Way, ids: Tensor, new_cache: Callable[[], Any]) -> tuple[float, int]:
    """Share of keys that the last of these tokens reads, and the bytes of the cache then."""
    cache = new_cache()
    models.read(decoder, ids[:, :-1], cache)
    frames = [layer.frame for layer in cache.layers if isinstance(layer, PolicyLayer)]
    with _counted(frames) as counts:
        models.read(decoder, ids[:, -1:], cache)
    if frames:
        read = sum(counts) / len(frames) / ids.shape[1]
    else:
        read = _share(decoder.model, way, ids.shape[1])
    return read, models.held(cache)


@contextmanager
def _counted(frames: list[Attention]) -> Iterator[list[float]]:
    """Counts the keys that the last query of each call reads, mean over heads and the batch."""
    found: list[float] = []

    def counting(frame: Attention, q: Tensor, k: Tensor, v: Tensor, where: Pattern, call: Any, **more: Any) -> Any:
        queries, keys = (q.shape[2],), (k.shape[2],)
        live = where.rows(torch.tensor([q.shape[2] - 1]), queries, keys)
        found.append(float(live.double().mean()) * k.shape[2] * q.shape[1] / frame.num_heads)
        return type(frame).attend(frame, q, k, v, where, call, **more)

    for frame in frames:
        vars(frame)["attend"] = partial(counting, frame)
    try:
        yield found
    finally:
        for frame in frames:
            vars(frame).pop("attend", None)


def _share(model: Any, way: Way, length: int) -> float:
    """The same for a pattern: keys of the last of ``length`` tokens, mean over heads and layers."""
    shares, modules = [], list(attention_modules(model).values())
    same: Pattern = parse(way.text) if way.kind == "pattern" else Full()
    wheres = way.settings["where"] if way.kind == "heads" else [same] * len(modules)
    for module, where in zip(modules, wheres, strict=True):
        own = own_window(module)
        seen = where & (Causal() if own is None else Sliding(own - 1, 0))
        shares.append(float(seen.rows(torch.tensor([length - 1]), (length,), (length,)).double().mean()))
    return sum(shares) / len(shares)


def _probes(
    decoder: Decoder, ways: list[Way], needles: recall.Needles, copies: recall.Copies, step: Step
) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    """What each way finds of needles and of spans that come again."""
    each = sum(-(-len(ids) // models.rows_at_once(decoder, ids.shape[1])) for ids in (needles.prompt, copies.ids))
    tick = _Ticks(step, len(ways) * each)
    for way in ways:
        tick.start(f"recall: {way.text}")
        by_token = way.kind == "cache"
        with way.on(decoder.model) as new_cache:
            needle = recall.needles_right(decoder, needles, new_cache, by_token, tick)
            copy = recall.copy_right(decoder, copies, new_cache, by_token, tick)
        yield needle, copy


def _costs(
    decoder: Decoder, ways: list[Way], text: Text, sizes: tuple[int, ...], rounds: int, step: Step
) -> Iterator[list[Cost]]:
    """For each length, one `Cost` a way. The ways take turns, so that a slow spell meets all of them."""
    tick = _Ticks(step, len(sizes) * len(ways) * rounds)
    for length in sizes:
        tick.start(f"time at {length:,} tokens")
        ids = text.ids[:1, :length]
        prefill: list[list[float]] = [[] for _ in ways]
        token: list[list[float]] = [[] for _ in ways]
        held = [0] * len(ways)
        for _ in range(rounds):
            for n, way in enumerate(ways):
                with way.on(decoder.model) as new_cache:
                    cache, before = new_cache(), time.perf_counter()
                    models.read(decoder, ids[:, :-_STEPS], cache)
                    prefill[n].append(time.perf_counter() - before)
                    for at in range(length - _STEPS, length):
                        before = time.perf_counter()
                        models.read(decoder, ids[:, at : at + 1], cache)
                        token[n].append(time.perf_counter() - before)
                held[n] = models.held(cache)
                tick()
        yield [
            Cost(length, statistics.median(prefill[n]), statistics.median(token[n]), held[n]) for n in range(len(ways))
        ]
