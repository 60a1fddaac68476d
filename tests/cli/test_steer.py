"""The command: answers side by side, an evaluation, and errors that say what to do."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from glocal.bench.scenes import KINDS, scenes
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


def test_without_any_argument_the_shipped_model_answers_about_a_scene(tmp_path):
    """Clear scenes, on which it is right: what is there it sees, and what is not it does not."""
    for seed in range(4):
        (scene,) = scenes(1, seed, held_out=True)
        there = sorted(scene.kinds())[0]
        absent = next(kind for kind in KINDS if kind not in scene.kinds())
        for kind, word in ((there, "yes"), (absent, "no")):
            options = ("--seed", seed, "--noise", 0, "--opacity", 1, "--picture", tmp_path / "seen.png")
            result = call(*options, "--ask", f"Is there a {kind[0]} {kind[1]}?")
            assert result.exit_code == 0, result.output
            answer = next(line for line in result.stdout.splitlines() if "answer" in line)
            assert answer.replace("│", " ").split()[:2] == ["answer", word]


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
