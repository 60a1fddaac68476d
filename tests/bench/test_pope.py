"""POPE and CHAIR against scikit-learn and counting."""

from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from glocal.bench.pope import NEGATIVES, chair, mentioned, negatives, poll, polled, verdict
from glocal.bench.scenes import KINDS, Question, Scene, Thing, caption, scenes

SOME = scenes(120, 0, held_out=True)


@pytest.mark.parametrize("how", NEGATIVES)
def test_half_of_what_is_asked_for_is_there(how):
    asked = poll(SOME, how)
    for n, question in asked:
        kind = tuple(question.text.rstrip("?").split()[-2:])
        assert (question.answer == "yes") == (kind in SOME[n].kinds())
    answers = Counter(question.answer for _, question in asked)
    assert answers["yes"] == answers["no"] > 200
    assert poll(SOME, how) == asked and len(set(asked)) == len(asked)


def test_popular_negatives_are_the_most_frequent_absent():
    often = Counter(kind for scene in SOME for kind in scene.kinds())
    for scene, found in zip(SOME, negatives(SOME, "popular", 3), strict=True):
        least = min(often[kind] for kind in found)
        others = [often[kind] for kind in KINDS if kind not in scene.kinds() and kind not in found]
        assert max(others) <= least


def test_adversarial_negatives_come_most_often_with_what_is_there():
    for scene, found in zip(SOME[:30], negatives(SOME, "adversarial", 2)[:30], strict=True):

        def near(kind, scene=scene):
            return sum(kind in other.kinds() and there in other.kinds() for other in SOME for there in scene.kinds())

        others = [near(kind) for kind in KINDS if kind not in scene.kinds() and kind not in found]
        assert max(others) <= min(near(kind) for kind in found)


def test_random_negatives_are_spread():
    found = Counter(kind for kinds in negatives(SOME, "random", 3) for kind in kinds)
    assert len(found) == len(KINDS)


def test_scores_are_scikit_learn_s():
    draw = np.random.default_rng(0)
    questions = [Question("?", answer, "presence") for answer in draw.choice(["yes", "no"], 300)]
    said = draw.choice(["Yes.", "no", "yes, there is", "No, there is none", "perhaps"], 300).tolist()
    found = polled(said, questions)
    true = [question.answer == "yes" for question in questions]
    guess = [text.lower().startswith("yes") for text in said]
    precision, recall, f1, _ = precision_recall_fscore_support(true, guess, average="binary")
    assert (found.precision, found.recall, found.f1) == pytest.approx((precision, recall, f1))
    assert found.accuracy == pytest.approx(accuracy_score(true, guess)) and found.count == 300
    assert found.yes == pytest.approx(np.mean(guess))


def test_nobody_says_yes():
    found = polled(["no", "no"], [Question("?", "yes", "presence"), Question("?", "no", "presence")])
    assert (found.accuracy, found.precision, found.recall, found.f1, found.yes) == (0.5, 0.0, 0.0, 0.0, 0.0)


def scene(*kinds):
    return Scene(np.zeros((1, 1, 3), np.uint8), tuple(Thing(c, s, (0, 0, 1, 1)) for c, s in kinds))


def test_captions_by_hand():
    some = [scene(("red", "square"), ("blue", "star")), scene(("green", "ring")), scene(("white", "heart"))]
    found = chair(["a red square and a green star", "a green ring", "nothing"], some)
    # Three things are named, one of them is not there; one caption of three is wrong; two of four things are named.
    assert (found.instances, found.sentences, found.recall) == pytest.approx((1 / 3, 1 / 3, 2 / 4))
    assert found.length == pytest.approx((7 + 3 + 1) / 3)
    perfect = chair([caption(one) for one in SOME], SOME)
    assert (perfect.instances, perfect.sentences, perfect.recall) == (0.0, 0.0, 1.0)


def test_words():
    assert verdict("NO!") is False and verdict("It is not") is None and verdict("Well, yes: no doubt") is True
    assert mentioned("A RED, square and a red square") == [("red", "square"), ("red", "square")]


def test_bad_input():
    with pytest.raises(ValueError, match="how must be one of"):
        negatives(SOME, "hard", 1)
    with pytest.raises(ValueError, match="count must leave"):
        negatives(SOME, "random", 48)
    with pytest.raises(ValueError, match="at least one question"):
        polled([], [])
    with pytest.raises(ValueError, match="a caption for each scene"):
        chair(["nothing"], [])
