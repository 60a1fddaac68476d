"""S014: the report against numpy and the survey's own averages, the sign test against scipy, prompts by their parts."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from glocal.bench.languages import (
    ENGLISH,
    LEADERBOARD,
    STRATEGIES,
    TOPICS,
    Wording,
    language_report,
    language_table,
    pivot_translation,
    sign_tests,
)

SWAHILI = Wording("Swahili", "Tufikiri hatua kwa hatua.", "Maliza kwa Jibu:")
QUESTION = "Je, mbili na tatu ni ngapi?"
# The survey's column of averages.
AVERAGES = [48.8, 55.7, 51.7, 60.1, 59.6, 66.0, 60.9]


@pytest.mark.parametrize(("strategy", "average"), zip(LEADERBOARD, AVERAGES, strict=True))
def test_published_averages(strategy, average):
    assert round(language_report({"all": LEADERBOARD[strategy]}, "all").mean, 1) == average


def random_scores():
    draw = np.random.default_rng(0)
    table = draw.uniform(5, 95, (6, 4))
    names = ["en", "de", "sw", "th", "fi", "bn"]
    return (
        names,
        table,
        {name: dict(zip("abcd", row, strict=True)) for name, row in zip(names, table.tolist(), strict=True)},
    )


def test_the_report_is_numpy_s():
    names, table, scores = random_scores()
    weights = np.random.default_rng(1).dirichlet(np.ones(6))
    found = language_report(scores, "de", dict(zip(names, weights.tolist(), strict=True)))
    rows = table.mean(1)
    assert list(found.scores.values()) == pytest.approx(rows)
    assert found.mean == pytest.approx(table.mean()) and found.deviation == pytest.approx(np.std(rows))
    assert list(found.ratios.values()) == pytest.approx(rows / rows[1])
    assert found.worst == names[rows.argmin()]
    assert found.gap == pytest.approx((rows[1] - np.delete(rows, 1)).mean())
    assert found.weighted == pytest.approx(np.average(rows, weights=weights))


def test_missing_tasks_are_compared_on_what_is_common():
    # The same ability everywhere: a language that lacks the easy task is not behind for that.
    scores = {"en": {"easy": 90.0, "hard": 30.0}, "sw": {"hard": 30.0}, "th": {"easy": 45.0}}
    found = language_report(scores, "en")
    assert found.ratios == {"en": 1.0, "sw": 1.0, "th": 0.5} and found.gap == pytest.approx((0 + 45) / 2)
    assert found.scores["sw"] == 30.0 and found.mean == pytest.approx((60 + 30 + 45) / 3)


def test_one_language_is_fair():
    found = language_report({"en": {"a": 3.0, "b": 8.0}}, "en")
    assert (found.gap, found.deviation, found.ratios["en"], found.worst, found.weighted) == (0, 0, 1, "en", None)


def test_a_pivot_of_zero_has_no_ratios():
    found = language_report({"en": {"a": 0.0}, "de": {"a": 5.0}}, "en")
    assert all(math.isnan(ratio) for ratio in found.ratios.values()) and found.gap == -5.0


def test_the_table_begins_with_the_best():
    names, table, scores = random_scores()
    rows = language_table(language_report(scores, "en")).rows
    assert [row[0] for row in rows] == [names[n] for n in (-table.mean(1)).argsort()]


def test_the_sign_test_is_scipy_s():
    draw = np.random.default_rng(2)
    languages = [str(n) for n in range(14)]
    scores = {s: dict(zip(languages, draw.integers(0, 5 + n, 14).tolist(), strict=True)) for n, s in enumerate("abcd")}
    scores["tied"] = dict(scores["a"])
    tests = sign_tests(scores)
    assert len(tests) == 10
    for test in tests:
        a, b = (np.array(list(scores[name].values())) for name in (test.first, test.second))
        assert (test.wins, test.losses, test.ties) == ((a > b).sum(), (a < b).sum(), (a == b).sum())
        if test.wins + test.losses:
            assert test.p == pytest.approx(binomtest(test.wins, test.wins + test.losses).pvalue)
        else:
            assert (test.first, test.second, test.p) == ("a", "tied", 1.0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_prompt_holds_the_question_and_its_parts(name):
    prompt = STRATEGIES[name](QUESTION, SWAHILI, ENGLISH)
    english = name.startswith("En") or name == "XLT"
    assert prompt.count(QUESTION) == 1
    assert (ENGLISH.form in prompt, SWAHILI.form in prompt) == (english, not english)
    stepwise = name not in ("Basic", "En-Basic")
    assert (SWAHILI.steps in prompt) == (name == "CoT") and (ENGLISH.steps in prompt) == (stepwise and english)
    assert ("Swahili" in prompt) == (name == "XLT")


def test_translation_replaces_the_question():
    prompt = pivot_translation(QUESTION, lambda text: "How many are two and three?" if text == QUESTION else "?")
    assert prompt == STRATEGIES["En-CoT"]("How many are two and three?", SWAHILI, ENGLISH)
    assert QUESTION not in prompt


def test_topics_have_the_survey_s_axes():
    assert len(set(TOPICS)) == len(TOPICS)
    assert [topic.name for topic in TOPICS if topic.axis == "domain"] == ["medical", "legal", "finance", "culture"]
    assert {topic.part for topic in TOPICS if topic.axis == "security"} == {"attack", "defence"}
    assert len({topic.axis for topic in TOPICS}) == 7


def test_bad_input():
    good = {"en": {"a": 1.0}, "de": {"a": 2.0}}
    with pytest.raises(ValueError, match="pivot must be one of the languages en, de; it was 'fr'"):
        language_report(good, "fr")
    with pytest.raises(ValueError, match="scores of 'de' must be finite numbers, at least one"):
        language_report({**good, "de": {}}, "en")
    with pytest.raises(ValueError, match="scores of 'de' must be finite"):
        language_report({**good, "de": {"a": math.nan}}, "en")
    with pytest.raises(ValueError, match="scores of 'de' must have a task in common"):
        language_report({**good, "de": {"b": 1.0}}, "en")
    for weights in ({"en": 1.0}, {"en": 0.5, "de": 0.6}, {"en": -0.5, "de": 1.5}):
        with pytest.raises(ValueError, match="weights must be at least 0, one for each of en, de, with sum 1"):
            language_report(good, "en", weights)
    with pytest.raises(ValueError, match="must be of the same languages; one lacks sw"):
        sign_tests({"Basic": {"de": 1.0}, "CoT": {"de": 1.0, "sw": 2.0}})
