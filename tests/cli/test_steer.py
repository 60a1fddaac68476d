"""The command: answers side by side, an evaluation, and errors that say what to do."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from glocal.cli.app import app
from tests.bench.tiny_vlm import write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write(tmp_path_factory.mktemp("vlm")))


def call(*options):
    return CliRunner().invoke(app, ["steer", *map(str, options)])


def test_a_generated_scene(folder, tmp_path):
    picture = tmp_path / "seen.png"
    result = call(folder, "--seed", 3, "--picture", picture)
    assert result.exit_code == 0, result.output
    assert "Is there a" in result.output and "plain" in result.output and "agla" in result.output
    assert Image.open(picture).size[0] > 900
    again = call(folder, "--seed", 3, "--picture", picture)
    assert again.stdout == result.stdout


def test_a_picture_and_a_question(folder, tmp_path):
    photo, picture = tmp_path / "photo.png", tmp_path / "seen.png"
    Image.new("RGB", (200, 120), (10, 200, 10)).save(photo)
    result = call(
        folder, "--image", photo, "--ask", "Is there a red [bold]square?", "--method", "paint", "--picture", picture
    )
    assert result.exit_code == 0 and "Is there a red [bold]square?" in result.output and picture.exists()


def test_an_evaluation(folder, tmp_path):
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    result = call(folder, "--evaluate", "--scenes", 2, "--method", "agla", "--report", page, "--json", numbers)
    assert result.exit_code == 0, result.output
    assert "Is it there?" in result.output and "Describe the picture" in result.output
    found = json.loads(numbers.read_text())
    assert [row["name"] for row in found["rows"]] == ["plain", "agla"]
    assert "<title>glocal steer" in page.read_text()


@pytest.mark.parametrize(
    "options,word",
    [
        (("--method", "magic"), "method must be one of"),
        (("--image", "no.png", "--ask", "?"), "cannot be read as a picture"),
        (("--image", "no.png"), "--ask"),
        (("--report", "page.html"), "--evaluate"),
        (("--evaluate", "--ask", "?"), "its own questions"),
        (("--method", "agla", "--method", "paint"), "one --method"),
        (("--picture", "no/such/folder/seen.png"), "--picture"),
        (("--evaluate", "--scenes", "0"), "scenes must be at least 1"),
    ],
)
def test_errors_come_before_work(folder, options, word):
    result = call(folder, *options)
    assert result.exit_code == 2 and word in result.output


def test_a_model_that_is_none(tmp_path):
    result = call(tmp_path)
    assert result.exit_code == 2 and "config.json" in result.output
