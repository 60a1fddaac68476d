"""Does the report of languages show that an encoder does not know one of them?

    python benchmarks/proofs/s014_multilingual.py [--ciphers 5]

The MiniLM of the demo embeds 30 sentences, a paraphrase of each, and each sentence in ciphers: a permutation of the
alphabet, a stand-in for a language that was never seen, and one that leaves half of the letters alone. The task is to
find, for each sentence, its fellow among the 30, by cosine. The claim: the cipher's transfer ratio is below 0.5 and it
comes last in the report. Huang et al., 2024, arXiv 2405.10936.
"""

from __future__ import annotations

import argparse
import random
import string

import torch
from torch import Tensor

from glocal.bench import encoder
from glocal.bench.languages import language_report, language_table, sign_tests
from glocal.papers.verdict import verdict

PAIRS = (
    ("The cat sleeps on the warm roof.", "A feline is napping on top of the heated house."),
    ("It will rain tomorrow morning.", "Showers are expected early the next day."),
    ("She plays the violin every evening.", "Each night she practises her string instrument."),
    ("The train to Paris was late.", "The rail service bound for the French capital got delayed."),
    ("He baked bread for his neighbours.", "For the people next door he made a few loaves."),
    ("Prices of oil rose sharply.", "Crude became much more expensive."),
    ("The doctor told me to drink water.", "My physician advised me to stay hydrated."),
    ("Children learn to swim at school.", "Pupils are given swimming lessons."),
    ("A new planet has been discovered.", "Astronomers found an unknown world."),
    ("The bridge is closed for repairs.", "Because of maintenance nobody may cross the river there."),
    ("My laptop needs a new battery.", "The power pack of my computer has to be replaced."),
    ("Farmers grow rice in the valley.", "Paddy fields are cultivated in the lowland."),
    ("The court found him guilty.", "A judge convicted the man."),
    ("Bees make honey from flowers.", "Nectar is turned into a sweet syrup by insects."),
    ("We walked along the beach at sunset.", "At dusk we strolled by the sea."),
    ("The team won the final match.", "The players were victorious in the championship game."),
    ("Her grandfather fought in the war.", "Her mother's father was a soldier."),
    ("The museum shows old paintings.", "Historic pictures hang in the gallery."),
    ("Too much sugar harms your teeth.", "Sweets are bad for dental health."),
    ("The volcano erupted last night.", "Lava burst from the mountain yesterday evening."),
    ("He lost his keys in the park.", "Somewhere on the lawn he dropped what opens his door."),
    ("The company hired ten engineers.", "Ten technical staff were recruited by the firm."),
    ("Snow covered the whole village.", "The hamlet lay under a white blanket of winter."),
    ("I forgot to pay the electricity bill.", "The power invoice slipped my mind."),
    ("The library opens at nine.", "From nine o'clock one can borrow books."),
    ("Whales sing to each other.", "Large sea mammals communicate by songs."),
    ("The election result surprised everyone.", "Nobody had expected the outcome of the vote."),
    ("This recipe needs two eggs.", "To cook the dish, crack a pair of eggs."),
    ("The pilot landed safely in the storm.", "In bad weather the airman brought the plane down."),
    ("They planted trees beside the road.", "Saplings were set along the street."),
)


def cipher(seed: int, letters: str = string.ascii_lowercase) -> dict[int, int]:
    """A permutation of these letters without a fixed point, for `str.translate`."""
    order = list(letters)
    random.Random(seed).shuffle(order)
    turned = order[1:] + order[:1]
    return str.maketrans("".join(order), "".join(turned))


def embeddings(model: encoder.Encoder, sentences: list[str]) -> Tensor:
    """``(30, hidden)`` of length 1, in the order of the sentences."""
    out = torch.empty(len(sentences), model.model.config.hidden_size)
    for numbers, states in encoder.embed(model, encoder.batches(model, sentences)):
        out[numbers] = states
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ciphers", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = encoder.load()
    originals = [first.lower() for first, _ in PAIRS]
    base = embeddings(model, originals)

    def found(others: list[str]) -> float:
        """Percent of sentences whose nearest among the others is their fellow."""
        nearest = (base @ embeddings(model, others).T).argmax(1)
        return 100 * float((nearest == torch.arange(len(PAIRS))).float().mean())

    tasks = [str(seed) for seed in range(arguments.ciphers)]
    english = found([second.lower() for _, second in PAIRS])
    scores: dict[str, dict[str, float]] = {"English": dict.fromkeys(tasks, english), "half cipher": {}, "cipher": {}}
    for seed, task in enumerate(tasks):
        half = "".join(random.Random(seed).sample(string.ascii_lowercase, 13))
        for name, letters in (("half cipher", cipher(seed, half)), ("cipher", cipher(seed))):
            scores[name][task] = found([text.translate(letters) for text in originals])
        print(
            f"cipher {task}: {scores['cipher'][task]:5.1f} %, half of it {scores['half cipher'][task]:5.1f} %",
            flush=True,
        )
    report = language_report(scores, "English")
    table = language_table(report)
    print(f"\n{table.header[0]:<14}{table.header[1]:>8}{table.header[2]:>8}")
    for name, score, ratio in table.rows:
        print(f"{name:<14}{score:>8}{ratio:>8}")
    print(
        f"mean {report.mean:.1f}, gap {report.gap:.1f}, deviation {report.deviation:.1f}, chance {100 / len(PAIRS):.1f}"
    )
    for test in sign_tests(scores):
        print(f"{test.first} better than {test.second} in {test.wins} of {len(tasks)}: p {test.p:.2f}")
    verdict(
        "multilingual-survey",
        f"sentences found in English paraphrases {report.scores['English']:.1f}%, in ciphers "
        f"{report.scores['cipher']:.1f}% (transfer ratio {report.ratios['cipher']:.2f}), in half ciphers "
        f"{report.scores['half cipher']:.1f}%; last in the report: {report.worst}",
        report.ratios["cipher"] < 0.5 and report.worst == "cipher",
    )


if __name__ == "__main__":
    main()
