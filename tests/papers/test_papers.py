"""The catalogue: complete, consistent, findable, and checked while it is read."""

import ast
import doctest
import importlib
import importlib.util
import json.decoder
import pathlib
import re
import sys

import pytest

from glocal import papers
from glocal.inspect import layers, uses

ROOT = pathlib.Path(__file__).resolve().parents[2]
SYSTEMS = ROOT.parent / "shared" / "systems"  # the specifications, where the checkout has them beside it

GOOD = """
[[paper]]
number = 7
key = "seven"
title = "Seven"
arxiv = "2209.15001"
kinds = ["layer", "model"]
domain = "vision"
summary = "Attends to seven keys, whatever the query is."
objects = ["json.decoder.JSONDecoder"]
deviations = "Eight keys."
proof = "tests/papers/test_papers.py"
"""
REQUIRED = ["number", "key", "title", "kinds", "domain", "summary", "objects", "deviations"]
EIGHT = GOOD.replace("number = 7", "number = 8").replace('"seven"', '"eight"')


def resolve(name: str) -> object:
    """The object of a dotted name: the longest prefix that can be imported, then its attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        try:
            found: object = importlib.import_module(prefix)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{prefix}.".startswith(f"{error.name}."):
                raise  # the module is there, but something that it needs is not
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise ImportError(f"no prefix of {name!r} can be imported")


# The data.


def test_numbers_run_from_1_to_119() -> None:
    assert [paper.number for paper in papers.all()] == list(range(1, 120))


def test_keys_are_unique_and_plain() -> None:
    keys = [paper.key for paper in papers.all()]
    assert len(set(keys)) == 119
    assert [key for key in keys if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key)] == []


def test_titles_and_arxiv_identifiers_are_unique() -> None:
    assert len({paper.title for paper in papers.all()}) == 119
    known = [paper.arxiv for paper in papers.all() if paper.arxiv is not None]
    assert len(set(known)) == len(known)


def test_kinds_and_domains_are_from_the_lists() -> None:
    for paper in papers.all():
        assert paper.kinds and set(paper.kinds) <= set(papers.KINDS), paper
        assert len(set(paper.kinds)) == len(paper.kinds), paper
        assert paper.domain in papers.DOMAINS, paper
    assert {kind for paper in papers.all() for kind in paper.kinds} == set(papers.KINDS)
    assert {paper.domain for paper in papers.all()} == set(papers.DOMAINS)


def test_summaries_are_one_sentence() -> None:
    for paper in papers.all():
        summary = paper.summary
        assert 40 <= len(summary) <= 240, paper.code
        assert summary[0].isupper() and summary.endswith(".") and summary == summary.strip(), paper.code
        assert re.search(r"[.!?]\s|[\n:;]", summary) is None, paper.code
    assert len({paper.summary for paper in papers.all()}) == 119


def test_records_agree_with_the_index_of_the_specifications() -> None:
    index = SYSTEMS / "README.md"
    if not index.is_file():
        pytest.skip("this checkout has no specifications beside it to compare with")
    row = re.compile(r"^\| S(\d{3}) \| (\S+) \| .*? \| \S+\.md \| (.*) \|$", re.MULTILINE)
    rows = row.findall(index.read_text("utf-8"))
    expected = [(int(number), key, tuple(kinds.split(" | "))) for number, key, kinds in rows]
    assert [(paper.number, paper.key, paper.kinds) for paper in papers.all()] == expected


def test_titles_agree_with_the_sections_of_the_specifications() -> None:
    if not SYSTEMS.is_dir():
        pytest.skip("this checkout has no specifications beside it to compare with")
    text = "\n".join(path.read_text("utf-8") for path in sorted(SYSTEMS.glob("*.md")))
    sections = re.findall(r"^## S(\d{3}) (\S+) — .*\n- paper: (.*?); upstream", text, re.MULTILINE)
    expected = {(int(number), key): title for number, key, title in sections}
    assert len(expected) == 119
    for paper in papers.all():  # a section may name a later title in brackets after the first
        title = expected[paper.number, paper.key]
        assert title == paper.title or title.startswith(f"{paper.title} ("), paper


# What the data points at.


def test_resolve_finds_modules_and_attributes_and_nothing_else() -> None:
    assert resolve("json.decoder") is json.decoder
    assert resolve("json.decoder.JSONDecoder.decode") is json.decoder.JSONDecoder.decode
    with pytest.raises(AttributeError, match="JSONDecodr"):
        resolve("json.decoder.JSONDecodr")
    with pytest.raises(ImportError, match=r"no_such_package\.thing"):
        resolve("no_such_package.thing")


def test_resolve_shows_a_failing_import(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        resolve("needs_more.thing")


def test_objects_resolve() -> None:
    broken = {}
    for paper in papers.all():
        for name in paper.objects:
            try:
                resolve(name)
            except (ImportError, AttributeError) as error:
                broken[paper.code, name] = error
    assert broken == {}


def test_proofs_are_files_of_the_repository() -> None:
    wrong = []
    for paper in papers.all():
        if paper.proof is not None:
            path = (ROOT / paper.proof).resolve()
            if not path.is_file() or not path.is_relative_to(ROOT):
                wrong.append((paper.code, paper.proof))
    assert wrong == []


def test_objects_and_proofs_come_together() -> None:
    assert [paper.code for paper in papers.all() if bool(paper.objects) != (paper.proof is not None)] == []


# Getting and finding.


@pytest.mark.parametrize("name", ["S064", "s064", "s64", "S64", "64", "064", 64, "dina", "DiNA", " dina "])
def test_get_accepts_every_form_of_a_name(name: str | int) -> None:
    assert papers.get(name).number == 64


def test_get_returns_each_paper_by_code_number_and_key() -> None:
    for paper in papers.all():
        assert papers.get(paper.code) is papers.get(paper.number) is papers.get(paper.key) is paper


def test_get_suggests_near_keys() -> None:
    with pytest.raises(ValueError, match=r"name='fastvit' is no paper; did you mean .*'favit'"):
        papers.get("fastvit")


@pytest.mark.parametrize("name", ["S000", "S120", 0, -1, 120, "", "sixty-four papers", "s"])
def test_get_explains_names_when_none_is_near(name: str | int) -> None:
    with pytest.raises(ValueError, match=r"name=.* is no paper; give a code from 'S001' to 'S119'"):
        papers.get(name)


def test_code_and_url() -> None:
    paper, other = papers.parse(GOOD + EIGHT.replace("arxiv", "#"))
    assert (paper.code, paper.url) == ("S007", "https://arxiv.org/abs/2209.15001")
    assert (other.code, other.url) == ("S008", None)


def test_papers_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        papers.get(1).key = "other"  # type: ignore[misc]


def test_find_without_conditions_is_all() -> None:
    assert papers.find() == papers.find("  ") == papers.all()


def test_find_looks_for_every_word_in_any_case() -> None:
    assert [paper.key for paper in papers.find("SPHERE panoramas")] == ["egformer"]  # summary
    assert [paper.key for paper in papers.find("panoramas sphere")] == ["egformer"]
    assert papers.find("sphere hyperspectral") == ()
    assert [paper.key for paper in papers.find("s064")] == ["dina"]  # code
    assert [paper.key for paper in papers.find("red-circle")] == ["red-circle"]  # key
    assert "dina" in [paper.key for paper in papers.find("dilated neighborhood transformer")]  # title


def test_find_looks_into_objects_and_filters_by_done(monkeypatch: pytest.MonkeyPatch) -> None:
    neither = EIGHT.replace('["json.decoder.JSONDecoder"]', "[]").replace("proof", "#")
    no_proof = GOOD.replace("number = 7", "number = 9").replace('"seven"', '"nine"').replace("proof", "#")
    catalogue = papers.parse(GOOD + neither + no_proof)
    monkeypatch.setattr(papers, "all", lambda: catalogue)
    assert [paper.key for paper in papers.find("jsondecoder")] == ["seven", "nine"]
    assert [paper.key for paper in papers.find(done=True)] == ["seven"]
    assert [paper.key for paper in papers.find(done=False)] == ["eight", "nine"]


def test_find_filters_by_kind_and_domain() -> None:
    surveys = papers.find(kind="survey")
    assert {"multilingual-survey", "attention-taxonomy", "human-attention-survey", "head-taxonomy"} == {
        paper.key for paper in surveys
    }
    assert [paper.key for paper in papers.find(kind="survey", domain="human")] == ["human-attention-survey"]
    by_domain = [paper for domain in papers.DOMAINS for paper in papers.find(domain=domain)]
    assert sorted(paper.number for paper in by_domain) == list(range(1, 120))


def test_find_refuses_unknown_kinds_and_domains() -> None:
    with pytest.raises(ValueError, match=r"kind 'layers' is unknown; it is one of operator, .*, survey"):
        papers.find(kind="layers")
    with pytest.raises(ValueError, match=r"domain 'Vision' is unknown; it is one of language, .*, general"):
        papers.find(domain="Vision")


# Reading.


def test_parse_reads_every_field() -> None:
    (paper,) = papers.parse(GOOD)
    assert paper == papers.Paper(
        number=7,
        key="seven",
        title="Seven",
        arxiv="2209.15001",
        kinds=("layer", "model"),
        domain="vision",
        summary="Attends to seven keys, whatever the query is.",
        objects=("json.decoder.JSONDecoder",),
        deviations="Eight keys.",
        proof="tests/papers/test_papers.py",
    )
    assert paper.done


def test_parse_of_nothing_is_nothing() -> None:
    assert papers.parse("") == ()


@pytest.mark.parametrize("field", ["arxiv", "proof"])
def test_optional_fields_may_be_left_out(field: str) -> None:
    (paper,) = papers.parse(re.sub(rf"^{field} = .*$", "", GOOD, flags=re.MULTILINE))
    assert getattr(paper, field) is None


@pytest.mark.parametrize("field", REQUIRED)
def test_required_fields_are_missed(field: str) -> None:
    text = re.sub(rf"^{field} = .*$", "", GOOD, flags=re.MULTILINE)
    with pytest.raises(ValueError, match=rf"record 1 \(key .*\): field '{field}' is missing"):
        papers.parse(text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("proof =", "prof =", "field 'prof' is unknown; did you mean 'proof'?"),
        ("proof =", "zzz =", "field 'zzz' is unknown"),
        ("number = 7", 'number = "7"', "field 'number' is '7'; it must be of type int"),
        ("number = 7", "number = true", "field 'number' is True; it must be of type int"),
        ("number = 7", "number = 0", "field 'number' is empty or zero"),
        ('title = "Seven"', "title = 7", "field 'title' is 7; it must be of type str"),
        ('title = "Seven"', 'title = ""', "field 'title' is empty or zero"),
        ('["layer", "model"]', '"layer"', "field 'kinds' is 'layer'; it must be of type list"),
        ('["layer", "model"]', "[]", "field 'kinds' is empty or zero"),
        ('["layer", "model"]', '["layer", 3]', "field 'kinds' is ['layer', 3]; it must hold names"),
        ('["layer", "model"]', '["layr"]', "field 'kinds' 'layr' is unknown; it is one of operator, "),
        ('domain = "vision"', 'domain = "sight"', "field 'domain' 'sight' is unknown; it is one of language"),
        ('["json.decoder.JSONDecoder"]', '[""]', "field 'objects' is ['']; it must hold names only"),
        ('arxiv = "2209.15001"', 'arxiv = "2209.15001v2"', "field 'arxiv' is '2209.15001v2'; write it as"),
        ('proof = "tests/papers/test_papers.py"', 'proof = ""', "field 'proof' is empty or zero"),
    ],
)
def test_wrong_fields_are_named(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ValueError, match=re.escape(f"record 1 (key 'seven'): {message}")):
        papers.parse(GOOD.replace(old, new))


def test_the_second_record_is_named_by_its_own_key() -> None:
    with pytest.raises(ValueError, match=r"record 2 \(key 'eight'\): field 'sumary' is .* mean 'summary'"):
        papers.parse(GOOD + EIGHT.replace("summary", "sumary"))


def test_numbers_and_keys_may_not_repeat() -> None:
    with pytest.raises(ValueError, match=r"record 2 .*: field 'number' repeats 7, taken by 'seven'"):
        papers.parse(GOOD + EIGHT.replace("number = 8", "number = 7"))
    with pytest.raises(ValueError, match=r"record 2 .*: field 'key' repeats the key of number 7"):
        papers.parse(GOOD + EIGHT.replace('"eight"', '"seven"'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[paper]]\nnumber = ", "the catalogue is not valid TOML: "),
        ('[[papers]]\nkey = "x"', "the catalogue has a field 'papers' beside its [[paper]] records"),
        ('[paper]\nkey = "x"', "the catalogue's 'paper' is no list of records"),
        ("paper = [1, 2]", "the catalogue's 'paper' is no list of records"),
    ],
)
def test_files_of_another_form_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        papers.parse(text)


# The module.


def test_import_reads_no_file_and_the_file_is_read_once() -> None:
    spec = importlib.util.spec_from_file_location("fresh_papers", papers.__file__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    sys.modules["fresh_papers"] = fresh  # dataclasses look their module up
    try:
        spec.loader.exec_module(fresh)
    finally:
        del sys.modules["fresh_papers"]
    assert fresh.all.cache_info().currsize == 0
    assert papers.all() is papers.all()


def test_only_the_standard_library_is_imported() -> None:
    assert papers.__file__ is not None
    imported = set()
    for node in ast.walk(ast.parse(pathlib.Path(papers.__file__).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." if node.level else str(node.module).split(".")[0])
    assert imported and imported <= set(sys.stdlib_module_names)


def test_every_public_object_has_an_example_that_holds() -> None:
    finder = doctest.DocTestFinder(exclude_empty=False)
    examples = {test.name.removeprefix("glocal.papers."): len(test.examples) for test in finder.find(papers)}
    for name in ["Paper", "Paper.code", "Paper.url", "Paper.done", "all", "find", "get", "parse"]:
        assert examples[name] > 0, name
    assert doctest.testmod(papers).failed == 0


@pytest.mark.parametrize("paper", [paper for paper in papers.all() if layers(paper.objects)], ids=lambda p: p.code)
def test_uses_are_what_trying_finds(paper: papers.Paper) -> None:
    found = {use for layer in layers(paper.objects) for use in uses(layer)}
    assert set(paper.uses) == found
