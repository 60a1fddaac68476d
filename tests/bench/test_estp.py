"""ESTP-F1 by hand, and against a table of matches and scores in fractions."""

import math
import random
from fractions import Fraction

import pytest

from glocal.bench.estp import (
    TASKS,
    ESTPScore,
    GroundTruth,
    Prediction,
    Sweep,
    estp_score,
    matches,
    overlap,
    sweep,
    time_score,
)

CUP = GroundTruth("a red cup", start=10, end=14)


def five(question, answer, said):
    return 5.0


def test_by_hand():
    assert estp_score([CUP], [Prediction("a red cup", 10)]).f1 == 1
    astray = estp_score([CUP], [Prediction("a red cup", 10), Prediction("a red cup", 40)])
    assert astray == ESTPScore(1.0, 1, 0, 1) and astray.f1 == pytest.approx(2 / 3)
    assert estp_score([CUP], []) == ESTPScore(0.0, 0, 1, 1) and estp_score([CUP], []).f1 == 0
    # One of two, at half the interval with its tolerance after the best moment: (5 + 2.5) / 10.
    half = estp_score([CUP, GroundTruth("cup", 50, 54)], [Prediction("a red cup", 13.5)])
    assert half.total == pytest.approx(0.75) and half.f1 == pytest.approx(1.5 / 2.5)
    # Two replies to one: their mean.
    both = estp_score([CUP], [Prediction("a red cup", 10), Prediction("a red cup", 13.5)])
    assert both.total == pytest.approx((1 + 0.75) / 2) and both.false_positives == 0
    assert math.isnan(estp_score([], []).f1) and estp_score([], [Prediction("cup", 1)]).f1 == 0


@pytest.mark.parametrize("time, counts", [(8.99, False), (9, True), (16, True), (16.01, False)])
def test_a_second_early_and_two_late(time, counts):
    assert bool(matches([CUP], [Prediction("", time)])[0, 0]) == counts
    assert estp_score([CUP], [Prediction("", time)]).false_positives == int(not counts)


def test_a_reply_where_intervals_touch_counts_for_both_and_is_not_astray():
    score = estp_score([GroundTruth("cup", 4, 6), GroundTruth("cup", 8, 9)], [Prediction("cup", 7.5)])
    assert (score.false_positives, score.false_negatives) == (0, 0)
    assert score.total == pytest.approx((5 + 5 * (1 - 3.5 / 5)) / 10 + (5 + 5 * (1 - 0.5 / 4)) / 10)


@pytest.mark.parametrize("seed", range(20))
def test_random_videos_against_loops_in_fractions(seed):
    """Times in quarters of a second, so that bounds are hit exactly."""
    draw = random.Random(seed)
    tasks = [task for kind in TASKS.values() for task in kind]
    truths = []
    for _ in range(draw.randrange(6)):
        start = draw.randrange(80) / 4
        truths.append(GroundTruth("cup", start, start + draw.randrange(16) / 4, draw.choice(tasks)))
    said = [Prediction(draw.choice(["cup", "dog"]), draw.randrange(-8, 110) / 4) for _ in range(draw.randrange(8))]
    early = ("OR", "AP", "TRU", "OL", "OFR", "IFR", "ORC")
    total, hit, missed = Fraction(0), set(), 0
    for truth in truths:
        start, end = Fraction(truth.start), Fraction(truth.end)
        best = start if truth.task in early else (start + end) / 2
        found = []
        for n, p in enumerate(said):
            t = Fraction(p.time)
            if t - start >= -1 and t - end <= 2:
                hit.add(n)
                answer = 5 if p.answer == "cup" else 1
                found.append(Fraction(answer, 10) + max(Fraction(0), (1 - abs(t - best) / max(1, end - start + 3)) / 2))
        missed += not found
        total += sum(found) / len(found) if found else 0
    score = estp_score(truths, said)
    assert score.total == pytest.approx(float(total), abs=1e-12)
    assert (score.false_positives, score.false_negatives) == (len(said) - len(hit), missed)
    if truths or said:
        whole = 2 * total + len(said) - len(hit) + missed
        assert score.f1 == pytest.approx(float(2 * total / whole) if whole else 0, abs=1e-12)


def test_fourteen_tasks_and_their_best_moments():
    assert [len(tasks) for tasks in TASKS.values()] == [8, 4, 2]
    at_start = {t for tasks in TASKS.values() for t in tasks if GroundTruth("", 2, 6, t).best == 2}
    assert at_start == {"OR", "AP", "TRU", "OL", "OFR", "IFR", "ORC"}
    assert GroundTruth("", 2, 6, "AR").best == 4
    assert time_score(GroundTruth("", 2, 6, "AR"), 4) == 5 and time_score(CUP, 17) == 0


def test_judges():
    assert estp_score([CUP], [Prediction("anything", 10)], five).f1 == 1
    asked = []
    estp_score([GroundTruth("cup", 1, 2, question="What?")], [Prediction("dog", 1)], lambda *a: asked.append(a) or 2)
    assert asked == [("What?", "cup", "dog")]
    with pytest.raises(ValueError, match=r"judge must answer 1 to 5; it answered 0"):
        estp_score([CUP], [Prediction("cup", 10)], lambda *a: 0)
    assert overlap("", "", "") == 5 and overlap("", "cup", "") == 1


def test_scores_of_videos_add_up():
    parts = [estp_score([CUP], [Prediction("a red cup", t)]) for t in (10, 40)]
    assert sum(parts, ESTPScore()) == ESTPScore(1.0, 1, 1, 2) and sum(parts, ESTPScore()).f1 == 0.5


def test_a_sweep_reports_on_others_what_was_best_for_tuning():
    def run(threshold, video):
        return [CUP], [Prediction("a red cup", 10)] if video < threshold else [Prediction("", 40)]

    found = sweep((0.2, 0.5, 0.9), run, tuning=[0.3, 0.4], held_out=[0.1, 0.6])
    assert isinstance(found, Sweep) and found.threshold == 0.5
    assert [s.f1 for s in found.tuning] == [0, 1, 1] and [s.f1 for s in found.held_out] == [0.5, 0.5, 1]
    assert found.score.f1 == 0.5
    with pytest.raises(ValueError, match="held_out must not be empty"):
        sweep((0.2,), run, [0.3], [])


def test_bad_input():
    with pytest.raises(ValueError, match="task must be one of OR, AP"):
        GroundTruth("", 1, 2, "XX")
    with pytest.raises(ValueError, match="start must be finite and at most end; they were 3 and 2"):
        GroundTruth("", 3, 2)
    with pytest.raises(ValueError, match="finite times"):
        estp_score([CUP], [Prediction("", math.nan)])
