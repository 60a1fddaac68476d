"""Answers as people and models write them, accuracies by hand, what each setting shows, and files that are wrong."""

import json

import pytest

from glocal.bench.earthmind import SETTINGS, EarthSample, earth_scores, read_samples, same_words, score

OPTIONS = ("A dense forest", "A river", "Urban area")


def choice(answer="B", **more):
    return EarthSample("o", "r", "What is shown?", answer, "choice", "scene", options=OPTIONS, **more)


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("The answer is B", "B"),
        ("Answer: B) A river", "B"),
        ("B. A river", "B"),
        ("A river", "B"),  # an article is no letter
        ("It shows an urban area.", "C"),
        ("a dense forest", "A"),
        ("A dense forest or a river", None),
        ("A", "A"),
        ("I see a field.", None),
        ("D", None),
        ("", None),
    ],
)
def test_choices(said, chosen):
    for answer in "ABC":
        assert score(choice(answer), said) == float(answer == chosen)


def test_other_answers():
    there = EarthSample("o", "r", "Is there a bridge?", "no", "yes-no", "existence")
    assert [score(there, said) for said in ("No.", "no, yes", "Yes, no", "Nothing", "")] == [1, 1, 0, 0, 0]
    count = EarthSample("o", "r", "How many?", "1200", "number", "counting")
    assert [score(count, said) for said in ("1200", "1,200 ships", "about 1200.0", "12", "many")] == [1, 1, 1, 0, 0]
    below = EarthSample("o", "r", "How high?", "-3.5", "number", "height")
    assert score(below, "It is -3.50 m") == 1 and score(below, "3.5") == 0
    words = EarthSample("o", "r", "Where to?", "Along the river.", "open", "route", level="reasoning")
    assert score(words, "along the river") == 1 and score(words, "the river") == 0
    judge = lambda question, answer, said: 0.25 * (question == "Where to?") * (answer == "Along the river.")  # noqa: E731
    assert score(words, "east", judge) == 0.25 and same_words("", "a", "A") == 1
    with pytest.raises(ValueError, match="judge must answer 0 to 1; it answered 2"):
        score(words, "east", lambda *_: 2)


def test_settings_tasks_and_levels():
    samples = [
        EarthSample("o1", "r1", "q1", "yes", "yes-no", "existence"),
        EarthSample("o2", "r2", "q2", "no", "yes-no", "existence"),
        EarthSample("o3", "r3", "q3", "4", "number", "counting"),
        choice(level="reasoning"),
    ]
    asked = []

    def model(pictures, question):
        asked.append((tuple(pictures), question))
        return {1: "yes", 2: "B 4"}[len(pictures)] if len(pictures) == 2 or pictures[0][0] == "o" else "4"

    optical, radar, fused = earth_scores(samples, model)
    assert [found.setting for found in (optical, radar, fused)] == list(SETTINGS)
    assert asked[0] == (("o1",), "q1") and asked[4][0] == ("r1",) and asked[8][0] == ("o1", "r1")
    assert asked[11][1] == "What is shown?\nA. A dense forest\nB. A river\nC. Urban area"
    assert optical.tasks == {"existence": (0.5, 2), "counting": (0.0, 1), "scene": (0.0, 1)}
    assert optical.accuracy == 0.25 and optical.task_mean == pytest.approx(1 / 6)
    assert radar.tasks["counting"] == (1.0, 1) and radar.accuracy == 0.25
    assert fused.levels == {"perception": (pytest.approx(1 / 3), 3), "reasoning": (0.0, 1)}
    alone = earth_scores(samples, model, settings=["radar"])
    assert alone == [radar]


def test_pictures_that_are_missing_are_told_before_any_question():
    half = EarthSample("o", None, "q", "yes", "yes-no", "existence")
    assert half.pictures("optical") == ["o"]
    asked = []
    with pytest.raises(ValueError, match="setting 'radar' needs a picture by radar"):
        earth_scores([half], lambda *given: asked.append(given))
    assert not asked
    with pytest.raises(ValueError, match="setting must be one of optical, radar, fused; it was 'both'"):
        half.pictures("both")
    for samples, settings in (([], SETTINGS), ([half], [])):
        with pytest.raises(ValueError, match="must not be empty"):
            earth_scores(samples, lambda *_: "", settings=settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(answer_type="letter"), "answer_type must be one of choice, yes-no, number, open; it was 'letter'"),
        (dict(answer="maybe"), "answer must be yes or no; it was 'maybe'"),
        (dict(answer="many", answer_type="number"), "answer must be a number"),
        (dict(answer=" ", answer_type="open"), "answer must be not empty"),
        (dict(answer_type="choice", answer="A"), "a choice needs them"),
        (dict(options=("x",)), "options are for choices"),
        (dict(answer_type="choice", answer="C", options=("x", "y")), r"answer must be one of \['A', 'B'\]"),
        (dict(task=""), "task must have a name"),
    ],
)
def test_samples_that_are_none(given, message):
    plain = dict(optical="o", radar="r", question="q", answer="yes", answer_type="yes-no", task="t")
    with pytest.raises(ValueError, match=message):
        EarthSample(**plain | given)


def test_files(tmp_path):
    path = tmp_path / "bench.jsonl"
    first = dict(
        optical="a/o.png", radar="r.tif", question="Wo ist der Fluß?", answer="A", answer_type="choice", task="scene"
    )
    second = dict(optical="o.png", radar=None, question="q", answer="2", answer_type="number", task="counting")
    lines = [first | {"options": ["x", "y"], "level": "reasoning"}, second]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    one, two = read_samples(path)
    assert one.optical == tmp_path / "a" / "o.png" and one.options == ("x", "y") and one.level == "reasoning"
    assert one.question == "Wo ist der Fluß?" and two.radar is None and two.options == ()
    for wrong, message in (
        ("{", "line 3: "),
        ("[1]", "line 3: it must be an object"),
        (json.dumps({"optical": "o"}), "line 3: 'radar' is missing"),
        (json.dumps(second | {"answer": "few"}), "line 3: answer must be a number"),
        (json.dumps(second | {"sensor": "x"}), "line 3: .*sensor"),
    ):
        path.write_text(json.dumps(second) + "\n\n" + wrong, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_samples(path)
