"""S049: the survey's places are of systems that the catalogue has, on axes that there are."""

import pytest

from glocal import papers
from glocal.papers import human_attention


def test_places_are_of_the_catalogue_and_on_the_axes():
    for key, place in human_attention.SYSTEMS.items():
        assert papers.get(key).key == key
        assert place.models is None or place.models in human_attention.MODELS
        assert place.field is None or place.field in human_attention.FIELDS
        assert place.mode is None or place.mode in human_attention.MODES
        assert place.models or (place.field and place.mode)


def test_every_model_of_human_attention_that_says_so_is_placed():
    """Records of the human domain whose summary says that they predict where or what people look at."""
    told = {
        paper.key
        for paper in papers.all()
        if paper.domain == "human" and paper.summary.startswith("Predicts") and "model" in paper.kinds
    }
    assert told == set(human_attention.find(models="saliency prediction")) | {"oat"}


def test_searching():
    assert human_attention.find(models="scanpath prediction") == ("oat",)
    assert human_attention.find(field="language modelling", mode="data selection") == ()
    with pytest.raises(ValueError, match=r"mode must be one of input prior, .* it was 'osmosis'"):
        human_attention.find(mode="osmosis")
