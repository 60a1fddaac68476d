"""A million tokens, generated in constant memory: ``python benchmarks/million_tokens.py``.

A very small Llama with random weights (one layer, 16 channels) reads a short prompt and draws one token after another,
each from a forward pass of its own, with a cache that keeps what its policy keeps: the sinks and a window of
StreamingLLM (arXiv 2309.17453), and the heavy hitters of H2O (arXiv 2306.14048). At every power of ten it prints the
bytes that the cache holds, the resident memory of the process, and tokens per second since the line before. The script
fails if the cache has grown. Only the last token is passed on, not the text so far: what ``generate`` itself holds for
the text (its tokens and their mask, 16 bytes a token) grows and is left out.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from glocal.hf import adapt
from glocal.hf.cache import HeavyHitterCache, PolicyCache, WindowSinksCache

PROMPT = 32


def llama() -> PreTrainedModel:
    """One layer, four heads of four channels, one for keys and values in two."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1 << 20,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def tokens(model: PreTrainedModel, cache: PolicyCache, count: int) -> Iterator[int]:
    """Draw ``count`` tokens after a random prompt."""
    new, at = torch.randint(256, (1, PROMPT)), torch.arange(PROMPT)[None]
    for _ in range(count):
        out = model(input_ids=new, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=1)
        new = torch.multinomial(out.logits[:, -1].softmax(-1), 1)
        at = at[:, -1:] + 1
        yield int(new)


def resident() -> float:
    """MiB that the process holds; where the system does not say, the most that it has held."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        import resource
        import sys

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (2**20 if sys.platform == "darwin" else 2**10)


def run(name: str, make: Callable[[PreTrainedModel], PolicyCache], room: int, count: int) -> None:
    """Print a line at every power of ten from 100 on, and at the end; the cache has ``room`` for so many tokens."""
    model = llama()
    with adapt(model):
        cache = make(model)
        held: list[int] = []
        counts = torch.zeros(256, dtype=torch.long)
        before, start = 0, time.perf_counter()
        for number, token in enumerate(tokens(model, cache, count), 1):
            counts[token] += 1
            if number == count or (number >= 100 and _is_power(number)):
                seconds = time.perf_counter() - start
                if PROMPT + number > room + 1:  # it is full
                    held.append(cache.nbytes)
                rate = (number - before) / seconds
                print(f"{name} | {number:,} | {cache.nbytes:,} | {resident():.0f} | {rate:.0f}", flush=True)
                before, start = number, time.perf_counter()
        assert cache.get_seq_length() == PROMPT + count - 1  # the last token has not been read
        assert len(set(held)) <= 1, f"the cache of {name} has grown: {held}"
        print(f"{name}: {int((counts > 0).sum())} of 256 tokens were drawn, one of them {int(counts.max()):,} times")


def _is_power(number: int) -> bool:
    return number == 10 ** (len(str(number)) - 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--window", type=int, default=60, help="newest tokens, besides 4 sinks")
    parser.add_argument("--heavy", type=int, default=32, help="heavy hitters, besides as many recent tokens")
    args = parser.parse_args()
    for name in ("tokens", "window", "heavy"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; it was {getattr(args, name)}")
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)  # such small products only lose by being shared
    print("policy | tokens | bytes of the cache | MiB resident | tokens a second")
    run("window and sinks", lambda model: WindowSinksCache(model, args.window, sinks=4), args.window + 4, args.tokens)
    heavy = args.heavy
    run("heavy hitters", lambda model: HeavyHitterCache(model, heavy=heavy, recent=heavy), 2 * heavy, args.tokens)


if __name__ == "__main__":
    main()
