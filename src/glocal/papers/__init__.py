"""The catalogue: one record for each paper whose attention system this library carries.

A record says what the mechanism does in one sentence, which objects implement it here, where they differ
from the paper, and which file shows that they work. The records stand in ``papers.toml`` beside this file;
nothing is read before the first call.

>>> from glocal import papers
>>> papers.get("dina").title
'Dilated Neighborhood Attention Transformer'
>>> [paper.code for paper in papers.find("window carrier")]
['S044']
>>> "operator" in papers.KINDS and "vision" in papers.DOMAINS
True
"""

import dataclasses
import difflib
import functools
import re
import tomllib
from importlib import resources
from typing import Any

__all__ = ["DOMAINS", "KINDS", "USES", "Paper", "all", "find", "get", "parse"]

KINDS: tuple[str, ...] = (
    "operator",
    "layer",
    "model",
    "training-method",
    "inference-method",
    "analysis",
    "benchmark",
    "survey",
)
"""What a paper can offer; a record names one or more of these."""

DOMAINS: tuple[str, ...] = (
    "language",
    "vision",
    "vision-language",
    "imaging",
    "audio",
    "video",
    "human",
    "graph",
    "general",
)
"""What a paper is tried on; a record names exactly one of these."""

USES: tuple[str, ...] = ("noncausal-self", "causal-self", "noncausal-cross", "causal-cross")
"""How an attention layer can be used; a record names those that were verified by `glocal.inspect.verify`."""

# The data file's fields and their types.
_REQUIRED: dict[str, type] = {
    "number": int,
    "key": str,
    "title": str,
    "kinds": list,
    "domain": str,
    "summary": str,
    "objects": list,
    "deviations": str,
}
_OPTIONAL: dict[str, type] = {"arxiv": str, "uses": list, "proof": str}


@dataclasses.dataclass(frozen=True)
class Paper:
    """One paper and the state of its implementation here.

    ``number`` (from 1) and ``key`` both name it; ``arxiv`` is its arXiv identifier without version, or None
    where none was verified; ``kinds`` and ``domain`` come from `KINDS` and `DOMAINS`; ``objects`` are the
    dotted names of what implements it, ``deviations`` tells where they differ from the paper, and ``proof``
    is the file, relative to the root of the repository, that shows them working, or None. ``uses`` are those of
    `USES` that its layers have, each of them verified by trying (`glocal.inspect.verify`).

    >>> get(64)  # doctest: +ELLIPSIS
    Paper(number=64, key='dina', title='Dilated Neighborhood Attention Transformer', arxiv='2209.15001', ...)
    """

    number: int
    key: str
    title: str
    arxiv: str | None
    kinds: tuple[str, ...]
    domain: str
    summary: str
    objects: tuple[str, ...]
    deviations: str
    proof: str | None
    uses: tuple[str, ...] = ()

    @property
    def code(self) -> str:
        """The number as documents write it.

        >>> get("agla").code
        'S001'
        """
        return f"S{self.number:03d}"

    @property
    def url(self) -> str | None:
        """The paper's page on arXiv, or None where no identifier was verified.

        >>> get("dina").url
        'https://arxiv.org/abs/2209.15001'
        """
        return None if self.arxiv is None else f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def done(self) -> bool:
        """Whether objects implement it and a file proves them.

        >>> paper = get("dina")
        >>> dataclasses.replace(paper, objects=("glocal.Window",), proof="benchmarks/dina.py").done
        True
        >>> dataclasses.replace(paper, proof=None).done
        False
        """
        return bool(self.objects) and self.proof is not None


@functools.cache
def all() -> tuple[Paper, ...]:  # the name reads as papers.all() outside; this file never needs the builtin
    """Every paper, in order of number; read from the data file once.

    >>> len(all()), all()[63].key
    (119, 'dina')
    """
    return parse(resources.files(__name__).joinpath("papers.toml").read_text(encoding="utf-8"))


def get(name: str | int) -> Paper:
    """The paper of this code (``"S064"``, ``"s64"``), number (``64``) or key (``"dina"``).

    Raises ValueError, with the nearest names, if there is none.

    >>> get("S064") is get("s64") is get(64) is get("dina")
    True
    >>> get("dinat")
    Traceback (most recent call last):
    ValueError: name='dinat' is no paper; did you mean 'dina'?
    """
    wanted = str(name).strip().lower()
    as_number = re.fullmatch(r"s?0*([0-9]+)", wanted)
    for paper in all():
        if paper.key == wanted or (as_number and str(paper.number) == as_number[1]):
            return paper

    keys = [paper.key for paper in all()]
    near = difflib.get_close_matches(wanted, keys, n=3, cutoff=0.7)
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    else:
        codes = f"from {all()[0].code!r} to {all()[-1].code!r}"
        hint = f"give a code {codes}, a number, or a key such as {keys[0]!r}; find() searches"
    raise ValueError(f"name={name!r} is no paper; {hint}")


def find(
    text: str = "", *, kind: str | None = None, domain: str | None = None, done: bool | None = None
) -> tuple[Paper, ...]:
    """The papers that meet every condition given, in order of number.

    ``text`` is split into words; each must occur, in any case, somewhere in the key, title, summary, code or
    objects. ``kind`` and ``domain`` are one of `KINDS` and `DOMAINS` (ValueError otherwise). ``done=True``
    keeps papers with objects and a proof, ``done=False`` the others.

    >>> [paper.key for paper in find("neighborhood strides")]
    ['gna']
    >>> [paper.key for paper in find(domain="graph", kind="layer")]
    ['largegt']
    >>> find(domain="sound")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: domain 'sound' is unknown; it is one of language, vision, ..., general
    """
    if kind is not None:
        _check_choice("kind", kind, KINDS)
    if domain is not None:
        _check_choice("domain", domain, DOMAINS)
    words = text.lower().split()
    return tuple(
        paper
        for paper in all()
        if (kind is None or kind in paper.kinds)
        and (domain is None or domain == paper.domain)
        and (done is None or done == paper.done)
        and not _missing(words, paper)
    )


def parse(text: str) -> tuple[Paper, ...]:
    """Papers from TOML text, in its order: the form of the data file, checked.

    Raises ValueError, naming record and field, for unknown, missing or empty fields, values of another type,
    kinds, domains and arXiv identifiers that are none, and numbers and keys used twice; and for text that is
    no TOML.

    >>> parse('''
    ... [[paper]]
    ... number = 1
    ... key = "luong"
    ... title = "Effective Approaches to Attention-based Neural Machine Translation"
    ... kinds = ["layer"]
    ... domain = "language"
    ... summary = "Attends to all source states or to a window of them."
    ... objects = []
    ... deviations = ""
    ... ''')[0].code
    'S001'
    >>> parse('[[paper]]\\nnumber = 1\\nkey = "luong"')
    Traceback (most recent call last):
    ValueError: record 1 (key 'luong'): field 'title' is missing
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"the catalogue is not valid TOML: {error}") from None
    for table in content:
        if table != "paper":
            raise ValueError(f"the catalogue has a field {table!r} beside its [[paper]] records")
    records = content.get("paper", [])
    if not isinstance(records, list) or any(not isinstance(record, dict) for record in records):
        raise ValueError("the catalogue's 'paper' is no list of records; write [[paper]] in double brackets")

    papers: list[Paper] = []
    for position, record in enumerate(records, start=1):
        where = f"record {position} (key {record.get('key')!r})"
        paper = _paper(record, where)
        for earlier in papers:
            if earlier.number == paper.number:
                raise ValueError(f"{where}: field 'number' repeats {paper.number}, taken by {earlier.key!r}")
            if earlier.key == paper.key:
                raise ValueError(f"{where}: field 'key' repeats the key of number {earlier.number}")
        papers.append(paper)
    return tuple(papers)


def _paper(record: dict[str, Any], where: str) -> Paper:
    """One checked record; ``where`` names it in errors."""
    types = _REQUIRED | _OPTIONAL
    for field in record:
        if field not in types:
            near = difflib.get_close_matches(field, types, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: field {field!r} is unknown{hint}")
    for field in _REQUIRED:
        if field not in record:
            raise ValueError(f"{where}: field {field!r} is missing")
    for field, value in record.items():
        expected = types[field]
        if type(value) is not expected:  # not isinstance, for which true is a number
            raise ValueError(f"{where}: field {field!r} is {value!r}; it must be of type {expected.__name__}")
        if isinstance(value, list) and any(not isinstance(item, str) or not item for item in value):
            raise ValueError(f"{where}: field {field!r} is {value!r}; it must hold names only")
        if not value and field not in ("objects", "deviations"):
            raise ValueError(f"{where}: field {field!r} is empty or zero")
    for kind in record["kinds"]:
        _check_choice(f"{where}: field 'kinds'", kind, KINDS)
    _check_choice(f"{where}: field 'domain'", record["domain"], DOMAINS)
    for use in record.get("uses", ()):
        _check_choice(f"{where}: field 'uses'", use, USES)
    arxiv = record.get("arxiv")
    if arxiv is not None and not re.fullmatch(r"[0-9]{4}\.[0-9]{4,5}", arxiv):
        raise ValueError(f"{where}: field 'arxiv' is {arxiv!r}; write it as '2209.15001'")

    return Paper(
        number=record["number"],
        key=record["key"],
        title=record["title"],
        arxiv=arxiv,
        kinds=tuple(record["kinds"]),
        domain=record["domain"],
        summary=record["summary"],
        objects=tuple(record["objects"]),
        deviations=record["deviations"],
        proof=record.get("proof"),
        uses=tuple(record.get("uses", ())),
    )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is unknown; it is one of {', '.join(allowed)}")


def _missing(words: list[str], paper: Paper) -> bool:
    """Whether any of the lower-case words occurs nowhere in the paper's text."""
    text = " ".join((paper.key, paper.title, paper.summary, paper.code, *paper.objects)).lower()
    return any(word not in text for word in words)
