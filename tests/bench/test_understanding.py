"""S013: scipy for correlations and intervals, simulated participants, permutations of labels, likelihoods by hand."""

import json
import random

import numpy as np
import pytest
import torch
from scipy import stats

from glocal.bench.participants import LikelihoodParticipant, Mimic, RandomParticipant, Understander
from glocal.bench.understanding import (
    Item,
    Probe,
    Record,
    evaluate,
    load_records,
    preferred,
    save_records,
    score_table,
    selective_scores,
)
from glocal.bench.understanding_effects import bootstrap_interval, paradox_effects

from . import tiny


def good(item, output):
    return output in item.references


def tasks(count=500, k=2):
    probes = (Probe("Is it good?", lambda prompt, output: "yes" if output == f"good {prompt}" else "no"),)
    return [
        Item(
            str(n),
            (*("bad " * (i + 1) for i in range(k - 1)), f"good {n}"),
            k - 1,
            ("easy", "hard")[n % 2],
            (f"good {n}",),
            probes,
        )
        for n in range(count)
    ]


def arrays(records):
    return tuple(np.array([getattr(r, name) for r in records]) for name in ("generation", "selective"))


# Effects.


@pytest.fixture(scope="module")
def pair():
    items = tasks(400)
    return [evaluate(who, items, good) for who in (Mimic(items, generation=0.8), Understander(items, seed=3))]


def test_effects_and_intervals_are_scipy_s(pair):
    (g, u), (gr, ur) = map(arrays, pair)
    hard = np.arange(400) % 2 == 1
    found = paradox_effects(*pair)
    assert found.correlations == pytest.approx((stats.pearsonr(g, u)[0], stats.pearsonr(gr, ur)[0]))

    def r(a, b, axis):
        return stats.pearsonr(a, b, axis=axis)[0]

    def fall(u, ur, hard, axis):
        d, easy = u - ur, 1 - hard
        return (d * easy).sum(axis) / easy.sum(axis) - (d * hard).sum(axis) / hard.sum(axis)

    wanted = {
        "level": ((g - gr - u + ur,), lambda x, axis: x.mean(axis)),
        "generation": ((g - gr,), lambda x, axis: x.mean(axis)),
        "understanding": ((u - ur,), lambda x, axis: x.mean(axis)),
        "coupling": ((g, u, gr, ur), lambda g, u, gr, ur, axis: r(gr, ur, axis) - r(g, u, axis)),
        "brittleness": ((u, ur, hard.astype(float)), fall),
    }
    for name, (data, statistic) in wanted.items():
        interval = getattr(found, name)
        peer = stats.bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=10000,
            method="percentile",
            random_state=np.random.default_rng(1),
        ).confidence_interval
        assert interval.value == pytest.approx(statistic(*data, axis=-1))
        assert (interval.low, interval.high) == pytest.approx((peer.low, peer.high), abs=0.01), name


def test_fisher_s_z_by_hand(pair):
    found = paradox_effects(*pair, resamples=10)
    r, rr = found.correlations
    z = (np.arctanh(rr) - np.arctanh(r)) / np.sqrt(1 / 397 + 1 / 397)
    assert found.fisher == pytest.approx((z, 2 * stats.norm.sf(abs(z))))


def test_draws_in_parts_are_the_statistic_of_each():
    # So many items that resamples come in several parts.
    scores = np.random.default_rng(0).random(300_000)
    found = bootstrap_interval(lambda drawn: drawn @ scores / len(scores), len(scores), resamples=200)
    spread = 1.96 * scores.std() / len(scores) ** 0.5
    assert found.value == pytest.approx(scores.mean())
    assert found.high - found.low == pytest.approx(2 * spread, rel=0.25)


@pytest.mark.parametrize("understanding", ["selective", "interrogative"])
@pytest.mark.parametrize("seed", range(3))
def test_one_who_understands_shows_no_paradox(understanding, seed):
    items = tasks()
    model, reference = (evaluate(Understander(items, seed=s), items, good) for s in (seed, seed + 100))
    found = paradox_effects(model, reference, understanding=understanding, resamples=2000)
    assert min(found.correlations) > 0.3
    assert not found.level.positive


@pytest.mark.parametrize("understanding", ["selective", "interrogative"])
@pytest.mark.parametrize("seed", range(3))
def test_a_mimic_shows_it(understanding, seed):
    items = tasks()
    model, reference = (evaluate(who(items, seed=seed), items, good) for who in (Mimic, Understander))
    found = paradox_effects(model, reference, understanding=understanding, resamples=2000)
    assert found.level.positive and found.understanding.high < 0 and found.coupling.positive
    assert found.fisher[0] > 1.96 and found.fisher[1] < 0.05


def test_labels_that_mean_nothing_give_no_effect(pair):
    draw, inside = random.Random(0), {"level": 0, "coupling": 0, "brittleness": 0}
    for n in range(200):
        swapped = [pair if draw.random() < 0.5 else pair[::-1] for pair in zip(*pair, strict=True)]
        found = paradox_effects(*zip(*swapped, strict=True), resamples=1000, seed=n)
        for name in inside:
            interval = getattr(found, name)
            inside[name] += interval.low <= 0 <= interval.high
    # By chance 190 of 200 for each, give or take 3.
    assert sum(inside.values()) >= 0.93 * 600 and min(inside.values()) >= 180, inside


def test_what_does_not_vary_has_no_correlation():
    items = tasks(8)
    perfect = evaluate(Mimic(items, generation=1.0, understanding=1.0), items, good)
    found = paradox_effects(perfect, perfect, resamples=10)
    assert np.isnan([*found.correlations, found.coupling.value, found.coupling.low, found.fisher[0]]).all()
    assert (found.level.value, found.level.low, found.level.high) == (0, 0, 0)
    only_easy = [Record(**{**r.__dict__, "difficulty": "easy"}) for r in perfect]
    assert np.isnan(paradox_effects(only_easy, only_easy, resamples=10).brittleness.value)


# The protocol.


@pytest.mark.parametrize("k", [2, 3, 5])
def test_choosing_at_random_is_chance(k):
    items = tasks(2000, k)
    for row in selective_scores(evaluate(RandomParticipant(items), items, good)):
        assert row.items == 1000 and row.chance == 1 / k and row.candidates == k
        assert abs(row.accuracy - 1 / k) < 3 * (row.chance * (1 - row.chance) / row.items) ** 0.5


class First:
    """Always the first that it is shown; and by length where asked."""

    def __init__(self, by_length=False):
        self.by_length, self.seen = by_length, []

    def generate(self, prompt):
        return "good 1"

    def select(self, prompt, candidates):
        self.seen.append(tuple(candidates))
        return min(range(len(candidates)), key=lambda n: len(candidates[n]) if self.by_length else n)

    def answer(self, prompt, output, question):
        return " NO "


@pytest.mark.parametrize("by_length", [False, True])
def test_the_order_of_candidates_changes_nothing(by_length):
    items, draw = tasks(60, 4), random.Random(0)
    other = []
    for item in items:
        order = draw.sample(range(4), 4)
        listed = tuple(item.candidates[n] for n in order)
        other.append(
            Item(item.prompt, listed, order.index(item.correct), item.difficulty, item.references, item.probes)
        )
    assert evaluate(First(by_length), items, good) == evaluate(First(by_length), other, good)


def test_orders_are_shuffled_and_kept_by_the_seed():
    items = tasks(400, 4)
    one, same, another = First(), First(), First()
    records = evaluate(one, items, good)
    evaluate(same, items, good)
    evaluate(another, items, good, seed=1)
    assert one.seen == same.seen != another.seen
    # The first place wins nothing.
    assert abs(np.mean([r.selective for r in records]) - 0.25) < 3 * (0.25 * 0.75 / 400) ** 0.5


def test_the_reference_is_asked_about_the_model_s_outputs():
    items = tasks(20)
    model = evaluate(Mimic(items, generation=0.5), items, good)
    reference = evaluate(First(), items, good, outputs=[r.output for r in model])
    assert [r.asked for r in reference] == [r.output for r in model] != [r.output for r in reference]
    # It says no, which is right where the model's output is bad.
    assert [r.interrogative for r in reference] == [1 - r.generation for r in model]


def test_win_rate_counts_a_tie_as_half():
    items = tasks(4)
    theirs = dict(zip(items, ["a", "bb", "ccc", "x"], strict=True))
    quality = preferred(lambda prompt, a, b: (len(a) > len(b)) + 0.5 * (len(a) == len(b)), theirs)

    class Two(First):
        def generate(self, prompt):
            return "bb" if prompt != "3" else "y"

    assert [r.generation for r in evaluate(Two(), items, quality)] == [1.0, 0.5, 0.0, 0.5]


def test_the_table_by_hand():
    items = tasks(4, 4)
    records = evaluate(First(True), items, lambda item, output: 0.25)
    easy = np.mean([r.selective for r in records[::2]])
    hard = np.mean([r.selective for r in records[1::2]])
    row = score_table({"first": records}).rows[0]
    # The second item alone has what everyone is given as an output that is good.
    assert row == ("first", "0.250", f"{easy:.3f}", f"{hard:.3f}", "0.250", "0.750")


def test_records_go_to_a_file_and_back(tmp_path):
    items = tasks(5)
    items[0] = Item("none asked", ("a", "b"), 0)
    records = evaluate(First(), items, good)
    save_records(records, tmp_path / "people.jsonl")
    assert load_records(tmp_path / "people.jsonl") == records and records[0].interrogative is None


# Language models by likelihood.


def table_model(vocabulary=6, seed=0):
    """A bigram model: logits by the last token."""
    torch.manual_seed(seed)
    logits = torch.randn(vocabulary, vocabulary, dtype=torch.float64)
    letters = "abcde\n"[:vocabulary]
    return logits, (
        lambda ids: logits[ids],
        lambda t: [letters.index(c) for c in t],
        lambda i: "".join(letters[n] for n in i),
    )


def test_likelihood_by_loops():
    logits, parts = table_model()
    someone = LikelihoodParticipant(*parts)
    logs = logits - logits.exp().sum(1, keepdim=True).log()
    candidates = ["a", "bcd", "eeda", "cb"]
    wanted = []
    for candidate in candidates:
        before = 1
        total = 0.0
        for letter in candidate:
            total += float(logs[before, "abcde".index(letter)])
            before = "abcde".index(letter)
        wanted.append(total / len(candidate))
    assert [someone.likelihood("ab", c) for c in candidates] == pytest.approx(wanted)
    assert someone.select("ab", candidates) == int(np.argmax(wanted))


def test_candidates_that_are_alike_are_chosen_at_random():
    def even(ids):
        return torch.zeros(*ids.shape, 4)

    someone = LikelihoodParticipant(even, lambda text: [ord(c) - 97 for c in text], str)
    counts = np.bincount([someone.select("a", ["b", "cc", "ddd"]) for _ in range(600)], minlength=3)
    assert stats.chisquare(counts).pvalue > 0.01


def test_samples_have_the_model_s_frequencies():
    logits, parts = table_model()
    someone = LikelihoodParticipant(*parts, max_new_tokens=1, temperature=2.0)
    counts = np.zeros(6)
    for _ in range(2000):
        counts["abcde".find(someone.generate("c")[:1] or "\n")] += 1
    wanted = (logits[2] / 2).softmax(-1).numpy()
    assert stats.chisquare(counts, 2000 * wanted).pvalue > 0.01
    again = [LikelihoodParticipant(*parts, seed=s, max_new_tokens=9).generate("c") for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


def test_answers_are_greedy_and_end_at_the_newline():
    def next_byte(ids):
        return torch.nn.functional.one_hot((ids + 1) % 256, 256) * 9.0

    parts = (next_byte, lambda text: list(text.encode()), lambda ids: bytes(ids).decode())
    asked = LikelihoodParticipant(*parts, ask="{prompt}|{output}|{question}", stop="f")
    assert asked.answer("x", "y", "a") == "bcde"
    assert LikelihoodParticipant(*parts, max_new_tokens=2).answer("x", "y", "\x00") == "\x0b\x0c"[:2]
    assert LikelihoodParticipant(*parts, end=ord("d"), ask="{question}", stop="!").answer("", "", "a") == "bc"
    assert LikelihoodParticipant(*parts, start=[97], temperature=0, stop="e").generate("") == "bcd"


def test_a_model_of_transformers(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny.llama(tmp_path, layers=1, bytewise=False)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    model.train()
    someone = LikelihoodParticipant.from_hf(model, tokenizer, max_new_tokens=5, temperature=0.0, stop="\x00")
    before = tokenizer("some words ")["input_ids"]  # begins with the token that begins every text
    after = tokenizer("and the import", add_special_tokens=False)["input_ids"]
    assert model.training
    with torch.no_grad():
        logs = model.eval()(torch.tensor([before + after])).logits[0].log_softmax(-1)
        wanted = [float(logs[len(before) - 1 + n, token]) for n, token in enumerate(after)]
        made = model.generate(torch.tensor([before]), do_sample=False, max_new_tokens=5)[0, len(before) :]
    assert someone.likelihood("some words ", "and the import") == pytest.approx(np.mean(wanted), abs=1e-5)
    assert someone.generate("some words ") == tokenizer.decode(made, skip_special_tokens=True)


# Bad input.


def test_bad_items():
    with pytest.raises(ValueError, match="candidates must be at least two, all different"):
        Item("p", ("a",), 0)
    with pytest.raises(ValueError, match="candidates must be at least two, all different"):
        Item("p", ("a", "a"), 0)
    with pytest.raises(ValueError, match="correct must be from 0 to 1; it was 2"):
        Item("p", ("a", "b"), 2)
    with pytest.raises(ValueError, match="difficulty must be 'easy' or 'hard'; it was 'medium'"):
        Item("p", ("a", "b"), 0, "medium")


def test_bad_protocol(pair):
    items = tasks(6)
    with pytest.raises(ValueError, match="items must be at least one"):
        evaluate(First(), [], good)
    with pytest.raises(ValueError, match="outputs must be one for each of 6 items; there are 1"):
        evaluate(First(), items, good, outputs=["a"])
    with pytest.raises(ValueError, match="quality must give from 0 to 1; it gave 2"):
        evaluate(First(), items, lambda item, output: 2)

    class Lost(First):
        def select(self, prompt, candidates):
            return -1

    with pytest.raises(ValueError, match="select must give from 0 to 1; it gave -1 for item 0"):
        evaluate(Lost(), items, good)
    with pytest.raises(ValueError, match="model and reference must be records of the same items"):
        paradox_effects(pair[0], pair[1][:-1])
    with pytest.raises(ValueError, match="understanding must be"):
        paradox_effects(*pair, understanding="deep")
    unasked = [Record(**{**r.__dict__, "interrogative": None}) for r in pair[0]]
    with pytest.raises(ValueError, match="needs questions with every item"):
        paradox_effects(unasked, pair[1], understanding="interrogative")
    with pytest.raises(ValueError, match="count and resamples must be at least 1"):
        bootstrap_interval(lambda drawn: drawn[:, 0], 5, resamples=0)


def test_bad_participants():
    items = tasks(4)
    with pytest.raises(ValueError, match="accuracy must be from"):
        Understander(items, accuracy=0.4)
    with pytest.raises(ValueError, match="generation and understanding must be from 0 to 1"):
        Mimic(items, understanding=1.1)
    with pytest.raises(ValueError, match="items must have prompts that are all different"):
        Mimic([*items, items[0]])
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        LikelihoodParticipant(*table_model()[1], temperature=-1)
    with pytest.raises(ValueError, match="candidates must have tokens"):
        LikelihoodParticipant(*table_model()[1]).likelihood("a", "")
    with pytest.raises(ValueError, match="prompt must have tokens"):
        LikelihoodParticipant(*table_model()[1]).generate("")


@pytest.mark.parametrize("line", ["{", '{"prompt": "p"}', "scores"])
def test_a_file_that_holds_no_records(tmp_path, line, pair):
    if line == "scores":
        line = json.dumps({**pair[0][0].__dict__, "generation": 3})
    save_records(pair[0][:1], tmp_path / "bad.jsonl")
    with open(tmp_path / "bad.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="line 2, is no record"):
        load_records(tmp_path / "bad.jsonl")
