"""Prefill of a whole language model: full attention against patterns, the model's projections and MLPs included.

    python benchmarks/prefill.py [--lengths 2048 8192] [--repeat 3]

Random weights, batch 1, float32, a prompt read into a cache, logits of its last token. Two sizes: that of the shipped
byte model (4 layers of 256) and a larger one (8 layers of 512, 8 heads of 64 on 4). Full attention is transformers'
own (``sdpa``, which on a CPU is torch's flash kernel), and glocal's full attention beside it. Variants take turns; in
each turn a variant runs twice and the second call counts, as a variant that is served finds its memory in place. Times
are the best of ``--repeat`` turns. ``attention`` is the time inside the attention function alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from glocal.bench.table import markdown, markdown_row
from glocal.hf import adapt

VARIANTS = {
    "full, transformers' sdpa": None,
    "full, glocal": "full()",
    "sliding(1023, 0) | sinks(4)": "sliding(1023, 0) | sinks(4)",
    "sliding(511, 0) | sinks(4)": "sliding(511, 0) | sinks(4)",
    "sliding(255, 0) | sinks(4)": "sliding(255, 0) | sinks(4)",
    "sliding(127, 0) | sinks(4)": "sliding(127, 0) | sinks(4)",
}
SIZES = {
    "byte model": dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8),
    "8 layers of 512": dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8),
}

HEAD = ("model", "tokens", "attention", "prefill", "times as fast", "attention alone", "times as fast")


class Clock:
    """Adds up the time inside whatever attention function the model uses."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model, self.seconds = model, 0.0

    def __enter__(self) -> Clock:
        self.name = self.model.config._attn_implementation
        self.function = AttentionInterface()[self.name]
        AttentionInterface.register(self.name, self.timed)
        return self

    def timed(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        out = self.function(*args, **options)
        self.seconds += time.perf_counter() - start
        return out

    def __exit__(self, *_: object) -> None:
        if self.name in AttentionInterface._global_mapping:
            AttentionInterface.register(self.name, self.function)


def prefill(model: LlamaForCausalLM, ids: torch.Tensor, where: str | None) -> tuple[float, float]:
    """Seconds of the whole pass, and of attention."""
    with torch.no_grad(), adapt(model, where) if where else nullcontext(), Clock(model) as clock:
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start, clock.seconds


def measure(call: Callable[[str | None], tuple[float, float]], repeat: int) -> dict[str, tuple[float, float]]:
    """The fastest calls; variants take turns, and each turn's first call is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for _ in range(repeat):
        for name, where in VARIANTS.items():
            call(where)
            times[name].append(call(where))
    return {name: min(ts) for name, ts in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    print(markdown(HEAD, ()))
    for title, sizes in SIZES.items():
        torch.manual_seed(0)
        heads = sizes["num_attention_heads"] // 2
        longest = max(options.lengths)
        config = LlamaConfig(vocab_size=259, num_key_value_heads=heads, max_position_embeddings=longest, **sizes)
        model = LlamaForCausalLM(config).eval()
        for length in options.lengths:
            ids = torch.randint(3, 259, (1, length))
            found = measure(lambda where, ids=ids, model=model: prefill(model, ids, where), options.repeat)
            whole, inside = found["full, transformers' sdpa"]
            for name, (seconds, attention) in found.items():
                row = [title, f"{length:,}", name, f"{seconds:.3f} s", f"{whole / seconds:.2f}"]
                print(markdown_row([*row, f"{attention:.3f} s", f"{inside / attention:.1f}"]), flush=True)


if __name__ == "__main__":
    main()
