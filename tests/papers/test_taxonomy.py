"""S041: every mechanism has its place on every axis, known ones where one puts them by hand."""

import pytest

from glocal import papers
from glocal.nn.score_functions import SCORE_FUNCTIONS
from glocal.papers import taxonomy


def test_every_mechanism_has_a_complete_record_and_nothing_else_has():
    keys = {paper.key for paper in papers.all()}
    for paper in papers.all():
        if {"operator", "layer"} & set(paper.kinds):
            place = taxonomy.classify(paper.number)
            assert all(getattr(place, axis) for axis in taxonomy.AXES)
    assert set(taxonomy._records()) <= keys and "gen-understand" not in taxonomy._records()


@pytest.mark.parametrize(
    "key,wanted",
    [
        ("luong", dict(sequences="distinctive", levels="single", positions="local", representations="single")),
        (
            "mhe",
            dict(sequences="self", levels="single", positions="soft_global", representations="multi_representational"),
        ),
        ("latent-monotonic", dict(sequences="distinctive", positions="hard")),
        ("fna", dict(sequences="self", positions="local", score="scaled_dot", distribution="softmax")),
        ("ela", dict(sequences="self", representations="multi_dimensional", score="none", distribution="sigmoid")),
        ("fast", dict(score="kernel")),
        ("gat-hallucination", dict(architecture="graph_attention", score="concat")),
    ],
)
def test_places_known_by_hand(key, wanted):
    place = taxonomy.classify(key)
    assert all(value in getattr(place, axis) for axis, value in wanted.items())
    assert key in taxonomy.find(**wanted)


def test_the_places_agree_with_what_the_layers_refuse():
    """A mechanism that is for one sequence only has no cross form in the library, and the other way round."""
    for paper in papers.all():
        if not paper.uses or paper.key not in taxonomy._records() or "operator" in paper.kinds:
            continue  # an operator's function may have what its layer has not
        crosses = any("cross" in use for use in paper.uses)
        if "distinctive" in taxonomy.classify(paper.key).sequences:
            assert crosses, paper.key


def test_counts_are_of_all_records():
    counts = taxonomy.coverage()
    assert sum(counts["architecture"].values()) == len(taxonomy._records()) == sum(counts["domain"].values())
    assert counts["positions"]["local"] == len(taxonomy.find(positions="local"))
    assert counts["domain"]["recommender"] == 0


def test_score_functions_have_the_taxonomy_s_names():
    assert set(SCORE_FUNCTIONS) == set(taxonomy.AXES["score"]) - {"none"}


def test_what_is_unknown():
    with pytest.raises(ValueError, match="axis 'place' is unknown; it is one of sequences"):
        taxonomy.find(place="local")
    with pytest.raises(ValueError, match="positions 'near' is unknown; it is one of soft_global, hard, local"):
        taxonomy.find(positions="near")
    with pytest.raises(ValueError, match="S013 gen-understand brings no attention mechanism; its kinds are benchmark"):
        taxonomy.classify("gen-understand")
    with pytest.raises(ValueError, match="a: no value for levels, positions"):
        taxonomy.parse('[a]\nsequences = ["self"]')
    with pytest.raises(ValueError, match="a: axis 'level' is unknown"):
        taxonomy.parse('[a]\nlevel = "single"')
    with pytest.raises(ValueError, match="a: levels 'two' is unknown"):
        taxonomy.parse('[a]\nlevels = ["two"]')
