"""How human attention is modelled and put to use: the axes of a survey, and the catalogue's systems on them.

Cartella et al., 2024, arXiv 2402.18673. How a model takes it in (`MODES`) is our reading of the systems it lists.

>>> from glocal.papers import human_attention
>>> human_attention.find(models="saliency prediction")
('msi-net', 'sum')
"""

from __future__ import annotations

from typing import NamedTuple

from glocal import papers

__all__ = ["DATASETS", "FIELDS", "MODELS", "MODES", "SYSTEMS", "Place", "find"]

MODELS = ("saliency prediction", "scanpath prediction")
"""What is predicted of people."""

FIELDS: dict[str, tuple[str, ...]] = {
    "image and video processing": (
        "visual recognition",
        "graphic design",
        "enhancement and manipulation",
        "quality assessment",
    ),
    "vision and language": ("captioning", "visual question answering"),
    "language modelling": ("machine reading comprehension", "natural language understanding"),
    "domain-specific": ("robotics", "autonomous driving", "medicine"),
}
"""Where human attention is built into other models: fields, and tasks of each."""

MODES: dict[str, str] = {
    "input prior": "people's maps are part of the input",
    "feature gating": "they weigh features",
    "attention supervision": "a loss draws the model's attention to them",
    "data selection": "they choose what is trained on",
    "evaluation": "they judge or reward the model",
}
"""How it enters."""

DATASETS = ("SALICON", "MIT1003", "OSIE", "COCO-FreeView", "COCO-Search18", "RefCOCO-Gaze")
"""Common data sets of what people look at."""


class Place(NamedTuple):
    """Where a system stands; None for what it does not do."""

    models: str | None = None
    field: str | None = None
    mode: str | None = None


SYSTEMS: dict[str, Place] = {
    "msi-net": Place(models="saliency prediction"),
    "oat": Place(models="scanpath prediction"),
    "sum": Place(models="saliency prediction"),
    "model-human-attention": Place(field="language modelling", mode="evaluation"),
}
"""The catalogue's systems that model or use human attention, by key."""


def find(*, models: str | None = None, field: str | None = None, mode: str | None = None) -> tuple[str, ...]:
    """Keys of the systems that have all the values given, in order of number.

    Raises:
        ValueError: a value that its axis does not have.

    >>> find(field="language modelling")
    ('model-human-attention',)
    """
    asked = {"models": (models, MODELS), "field": (field, FIELDS), "mode": (mode, MODES)}
    for axis, (value, allowed) in asked.items():
        if value is not None and value not in allowed:
            raise ValueError(f"{axis} must be one of {', '.join(allowed)}; it was {value!r}")
    wanted = {axis: value for axis, (value, _) in asked.items() if value is not None}
    return tuple(
        paper.key
        for paper in papers.all()
        if paper.key in SYSTEMS and all(getattr(SYSTEMS[paper.key], axis) == value for axis, value in wanted.items())
    )
