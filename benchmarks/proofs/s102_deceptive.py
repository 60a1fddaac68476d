"""Can attention be trained to hide the token that decides, and which attributions are deceived?

    python benchmarks/proofs/s102_deceptive.py [--epochs 30]

Sentences of 20 of 200 words; one of two words says the label, and attention to it is fined. Embeddings weighed by one
softmax. Wanted: accuracy 0.98 at every strength, ten times less mass on the word at strength 0.1 than at 0, at most
0.6 when its weight is set to zero, and at most 0.6 when the word is replaced. Then, as figures only, a BERT of 2 layers
whose class token's row is fined in the last layer, with the information barrier and without: the share of the word in
the last layer's attention, in rollouts, and in the gradient times the input. Pruthi et al., 2020, arXiv 1909.07913.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from glocal.inspect import (
    DeceptionReport,
    attribution_rollout,
    deception_penalty,
    deception_report,
    gradient_times_input,
    impermissible_share,
    information_barrier,
    layer_attributions,
    record,
    rollout,
)
from glocal.models.language.attention_classifier import AttentionClassifier
from glocal.papers.verdict import verdict

WORDS, LENGTH, SAMPLES, HELD = 200, 20, 4000, 1000
ANONYMOUS = WORDS  # a word of its own
CLASS = WORDS + 1
STRENGTHS = (0.0, 0.1, 1.0)


def sentences(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words, labels, and where the word is that says the label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, WORDS, (count, LENGTH), generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    ids.scatter_(1, torch.randint(0, LENGTH, (count, 1), generator=generator), labels[:, None])
    return ids, labels, ids < 2


def classifier(strength: float, epochs: int, anonymise: bool = False) -> AttentionClassifier:
    torch.manual_seed(0)
    model = AttentionClassifier(WORDS + 1, 2, dim=32)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    ids, labels, hidden = sentences(SAMPLES, 0)
    ids = ids.masked_fill(hidden, ANONYMOUS) if anonymise else ids
    for _ in range(epochs):
        for at in torch.randperm(SAMPLES).split(100):
            out = model(ids[at])
            loss = cross_entropy(out.logits, labels[at]) + deception_penalty(out.weights, hidden[at], strength)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model


def with_class(ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Behind a class token."""
    return (
        torch.cat([torch.full_like(ids[:, :1], CLASS), ids], 1),
        torch.cat([torch.zeros_like(hidden[:, :1]), hidden], 1),
    )


def bert(strength: float, barrier: bool, steps: int) -> Any:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=WORDS + 2)
    drops = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = BertConfig(**sizes, **drops, max_position_embeddings=32, pad_token_id=None, attn_implementation="eager")
    model = BertForSequenceClassification(config)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    every = sentences(SAMPLES, 0)
    for _ in range(steps):
        at = torch.randint(SAMPLES, (64,))
        ids, labels, hidden = (each[at] for each in every)
        ids, hidden = with_class(ids, hidden)
        out = model(input_ids=ids, attention_mask=seen(hidden, barrier), output_attentions=True)
        fine = deception_penalty(out.attentions[-1][:, :, 0], hidden, strength)
        optimiser.zero_grad()
        (cross_entropy(out.logits, labels) + fine).backward()
        optimiser.step()
    return model.eval()


def seen(hidden: Tensor, barrier: bool) -> Tensor | None:
    return -1e4 * ~information_barrier(hidden).mask(hidden.shape[1]) if barrier else None


def audit(model: Any, barrier: bool, count: int = 200) -> tuple[float, dict[str, float]]:
    """Accuracy, and the share of the deciding word by each method."""
    ids, labels, hidden = sentences(count, 1)
    ids, hidden = with_class(ids, hidden)
    given: dict[str, Any] = {"input_ids": ids}
    if barrier:
        given["attention_mask"] = seen(hidden, True)
    with torch.no_grad():
        right = float((model(**given).logits.argmax(1) == labels).double().mean())
    found = record(model, given)
    layers = layer_attributions(model, given)
    gradient = gradient_times_input(model, given, lambda out: out.logits.amax(1).sum())
    scores = {
        "attention": found[-1].weights(torch.tensor([0])).mean(1)[:, 0],
        "rollout": rollout(found, 0),
        "N-Enc rollout": attribution_rollout(layers, 0),
        "gradient": gradient,
    }
    words = torch.arange(LENGTH) + 1  # the class token's own share is not of words
    return right, {name: impermissible_share(each[:, words], hidden[:, words]) for name, each in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ids, labels, hidden = sentences(HELD, 1)
    reports: dict[float, DeceptionReport] = {}
    shares: dict[float, float] = {}
    print(f"{'strength':>8}{'accuracy':>10}{'mass':>8}{'zeroed':>8}{'replaced':>10}{'norms':>8}{'gradient':>10}")
    for strength in STRENGTHS:
        model = classifier(strength, arguments.epochs)
        each = reports[strength] = deception_report(model, ids, labels, hidden, anonymous=ANONYMOUS)
        gradient = gradient_times_input(model, {"input_ids": ids}, lambda out: out.logits.amax(1).sum())
        shares[strength] = impermissible_share(gradient, hidden)
        print(
            f"{strength:>8}{each.accuracy:>10.3f}{each.mass:>8.3f}{each.zeroed:>8.3f}{each.anonymised:>10.3f}"
            f"{each.embedding_share:>8.3f}{shares[strength]:>10.3f}",
            flush=True,
        )
    blind = classifier(0.0, arguments.epochs, anonymise=True)
    floor = deception_report(blind, ids, labels, hidden, anonymous=ANONYMOUS).anonymised
    print(f"trained without the word: {floor:.3f}; base rate {reports[0.0].base_rate:.3f}")
    told: dict[tuple[float, bool], dict[str, float]] = {}
    kept: dict[tuple[float, bool], float] = {}
    for barrier in (False, True):
        for strength in (0.0, 1.0):
            right, found = audit(bert(strength, barrier, arguments.steps), barrier)
            told[strength, barrier], kept[strength, barrier] = found, right
            name = f"BERT, strength {strength:.0f}, " + ("barrier" if barrier else "no barrier")
            print(
                f"{name:<30} accuracy {right:.3f}; " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True
            )
    mass = [each.mass for each in reports.values()]
    good = (
        all(each.accuracy >= 0.98 and each.anonymised <= 0.6 for each in reports.values())
        and all(reports[strength].zeroed <= 0.6 for strength in STRENGTHS)
        and mass[0] >= 10 * mass[1]
        and floor <= 0.6
    )
    deceived = ", ".join(f"{name} {share:.3g}" for name, share in told[1.0, True].items())
    verdict(
        "deceptive-attention",
        f"mass on the word {' / '.join(f'{m:.3f}' for m in mass)} at strength 0 / 0.1 / 1, accuracy at least "
        f"{min(each.accuracy for each in reports.values()):.3f}, weight zeroed at most "
        f"{max(each.zeroed for each in reports.values()):.3f}, word replaced at most "
        f"{max(floor, *(each.anonymised for each in reports.values())):.3f}; the gradient gives the word "
        f"{shares[1.0]:.2f} at strength 1; in BERT behind the barrier at strength 1, accuracy {kept[1.0, True]:.3f}, "
        f"the word has: {deceived}",
        good,
    )


if __name__ == "__main__":
    main()
