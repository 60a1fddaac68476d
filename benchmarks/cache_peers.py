"""Cache policies at an equal budget on the same text: bits per byte, bytes held, time for a token.

    python benchmarks/cache_peers.py [--model FOLDER] [--budget 0.25] [--pieces 8] [--only NAME ...]

A byte-level Llama reads the first 1,536 bytes of a held-out piece at once, then the other 512 one at a time, each
whatever the model had guessed; bits per byte are over those 512. Pieces go through as one batch, on as many threads as
torch takes. The budget is a share of the piece, in tokens that a query may read, itself included. A model that was
trained on shorter pieces needs a shorter ``--length`` and ``--prefill``: at positions that it does not know, full
attention is worse than a window.

The policies are transformers' own (all of it; the sliding window, here with the weights in a Mistral) and the presses
of kvpress, where it is installed (`make cache-peers` makes an environment for it). A press works in one of two ways:

- "at prefill": kvpress' own way. Prefill is full attention, then all but the budget is dropped; what is decoded after
  that is kept, so the cache grows.
- "every n": the same, then its DecodingPress cuts the cache back every n tokens, so that it never exceeds the budget.
  n is 1 where the press can decide from one query, else the least that its default settings allow.

The columns: bits per byte; what it has above full attention, with the standard error over pieces; MiB that a piece's
keys and values take after prefill and at the end; whether the cache still grew in the second half of decoding; the time
of a step, which decodes a token of every piece.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Cache, DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from glocal.bench.corpus import python_source, to_ids
from glocal.bench.table import markdown, markdown_row
from glocal.hf import adapt
from glocal.hf.cache import CoreContextCache, HeavyHitterCache, WindowSinksCache

try:
    import kvpress
except ImportError:
    kvpress = None


@dataclass(frozen=True)
class Job:
    """Tokens: a query reads up to ``budget``; the first ``prefill`` of a piece are read at once."""

    budget: int
    prefill: int


Opened = AbstractContextManager[tuple[PreTrainedModel, Cache]]


@dataclass(frozen=True)
class Policy:
    """``open`` makes, for as long as its context lasts, the model to call and an empty cache for it."""

    name: str
    open: Callable[[PreTrainedModel, Job], Opened]
    sees: Callable[[int, Job], Tensor] | None = None
    """Which keys each query of a piece sees, ``(N, N)``, where that can be written out; this is checked."""
    lossless: bool = True
    """With a budget that holds everything it is full attention; this is checked too."""


@dataclass(frozen=True)
class Result:
    """``bits`` of each piece; bytes of the whole batch after prefill and after each step; seconds of a step."""

    bits: Tensor
    filled: int
    held: list[int]
    seconds: float

    @property
    def grows(self) -> bool:
        half = len(self.held) // 2
        return max(self.held[half:]) > max(self.held[:half])


def policies() -> list[Policy]:
    """Every row of the table, the full cache first."""
    rows = [Policy("full", full, causal), Policy("sliding window", sliding, window), *ours()]
    return rows + presses() if kvpress else rows


def causal(length: int, job: Job) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def window(length: int, job: Job) -> Tensor:
    return causal(length, job).triu(1 - job.budget)


def sinks(length: int, job: Job) -> Tensor:
    """StreamingLLM: four sinks and the newest, once prefill is over."""
    seen = causal(length, job)
    seen[job.prefill :] = window(length, Job(job.budget - 4, job.prefill))[job.prefill :]
    seen[job.prefill :, :4] = True
    return seen


@contextmanager
def full(model: PreTrainedModel, job: Job) -> Iterator[tuple[PreTrainedModel, Cache]]:
    """Everything is kept."""
    yield model, DynamicCache(config=model.config)


@contextmanager
def sliding(model: PreTrainedModel, job: Job) -> Iterator[tuple[PreTrainedModel, Cache]]:
    """transformers' sliding window: the same weights in a Mistral, whose prefill has the window too."""
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    mistral = MistralForCausalLM(MistralConfig(**settings | {"sliding_window": job.budget})).eval()
    mistral.load_state_dict(model.state_dict())
    yield mistral, DynamicCache(config=mistral.config)


def ours() -> list[Policy]:
    """glocal: prefill is full attention, but for the core contexts, which pool groups of 16 far tokens there too."""

    def opened(make: Callable[[PreTrainedModel, int], Cache]) -> Callable[[PreTrainedModel, Job], Opened]:
        @contextmanager
        def open_policy(model: PreTrainedModel, job: Job) -> Iterator[tuple[PreTrainedModel, Cache]]:
            with adapt(model, "full()"):
                yield model, make(model, job.budget)

        return open_policy

    def half(model: PreTrainedModel, budget: int) -> Cache:
        heavy = (budget - 1) // 2  # the newest token comes on top of both halves
        return HeavyHitterCache(model, heavy=heavy, recent=budget - 1 - heavy)

    def cores(model: PreTrainedModel, budget: int) -> Cache:
        return CoreContextCache(model, group_size=16, window=budget * 3 // 4)

    return [
        Policy("glocal: window and sinks", opened(lambda m, n: WindowSinksCache(m, n - 4, sinks=4)), sinks),
        Policy("glocal: heavy hitters", opened(half)),
        Policy("glocal: core contexts", opened(cores), lossless=False),
    ]


def presses() -> list[Policy]:
    """kvpress: each press as it is meant, and again while decoding."""

    class InOrder(kvpress.StreamingLLMPress):
        """Equal scores parted by place, so that ``topk`` leaves the cache in order, as the next cut takes it to be."""

        def score(self, module: Any, hidden_states: Any, keys: Tensor, *rest: Any) -> Tensor:
            places = torch.arange(keys.shape[2]) / (2 * keys.shape[2])
            return super().score(module, hidden_states, keys, *rest) - places

    rows = []
    for name, press, every in (
        ("StreamingLLM", kvpress.StreamingLLMPress, 1),
        ("SnapKV", kvpress.SnapKVPress, 65),  # needs more queries than its window of 64
        ("ObservedAttention", kvpress.ObservedAttentionPress, 1),
        ("TOVA", kvpress.TOVAPress, 1),
        ("Knorm", kvpress.KnormPress, 1),
        ("ExpectedAttention", kvpress.ExpectedAttentionPress, 65),  # needs the statistics of many queries
    ):
        rows += [Policy(f"{name}, at prefill", pressed(press)), Policy(f"{name}, every {every}", pressed(press, every))]
    return [*rows, Policy("StreamingLLM in order, every 1", pressed(InOrder, 1), sinks)]


def pressed(press: Any, every: int = 0) -> Callable[[PreTrainedModel, Job], Opened]:
    """A press at prefill; with ``every``, also after that many decoded tokens."""

    @contextmanager
    def open_press(model: PreTrainedModel, job: Job) -> Iterator[tuple[PreTrainedModel, Cache]]:
        target = job.budget - every
        # kvpress keeps int(tokens * (1 - ratio)): half a token more, lest rounding lose one.
        cut = press(compression_ratio=max(0.0, 1 - (target + 0.5) / job.prefill))
        if every:
            decoding = kvpress.DecodingPress(press(), compression_interval=every, target_size=target)
            cut = kvpress.PrefillDecodingPress(cut, decoding)
        before = model.config._attn_implementation
        if press is kvpress.ObservedAttentionPress:
            model.set_attn_implementation("eager")  # it reads the weights, which no other implementation returns
        try:
            with cut(model):
                yield model, DynamicCache(config=model.config)
        finally:
            model.set_attn_implementation(before)

    return open_press


@torch.no_grad()
def measure(policy: Policy, model: PreTrainedModel, pieces: Tensor, job: Job) -> Result:
    """Read ``pieces (B, N)`` as the script's docstring says."""
    # A compressed cache does not know how long the text was: positions are always given.
    places, guesses, held = torch.arange(pieces.shape[1])[None], [], []
    with policy.open(model, job) as (used, cache):

        def read(start: int, end: int) -> None:
            part = {"input_ids": pieces[:, start:end], "position_ids": places[:, start:end]}
            guesses.append(used(**part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1])
            held.append(nbytes(cache))

        read(0, job.prefill)
        start = time.perf_counter()
        for at in range(job.prefill, pieces.shape[1]):  # the last guess is of a byte beyond the piece
            read(at, at + 1)
        seconds = (time.perf_counter() - start) / (pieces.shape[1] - job.prefill)
    return Result(bits(torch.stack(guesses[:-1], 1), pieces[:, job.prefill :]), held[0], held[1:], seconds)


@torch.no_grad()
def parallel(model: PreTrainedModel, pieces: Tensor, prefill: int, seen: Tensor) -> Tensor:
    """What `measure` must find for the pairs ``seen (N, N)``, without a cache."""
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).expand(len(pieces), 1, -1, -1)
    logits = model(input_ids=pieces, attention_mask=mask, use_cache=False).logits
    return bits(logits[:, prefill - 1 : -1], pieces[:, prefill:])


def bits(logits: Tensor, targets: Tensor) -> Tensor:
    """Bits per byte of each piece, ``(B,)``."""
    return cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1) / math.log(2)


def nbytes(cache: Any) -> int:
    """Bytes of keys and values, unless the cache counts for itself."""
    own = getattr(cache, "nbytes", None)
    if own is not None:
        return int(own)
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def check(rows: list[Policy], model: PreTrainedModel, pieces: Tensor) -> None:
    """On short pieces, each policy with room for everything, and with less where its pairs can be written out."""
    pieces, tight, roomy = pieces[:2, :192], Job(48, 128), Job(512, 128)
    for policy in rows:
        trials = [(roomy, causal)] * policy.lossless + [(tight, policy.sees)] * (policy.sees is not None)
        for job, sees in trials:
            expected = parallel(model, pieces, job.prefill, sees(192, job))
            error = (measure(policy, model, pieces, job).bits - expected).abs().max()
            assert error < 1e-4, f"{policy.name}, budget {job.budget}, is {error:.1e} bits off its parallel form"


def text(pieces: int, length: int) -> Tensor:
    """Held-out pieces ``(pieces, length)``, spread evenly."""
    source = python_source(held_out=True)
    starts = torch.linspace(0, len(source) - length, pieces).long().tolist()
    return torch.stack([to_ids(source[at : at + length]) for at in starts])


def shipped() -> str | None:
    """The folder of the model that glocal ships, if it ships one."""
    try:
        from glocal.hf import byte_llama_folder
    except ImportError:
        return None
    return str(byte_llama_folder())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=shipped(), help="folder of a byte-level Llama; default: the shipped one")
    parser.add_argument("--budget", type=float, default=0.25, help="share of a piece that a query may read")
    parser.add_argument("--length", type=int, default=2048, help="bytes of a piece")
    parser.add_argument("--prefill", type=int, default=1536, help="bytes of a piece that are read at once")
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=[], help="names of policies, or how they begin")
    args = parser.parse_args()
    if args.model is None:
        parser.error("--model is needed: this glocal ships no model")
    if not 192 <= args.prefill < args.length:
        parser.error(f"--prefill must be at least 192 and below --length {args.length}; it was {args.prefill}")
    if not 128 <= args.budget * args.length <= args.prefill:
        parser.error(f"--budget must be between 128 and --prefill tokens; it was {args.budget * args.length:.0f}")
    if args.pieces < 2:
        parser.error(f"--pieces must be at least 2; it was {args.pieces}")
    return args


def main() -> None:
    args = arguments()
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    pieces, job = text(args.pieces, args.length), Job(round(args.budget * args.length), args.prefill)
    rows = policies()
    rows = rows[:1] + [p for p in rows[1:] if not args.only or p.name.startswith(tuple(args.only))]
    if not kvpress:
        print("kvpress is not installed here: its presses are left out (see `make cache-peers`)", file=sys.stderr)
    check(rows, model, pieces)
    print(f"{args.pieces} pieces of {args.length:,} bytes, {job.prefill:,} at once; a budget of {job.budget} tokens.")
    head = ("policy", "bits per byte", "above full", "MiB after prefill", "MiB at the end", "grows", "ms a step")
    print(f"\n{markdown(head, ())}")
    whole = measure(rows[0], model, pieces, job)
    error = (whole.bits - parallel(model, pieces, job.prefill, causal(args.length, job))).abs().max()
    assert error < 1e-4, f"decoding with the full cache is {error:.1e} bits off the parallel form"
    for policy in rows:
        result = whole if policy is rows[0] else measure(policy, model, pieces, job)
        print(markdown_row([policy.name, *cells(result, whole)]), flush=True)


def cells(result: Result, whole: Result) -> list[str]:
    above, mib = result.bits - whole.bits, 2**20 * len(result.bits)
    spread = above.std() / math.sqrt(len(above))
    return [
        f"{result.bits.mean():.4f}",
        "" if result is whole else f"{above.mean():+.4f} ± {spread:.4f}",
        f"{result.filled / mib:.2f}",
        f"{result.held[-1] / mib:.2f}",
        "yes" if result.grows else "no",
        f"{1e3 * result.seconds:.1f}",
    ]


if __name__ == "__main__":
    main()
