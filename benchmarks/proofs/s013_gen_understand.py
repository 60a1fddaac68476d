"""Does the protocol tell one who understands from a mimic, and what does it say of a small model of brackets?

    python benchmarks/proofs/s013_gen_understand.py [--items 500] [--steps 1500]

The gate: a simulated participant that makes by judging must show no lead of making over understanding beside another
of its kind, and scores that go together; one that makes well and understands by halves must show the lead, and scores
that do not go together. Then a decoder of 2 layers of 64 channels learns balanced brackets of up to 24 symbols, a
tenth of them with their depth after a question mark. It goes on from four symbols, chooses between a right
continuation and one with a wrong symbol (hard) or a random one (easy), and says how deep its own string is; beside it a
checker with a stack that errs in 5 %. Its figures are reported and count for nothing in the verdict. West et al.,
2023, arXiv 2311.00059.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from glocal.bench.participants import LikelihoodParticipant, Mimic, Understander
from glocal.bench.understanding import Item, Probe, Record, evaluate, score_table
from glocal.bench.understanding_effects import Effects, Interval, paradox_effects
from glocal.models.language.transformer import Transformer
from glocal.nn import Attention, Rope
from glocal.papers.verdict import verdict

START, SYMBOLS = "^", "()[]"
ALPHABET = "\n^?0123456789" + SYMBOLS
CLOSES = {"(": ")", "[": "]"}
PREFIX, LONGEST, NOISE = 4, 24, 0.05


def balanced(draw: random.Random, length: int) -> str:
    """Opened and closed at random, all closed at the end."""
    text, stack = "", list[str]()
    while len(text) < length:
        if not stack or (len(stack) < length - len(text) and draw.random() < 0.5):
            stack.append(draw.choice("(["))
            text += stack[-1]
        else:
            text += CLOSES[stack.pop()]
    return text


def valid(text: str) -> bool:
    stack: list[str] = []
    for symbol in text:
        if symbol in CLOSES:
            stack.append(CLOSES[symbol])
        elif not stack or stack.pop() != symbol:
            return False
    return not stack


def depth(text: str) -> int:
    height, deepest = 0, 0
    for symbol in text:
        height += 1 if symbol in CLOSES else -1
        deepest = max(deepest, height)
    return deepest


def spoiled(draw: random.Random, text: str) -> str:
    """One symbol is another, which leaves nothing balanced."""
    at = draw.randrange(len(text))
    return text[:at] + draw.choice([s for s in SYMBOLS if s != text[at]]) + text[at + 1 :]


def bracket_items(count: int, seed: int) -> list[Item]:
    draw, items = random.Random(seed), []
    probe = Probe("?", lambda prompt, output: str(depth(prompt + output)))
    for number in range(count):
        text = balanced(draw, draw.randrange(10, LONGEST + 1, 2))
        prompt, rest = text[:PREFIX], text[PREFIX:]
        wrong = spoiled(draw, rest) if number % 2 else random_invalid(draw, prompt, len(rest))
        items.append(Item(prompt, (rest, wrong), 0, "hard" if number % 2 else "easy", (rest,), (probe,)))
    return items


def random_invalid(draw: random.Random, prompt: str, length: int) -> str:
    while valid(prompt + (text := "".join(draw.choices(SYMBOLS, k=length)))):
        pass
    return text


class Checker:
    """Has a stack, and errs in 5 % of what it judges, makes and says."""

    def __init__(self, items: Sequence[Item], seed: int) -> None:
        self.draw, self.references = random.Random(seed), {item.prompt: item.references[0] for item in items}

    def generate(self, prompt: str) -> str:
        rest = self.references[prompt]
        return spoiled(self.draw, rest) if self.draw.random() < NOISE else rest

    def select(self, prompt: str, candidates: Sequence[str]) -> int:
        accepted = [n for n, c in enumerate(candidates) if valid(prompt + c) != (self.draw.random() < NOISE)]
        return self.draw.choice(accepted or range(len(candidates)))

    def answer(self, prompt: str, output: str, question: str) -> str:
        return str(depth(prompt + output) + (self.draw.random() < NOISE))


def train(seed: int, steps: int, batch: int = 64) -> Transformer:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = Transformer(len(ALPHABET), 64, [lambda dim: Attention(dim, 4, causal=True, rope=Rope())] * 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        texts = [balanced(draw, draw.randrange(2, LONGEST + 1, 2)) for _ in range(batch)]
        texts = [START + t + (f"?{depth(t)}" if draw.random() < 0.1 else "") + "\n" for t in texts]
        longest = max(map(len, texts))
        ids = torch.tensor([[ALPHABET.index(c) for c in t] + [-100] * (longest - len(t)) for t in texts])
        logits = model(ids[:, :-1].clamp(min=0))
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 500 == 0:
            print(f"  step {step + 1}: {loss.item():.3f} nats a symbol", flush=True)
    return model.eval()


def shown(interval: Interval) -> str:
    return f"{interval.value:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def describe(name: str, found: Effects) -> None:
    mine, theirs = found.correlations
    print(f"{name}: correlations {mine:.2f} and {theirs:.2f}, Fisher z {found.fisher[0]:.1f}")
    for effect in ("generation", "understanding", "level", "coupling", "brittleness"):
        print(f"  {effect:<15}{shown(getattr(found, effect))}")


def simulated(count: int, seeds: int) -> bool:
    """Whether both kinds come out as they must, in all seeds."""
    items = [Item(str(n), ("good", "bad"), 0, ("easy", "hard")[n % 2], ("good",)) for n in range(count)]

    def records(who: type[Mimic] | type[Understander], seed: int) -> list[Record]:
        return evaluate(who(items, seed=seed), items, lambda item, output: float(output == "good"))

    right = True
    for seed in range(seeds):
        reference = records(Understander, 100 + seed)
        understander, mimic = (paradox_effects(records(who, seed), reference) for who in (Understander, Mimic))
        describe(f"understander, seed {seed}", understander)
        describe(f"mimic, seed {seed}", mimic)
        right &= understander.correlations[0] > 0.3 and not understander.level.positive
        right &= mimic.level.positive and mimic.coupling.positive
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=3, help="of the simulated participants")
    parser.add_argument("--models", type=int, default=1, help="seeds of the model of brackets")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gate = simulated(500, arguments.seeds)
    said = []
    for seed in range(arguments.models):
        print(f"brackets, seed {seed}")
        model, items = train(seed, arguments.steps), bracket_items(arguments.items, 1000 + seed)
        someone = LikelihoodParticipant(
            model,
            lambda text: [ALPHABET.index(c) for c in text],
            lambda ids: "".join(ALPHABET[n] for n in ids),
            start=[ALPHABET.index(START)],
            ask="{prompt}{output}{question}",
            max_new_tokens=LONGEST + 4,
            seed=seed,
        )

        def quality(item: Item, output: str) -> float:
            return float(valid(item.prompt + output))

        records = evaluate(someone, items, quality)
        beside = evaluate(Checker(items, seed), items, quality, outputs=[record.output for record in records])
        table = score_table({"model": records, "checker": beside})
        for row in (table.header, *table.rows):
            print(f"  {row[0]:<12}" + "".join(f"{cell:>15}" for cell in row[1:]))
        found = paradox_effects(records, beside)
        describe("  choices", found)
        describe("  answers", paradox_effects(records, beside, understanding="interrogative"))
        rows = [[float(cell) for cell in row[1:]] for row in table.rows]
        gaps = [row[0] - row[2] for row in rows]
        as_claimed = found.brittleness.positive and gaps[0] > gaps[1]
        said.append(
            f"makes {rows[0][0]:.2f}, chooses {rows[0][1]:.2f} easy and {rows[0][2]:.2f} hard, "
            f"answers {rows[0][4]:.2f}; brittleness {shown(found.brittleness)}, makes less chooses hard {gaps[0]:+.2f} "
            f"(checker {gaps[1]:+.2f}), {'as' if as_claimed else 'not as'} the paper has it"
        )
        print(f"  {said[-1]}\n", flush=True)
    verdict(
        "gen-understand",
        f"simulated participants come out {'as they must' if gate else 'wrongly'}; "
        f"reported only, the model of brackets: {' / '.join(said)}",
        gate,
    )


if __name__ == "__main__":
    main()
