"""Scenes: the answers agree with the pixels, and what is held out is held out."""

import random
import re

import numpy as np
import pytest

from glocal.bench import scenes as module
from glocal.bench.scenes import CELL, COLOURS, SHAPES, SIDE, ask_all, caption, scenes


def test_a_seed_makes_the_same_scenes():
    one, other = scenes(5, 3), scenes(5, 3)
    assert all(np.array_equal(a.pixels, b.pixels) and a.things == b.things for a, b in zip(one, other, strict=True))
    assert not np.array_equal(scenes(1, 4)[0].pixels, one[0].pixels)
    assert not np.array_equal(scenes(1, 3, held_out=True)[0].pixels, one[0].pixels)


def covered(scene, thing):
    """Pixels of a thing's colour in its box, as the picture shows them."""
    left, top, right, bottom = thing.box
    return (scene.pixels[top:bottom, left:right] == COLOURS[thing.colour]).all(-1)


def test_things_are_where_they_are_said_to_be():
    for scene in scenes(60, 0):
        for thing in scene.things:
            seen = covered(scene, thing)
            assert 0.15 < seen.mean() < 1.01
            # It reaches all four sides of its box, or nearly: stars and hearts do not touch every one.
            rows, columns = seen.any(1), seen.any(0)
            assert rows.mean() > 0.8 and columns.mean() > 0.8


def test_shapes_differ_in_what_they_cover():
    """By the area alone, and the middle: no drawing is taken for another."""
    found = {}
    for scene in scenes(400, 1):
        for thing in scene.things:
            seen = covered(scene, thing)
            middle = len(seen) // 2
            found.setdefault(thing.shape, []).append((seen.mean(), seen[middle, middle]))
    area = {shape: np.mean([a for a, _ in values]) for shape, values in found.items()}
    assert area["square"] > 0.99 and area["circle"] == pytest.approx(np.pi / 4, abs=0.03)
    assert area["triangle"] == pytest.approx(0.5, abs=0.05) and area["diamond"] == pytest.approx(0.5, abs=0.05)
    assert not any(m for _, m in found["ring"]) and all(m for _, m in found["cross"])
    assert set(found) == set(SHAPES)


def test_things_do_not_overlap_and_are_sorted():
    for scene in scenes(60, 2):
        boxes = np.zeros((SIDE, SIDE), int)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            boxes[top:bottom, left:right] += 1
        assert boxes.max() <= 1
        assert [t.centre for t in scene.things] == sorted(t.centre for t in scene.things)


def test_what_is_black_hides_whole_things():
    for scene in scenes(60, 5, black=1.0):
        dark = (scene.pixels == 0).all(-1)
        for thing in scene.things:
            assert not dark[thing.box[1] : thing.box[3], thing.box[0] : thing.box[2]].all(-1).any()
    bright = scenes(60, 5, black=1.0)
    # No colour of a thing that is not named is left: count what is painted.
    for scene in bright:
        painted = sum(int((scene.pixels == colour).all(-1).sum()) for colour in COLOURS.values())
        named = sum(int(covered(scene, thing).sum()) for thing in scene.things)
        assert painted - named <= 40  # a photograph has some pixels of these colours too
    assert np.mean([(s.pixels == 0).all(-1).mean() for s in bright]) > 0.3 and SIDE % CELL == 0


def test_answers_by_counting():
    draw = random.Random(0)
    abouts = set()
    for scene in scenes(80, 6):
        for question in ask_all(scene, draw):
            abouts.add(question.about)
            words = re.findall(r"[a-z]+", question.text.lower())
            if question.about == "presence":
                there = any([t.colour, t.shape] == words[-2:] for t in scene.things)
                assert question.answer == ("yes" if there else "no")
            elif question.about == "shape":
                assert question.answer == ("yes" if words[-1] in [t.shape for t in scene.things] else "no")
            elif question.about == "colour":
                assert [question.answer] == [t.colour for t in scene.things if t.shape == words[-1]]
            elif question.about == "count":
                shape = next(shape for shape in SHAPES if words[2] in (shape + "s", shape + "es"))
                assert question.answer == str(sum(t.shape == shape for t in scene.things))
            elif question.about == "position":
                (thing,) = [t for t in scene.things if [t.colour, t.shape] == words[-2:]]
                rows, columns = np.nonzero(covered(scene, thing))
                y, x = thing.box[1] + rows.mean(), thing.box[0] + columns.mean()
                up, side = question.answer.split()
                assert abs(y - SIDE / 2) < 6 or (up == "top") == (y < SIDE / 2)
                assert abs(x - SIDE / 2) < 6 or (side == "left") == (x < SIDE / 2)
            else:
                assert question.answer == caption(scene)
    assert abouts == {"presence", "shape", "colour", "count", "position", "caption"}


def test_all_words_are_known():
    known = set(module.vocabulary())
    draw = random.Random(0)
    for scene in [*scenes(200, 7), *scenes(50, 7, black=1.0)]:
        for question in ask_all(scene, draw):
            assert set(re.findall(r"\w+|[^\w\s]", f"{question.text} {question.answer}".lower())) <= known


def test_cells_hold_the_things_whose_pixels_their_centres_show():
    some, found = scenes(60, 10), 0
    for scene in some:
        cells = scene.cells()
        assert cells.shape == (SIDE // CELL, SIDE // CELL) and set(np.unique(cells)) <= {-1, *range(len(scene.things))}
        for (row, column), n in np.ndenumerate(cells):
            y, x = row * CELL + CELL // 2, column * CELL + CELL // 2
            inside = [t for t in scene.things if t.box[0] <= x < t.box[2] and t.box[1] <= y < t.box[3]]
            assert inside == ([] if n == -1 else [scene.things[n]])
            found += n >= 0
        assert {n for n in range(len(scene.things))} <= set(cells.flatten().tolist())  # 16 pixels hold a centre
    assert found > 300


def test_backgrounds_are_apart():
    assert not set(module._TRAINING) & set(module._HELD_OUT)
    training, held = (module._photographs(flag) for flag in (False, True))
    assert (len(training), len(held)) == (6, 3) and all(p.shape[2] == 3 for p in (*training, *held))


def test_kinds_have_habits():
    groups = module.habits()
    assert sorted(kind for group in groups for kind in group) == sorted(module.KINDS)
    together = 0
    some = scenes(300, 8, things=(3, 3))
    for scene in some:
        homes = [next(n for n, group in enumerate(groups) if kind in group) for kind in scene.kinds()]
        together += len(set(homes)) < len(homes)
    assert together / len(some) > 0.7  # three at random would share a group in 44 % of the scenes


def test_noise_and_opacity():
    clean, noisy = scenes(20, 9)[0], scenes(20, 9, noise=30.0)[0]
    assert 10 < np.abs(clean.pixels.astype(int) - noisy.pixels).mean() < 40
    faded = scenes(20, 9, opacity=0.0)[0]
    assert not covered(faded, faded.things[0]).any() if faded.things[0].colour != "white" else True


def test_bad_input():
    for settings in (dict(count=-1), dict(count=1, things=(0, 2)), dict(count=1, things=(3, 9))):
        with pytest.raises(ValueError, match="count must be"):
            scenes(**({"seed": 0} | settings))
