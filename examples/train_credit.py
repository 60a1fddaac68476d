"""Train a small policy by GRPO, the credit of its tokens shaped by attention, on a task that a rule can check.

    python examples/train_credit.py        # three ways, five seeds: some minutes on one core
    python examples/train_credit.py --strategy coupled --strategy entropy --seeds 2 --updates 50

The policy is the test bed's language model (``benchmarks/proofs/text_bed.py``): it writes a topic and four words, which
it has learned to take from that topic. The reward is 1 where at least three of the words belong to a topic that it is
not told, else 0: one answer in eight earns it at first. Each update draws answers, reads the signals that a strategy
needs in one more forward (`glocal.steer.rhythm`), and takes a step of the clipped loss with the strategy's factors
(`glocal.steer.credit`; Li et al., 2025, arXiv 2510.13554).
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from glocal.steer.credit import (
    STRATEGIES,
    credit_factors,
    group_advantages,
    policy_loss,
    token_entropy,
    token_log_probs,
)
from glocal.steer.rhythm import read_rhythm

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "proofs"))
from text_bed import SENTENCE, START, TOPICS, in_topic, text_bed

HORIZON = (2, 12)  # an answer has 13 tokens
LAYERS = (0,)  # in so small a model the first layer is the one that looks back at topics
SIGNALS = ("local", "anchor", "coupled", "bottom")


def answers(policy: LlamaForCausalLM, count: int) -> Tensor:
    """Sentences drawn from the policy, ``(count, 14)`` with the start token."""
    start = torch.full((count, 1), START)
    settings = dict(max_new_tokens=SENTENCE, do_sample=True, top_k=0)
    found: Tensor = policy.generate(input_ids=start, attention_mask=torch.ones_like(start), **settings)
    return found


def reward(ids: Tensor, topic: int) -> Tensor:
    """1 where at least three words belong to the topic, ``(B,)``."""
    return (in_topic(ids[:, 1:], topic) >= 3).float()


def update(
    policy: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    rewards: Tensor,
    strategy: str,
    *,
    group: int,
    draw: torch.Generator,
) -> None:
    """One step on answers that the policy has just drawn."""
    response = torch.ones_like(ids, dtype=torch.bool)
    response[:, 0] = False
    found = None
    if strategy in SIGNALS:
        found = read_rhythm(policy, {"input_ids": ids}, response, layers=LAYERS, horizon=HORIZON)
    logits = policy(input_ids=ids, use_cache=False).logits
    entropy = token_entropy(logits)
    factors = credit_factors(strategy, response, rhythm=found, entropy=entropy, generator=draw)
    logs = token_log_probs(logits, ids)
    loss = policy_loss(logs, logs.detach(), group_advantages(rewards, group), response, factors=factors)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()


def train_policy(
    strategy: str,
    seed: int,
    *,
    updates: int = 100,
    count: int = 32,
    group: int = 16,
    lr: float = 1e-4,
    step: Callable[[float], None] | None = None,
) -> list[float]:
    """Mean reward of the answers of each update, and of 500 answers after the last; ``step`` is told each."""
    policy = copy.deepcopy(text_bed())
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    topic, draw = seed % TOPICS, torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    curve = []
    for _ in range(updates):
        ids = answers(policy, count)
        rewards = reward(ids, topic)
        update(policy, optimizer, ids, rewards, strategy, group=group, draw=draw)
        curve.append(float(rewards.mean()))
        if step is not None:
            step(curve[-1])
    return [*curve, float(reward(answers(policy, 500), topic).mean())]


def main(
    strategy: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join(STRATEGIES)}; none, random and anchor unless given.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs a strategy, each with another topic.")] = 5,
    updates: Annotated[int, typer.Option(help="Steps of each run.")] = 100,
    answers: Annotated[int, typer.Option(help="Answers a step, a multiple of the group.")] = 32,
    group: Annotated[int, typer.Option(help="Answers that are compared with each other.")] = 16,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
) -> None:
    """Train, and print the rewards of each strategy."""
    strategies = strategy or ["none", "random", "anchor"]
    wrong = [name for name in strategies if name not in STRATEGIES]
    if wrong or min(seeds, updates) < 1 or group < 2 or answers % group or not lr > 0:
        typer.echo(
            f"Error: --strategy must be of {', '.join(STRATEGIES)}; --seeds and --updates at least 1; --group at least "
            "2 and a divisor of --answers; --lr above 0",
            err=True,
        )
        raise typer.Exit(2)
    console = Console(stderr=True)
    found: dict[str, list[list[float]]] = {name: [] for name in strategies}
    with Progress(console=console) as bar:
        task = bar.add_task("training", total=len(strategies) * seeds * updates)
        for name in strategies:
            for seed in range(seeds):

                def step(mean: float, name: str = name) -> None:
                    bar.update(task, advance=1, description=f"{name}: reward {mean:.2f}")

                run = train_policy(name, seed, updates=updates, count=answers, group=group, lr=lr, step=step)
                found[name].append(run)
    print(f"{'strategy':<10}{'while training':>16}{'after':>8}   each seed's")
    for name, runs in found.items():
        last = [run[-1] for run in runs]
        during = statistics.mean(statistics.mean(run[:-1]) for run in runs)
        print(f"{name:<10}{during:>16.3f}{statistics.mean(last):>8.3f}   {'  '.join(f'{x:.3f}' for x in last)}")


if __name__ == "__main__":
    typer.run(main)
