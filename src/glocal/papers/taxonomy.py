"""The attention mechanisms of the catalogue on the axes of a survey: what they relate, where they look, how they score.

Chaudhari et al., 2021, arXiv 1904.02874. Every record whose kinds name an operator or a layer has a place on each axis;
several values may hold on one: window attention over one sequence is self attention and local.

>>> from glocal.papers import taxonomy
>>> taxonomy.find(positions="local", sequences="distinctive")
('largegt', 'latent-monotonic', 'luong', 'marginal-attention', 'fit')
>>> taxonomy.classify("luong").score
('dot', 'general', 'concat', 'location')
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from importlib import resources
from typing import Any

from glocal import papers

__all__ = ["AXES", "Taxonomy", "classify", "coverage", "describe", "find"]

AXES: dict[str, dict[str, str]] = {
    "sequences": {
        "distinctive": "queries and keys are of two sequences",
        "co": "two sequences attend to each other",
        "self": "queries and keys are of one sequence",
    },
    "levels": {
        "single": "tokens of one kind",
        "multi": "tokens, and what stands for several of them, as blocks, windows or scales",
    },
    "positions": {
        "soft_global": "weights over all positions",
        "hard": "positions that are chosen from the data, the others are left out",
        "local": "weights over positions near one that is given or predicted",
    },
    "representations": {
        "single": "one set of weights",
        "multi_representational": "several representations with weights of their own, as heads",
        "multi_dimensional": "a weight for each feature",
    },
    "score": {
        "similarity": "cos(q, k)",
        "dot": "k q",
        "scaled_dot": "k q / sqrt(D)",
        "general": "k W q",
        "biased_general": "k (W q + b)",
        "activated_general": "f(k W q + b)",
        "kernel": "f(q) f(k)",
        "concat": "w f(W [q; k] + b)",
        "additive": "w f(W1 q + W2 k + b)",
        "deep": "additive, with more than one layer",
        "location": "f(W q), a number a position",
        "feature": "w f(W1 f1(k) + W2 f2(k) + b)",
        "none": "no pair of positions is scored",
    },
    "distribution": {
        "softmax": "positive weights that sum to one",
        "sparsemax": "weights that sum to one, some of them 0: the nearest distribution to the scores",
        "entmax": "between the two",
        "sigmoid": "each weight by itself",
        "hard_sample": "one position at random",
        "none": "weights are not normalised",
        "other": "another normalisation, as by the plain sum of scores",
    },
    "architecture": {
        "encoder_decoder": "a decoder looks at an encoder",
        "transformer": "layers of attention and feed-forward",
        "memory_network": "queries read a memory",
        "graph_attention": "nodes look at their neighbours",
        "other": "another, as a convolutional network",
    },
    "domain": {
        name: name
        for name in ("text", "image", "audio", "multimodal", "graph", "recommender", "any")  # video counts as image
    },
}
"""The axes, their values and what they mean."""


@dataclasses.dataclass(frozen=True)
class Taxonomy:
    """Where a mechanism stands: one or more values of each of `AXES`."""

    sequences: tuple[str, ...]
    levels: tuple[str, ...]
    positions: tuple[str, ...]
    representations: tuple[str, ...]
    score: tuple[str, ...]
    distribution: tuple[str, ...]
    architecture: tuple[str, ...]
    domain: tuple[str, ...]


def classify(name: str | int) -> Taxonomy:
    """Where the mechanism of a paper stands, by any name that `papers.get` takes.

    Raises:
        ValueError: no such paper, or one that brings no mechanism of its own.

    >>> classify("S109").positions
    ('local',)
    """
    paper = papers.get(name)
    if paper.key not in _records():
        kinds = ", ".join(paper.kinds)
        raise ValueError(f"{paper.code} {paper.key} brings no attention mechanism; its kinds are {kinds}")
    return _records()[paper.key]


def find(**values: str) -> tuple[str, ...]:
    """Keys of the papers whose mechanism has all the values, in order of number.

    Raises:
        ValueError: an axis or a value that there is none of.

    >>> find(architecture="graph_attention", domain="graph")
    ('largegt',)
    """
    for axis, value in values.items():
        if axis not in AXES:
            raise ValueError(f"axis {axis!r} is unknown; it is one of {', '.join(AXES)}")
        if value not in AXES[axis]:
            raise ValueError(f"{axis} {value!r} is unknown; it is one of {', '.join(AXES[axis])}")
    return tuple(
        paper.key
        for paper in papers.all()
        if paper.key in _records()
        and all(value in getattr(_records()[paper.key], axis) for axis, value in values.items())
    )


def describe(name: str | int) -> str:
    """A mechanism's place, a line an axis, with what its values mean.

    Raises:
        ValueError: as in `classify`.

    >>> print(describe("attention-sdm").splitlines()[1])
    levels           single (tokens of one kind)
    """
    place = classify(name)
    lines = []
    for axis, meanings in AXES.items():
        said = [v if meanings[v] == v else f"{v} ({meanings[v]})" for v in getattr(place, axis)]
        lines.append(f"{axis:<17}{', '.join(said)}")
    return "\n".join(lines)


def coverage() -> dict[str, dict[str, int]]:
    """How many mechanisms have each value of each axis; what nothing here has is 0.

    >>> coverage()["architecture"]["memory_network"]
    1
    """
    return {axis: {value: len(find(**{axis: value})) for value in values} for axis, values in AXES.items()}


@functools.cache
def _records() -> dict[str, Taxonomy]:
    return parse(resources.files("glocal.papers").joinpath("taxonomy.toml").read_text(encoding="utf-8"))


def parse(text: str) -> dict[str, Taxonomy]:
    """Records from TOML text, checked against `AXES`.

    Raises:
        ValueError: naming the record, an axis that is missing or unknown, or a value that the axis does not have.
    """
    found: dict[str, Taxonomy] = {}
    for key, record in tomllib.loads(text).items():
        places: dict[str, Any] = {}
        for axis, given in record.items():
            if axis not in AXES:
                raise ValueError(f"{key}: axis {axis!r} is unknown; it is one of {', '.join(AXES)}")
            places[axis] = tuple([given] if isinstance(given, str) else given)
            for value in places[axis]:
                if value not in AXES[axis]:
                    raise ValueError(f"{key}: {axis} {value!r} is unknown; it is one of {', '.join(AXES[axis])}")
        if missing := [axis for axis in AXES if not places.get(axis)]:
            raise ValueError(f"{key}: no value for {', '.join(missing)}")
        found[key] = Taxonomy(**places)
    return found
