"""S062: tiles against loops and histograms, models that must be at chance or right, scipy's interval, Gram by loops."""

import itertools

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from glocal.bench.disrt import (
    Disrt,
    disrt,
    disrt_table,
    layer_features,
    odd_one_out,
    oddity_trials,
    tile_shuffle,
    wilson_interval,
)
from glocal.bench.texture import RandomConvs, gram_distance, synthesise


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=6, channels=3, size=24):
    return torch.rand(count, channels, size, size, generator=seeded(5))


def tiles(image, side):
    return sorted(
        image[:, y : y + side, x : x + side].flatten().tolist()
        for y in range(0, image.shape[1], side)
        for x in range(0, image.shape[2], side)
    )


# Distortions.


@pytest.mark.parametrize("tile", [1, 2, 8, 12])
@pytest.mark.parametrize("shape", [(24, 24), (24, 48)])
def test_tiles_are_the_same_in_another_order(tile, shape):
    x = torch.rand(4, 3, *shape)
    before = x.clone()
    found = tile_shuffle(x, tile, seeded(), blend=0)
    assert torch.equal(x, before)
    for a, b in zip(x, found, strict=True):
        assert not torch.equal(a, b) and tiles(a, tile) == tiles(b, tile)
        assert torch.equal(a.flatten(1).sort().values, b.flatten(1).sort().values)


def test_orders_differ_by_picture_and_seed():
    x = torch.rand(1, 1, 24, 24).expand(6, 1, 24, 24)
    found = [tile_shuffle(x, 4, seeded(n), blend=0) for n in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found[0], 2))


def test_two_tiles_always_change_places():
    x = torch.rand(50, 1, 4, 8)
    assert torch.equal(tile_shuffle(x, 4, seeded(), blend=0), x.roll(4, -1))


def test_the_centre_stays():
    x = torch.rand(20, 2, 15, 25)
    found = tile_shuffle(x, 5, seeded(), blend=0, keep_centre=True)
    assert torch.equal(found[:, :, 5:10, 10:15], x[:, :, 5:10, 10:15]) and not torch.equal(found, x)


@pytest.mark.parametrize(("tile", "blend"), [(4, 2), (6, 4), (3, 2)])
def test_seams_fade_by_loops(tile, blend):
    x = torch.rand(1, 2, 12, 12, dtype=torch.float64)
    wanted = tile_shuffle(x, tile, seeded(), blend=0)
    for axis in (3, 2):
        new = wanted.clone()
        for seam in range(tile, 12, tile):
            for away in range(blend // 2):
                a, b = seam - 1 - away, seam + away
                share = 0.5 - (away + 0.5) / blend
                before, behind = wanted.select(axis, a), wanted.select(axis, b)
                new.select(axis, a).copy_((1 - share) * before + share * behind)
                new.select(axis, b).copy_((1 - share) * behind + share * before)
        wanted = new
    found = tile_shuffle(x, tile, seeded(), blend=blend)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found.sum(), x.sum())


def gram_by_loops(a, b, grid, weights):
    total = 0.0
    for layer, (f, t) in enumerate(zip(a, b, strict=True)):
        for i, j in itertools.product(range(grid), repeat=2):
            height, width = f.shape[2] // grid, f.shape[3] // grid
            at = (slice(None), slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            for n in range(len(f)):
                g, h = f[n][at], t[n][at]
                channels, places = len(g), height * width
                for p, q in itertools.product(range(channels), repeat=2):
                    apart = (g[p] * g[q]).sum() - (h[p] * h[q]).sum()
                    total += weights[layer] * float(apart**2) / (4 * channels**2 * places**2)
    return total


@pytest.mark.parametrize("grid", [1, 2, 4])
def test_gram_distance_by_loops(grid):
    a, b = ([torch.rand(2, 3, 8, 4), torch.rand(2, 5, 4, 8)] for _ in range(2))
    assert float(gram_distance(a, b, grid=grid, weights=[1.0, 0.3])) == pytest.approx(
        gram_by_loops(a, b, grid, [1.0, 0.3]), rel=1e-5
    )


def test_a_texture_does_not_say_where():
    maps = [torch.rand(1, 3, 6, 6)]
    moved = [maps[0].flatten(2)[..., torch.randperm(36)].view(1, 3, 6, 6)]
    assert float(gram_distance(maps, moved)) == pytest.approx(0, abs=1e-9)
    assert float(gram_distance(maps, moved, grid=2)) > 1e-4


def test_synthesis_finds_the_texture_and_a_grid_holds_it_in_place():
    # Stripes on the left, even grey on the right.
    at = torch.arange(24)
    image = torch.full((1, 1, 24, 24), 0.5)
    image[..., :12] = ((at // 3) % 2).float()[:, None]
    net = RandomConvs(1, layers=2, filters=16, size=5)
    noise = torch.rand(image.shape, generator=seeded())
    found = {grid: synthesise(image, seeded(), features=net, grid=grid, steps=60) for grid in (1, 4)}
    for grid, texture in found.items():
        start, end = (float(gram_distance(net(x), net(image), grid=grid)) for x in (noise, texture))
        assert end < 0.1 * start
        assert texture.min() >= 0 and texture.max() <= 1
    spread = {grid: [float(x[..., :12].var()), float(x[..., 12:].var())] for grid, x in found.items()}
    contrast = {grid: left - right for grid, (left, right) in spread.items()}
    assert contrast[4] > 2 * abs(contrast[1])


def test_synthesis_takes_each_picture_alone():
    x = pictures(2, 3, 12)
    net = RandomConvs(3, layers=1, filters=4, size=3)
    both, first = (synthesise(images, seeded(), features=net, steps=5) for images in (x, x[:1]))
    assert torch.equal(both[:1], first)


# Reading out.


def indicator(trials, noise):
    """Whether a picture is intact, as a feature, plus noise."""
    features = torch.zeros(len(trials.odd), 3, 8)
    features[torch.arange(len(trials.odd)), trials.odd, 0] = 1
    return features + noise * torch.randn(features.shape, generator=seeded(9))


def shuffled(x, generator):
    return tile_shuffle(x, 4, generator, blend=0)


@pytest.mark.parametrize("odd", ["intact", "distorted"])
def test_features_that_tell_are_right(odd):
    trials = oddity_trials(pictures(400), shuffled, seeded(), odd=odd)
    assert float(odd_one_out(indicator(trials, 0.1), trials.odd).mean()) >= 0.99


class Bag(nn.Module):
    """No order: patches go through a network one by one, and their mean is taken."""

    def __init__(self, patch):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.fc = nn.Conv2d(3, 16, patch, stride=patch), nn.Linear(16, 16)

    def forward(self, x):
        return self.fc(self.embed(x).relu().flatten(2).mT).relu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_encoder_without_order_is_at_chance_exactly(dtype):
    trials = oddity_trials(pictures(50).to(dtype), shuffled, seeded())
    rows = disrt(lambda x: layer_features(Bag(4).to(dtype), x, ["", "fc"]), {"tile 4": trials})
    assert [row.accuracy for row in rows] == pytest.approx([1 / 3, 1 / 3], abs=1e-12)
    # One that sees across tiles is not: it tells the versions apart, whichever it calls odd.
    across = odd_one_out(
        layer_features(Bag(8).to(dtype), trials.images.flatten(0, 1), [""])[""].unflatten(0, (50, 3)), trials.odd
    )
    assert set(across.tolist()) == {0.0, 1.0}


def test_positions_have_no_part():
    trials = oddity_trials(pictures(40), shuffled, seeded())
    features = indicator(trials, 2.0)
    credit = odd_one_out(features, trials.odd)
    assert 0.1 < float(credit.mean()) < 0.9
    for order in itertools.permutations(range(3)):
        moved = torch.tensor(order).argsort()[trials.odd]
        torch.testing.assert_close(odd_one_out(features[:, order], moved), credit)


@pytest.mark.parametrize("odd", ["intact", "distorted"])
def test_places_are_even_and_the_odd_one_is_where_it_is_said(odd):
    x = pictures(600, 1, 8)
    trials = oddity_trials(x, shuffled, seeded(), odd=odd)
    counts = torch.bincount(trials.odd, minlength=3)
    assert counts.sum() == 600 and (counts - 200).abs().max() < 4 * (600 * 2 / 9) ** 0.5
    for image, three, at in zip(x, trials.images, trials.odd.tolist(), strict=True):
        same = [bool(torch.equal(image, one) or torch.equal(image, one.flip(-1))) for one in three]
        assert same == [(n == at) == (odd == "intact") for n in range(3)]


def test_ties_get_their_share():
    a, b, c = torch.eye(3)
    alike = torch.stack([a, a, a])
    pair = torch.stack([a, a, -a])
    unlike = torch.stack([a, b, c])
    features = torch.stack([alike, pair, unlike])
    # With all of them turned round as well, the mean is zero.
    credit = odd_one_out(torch.cat([features, -features]), torch.tensor([0, 2, 1, 1, 0, 2]))
    wanted = torch.tensor([1 / 3, 1, 1 / 3, 1 / 3, 0, 1 / 3], dtype=torch.float64)
    torch.testing.assert_close(credit, wanted)
    # Two of three: the first is like neither of the others, nor is the second.
    two = torch.stack([torch.stack([a, -a, b]), torch.stack([-a, a, -b])])
    torch.testing.assert_close(odd_one_out(two, torch.tensor([0, 2])), torch.tensor([0.5, 0.0], dtype=torch.float64))


def test_scores_by_loops():
    torch.manual_seed(0)
    features, odd = torch.randn(30, 3, 4, dtype=torch.float64), torch.randint(3, (30,))
    mean = sum(features[t, k] for t in range(30) for k in range(3)) / 90
    wanted = []
    for t in range(30):
        v = [(features[t, k] - mean) / (features[t, k] - mean).norm() for k in range(3)]
        scores = [sum(float(v[k] @ v[j]) for j in range(3) if j != k) for k in range(3)]
        wanted.append(float(scores.index(min(scores)) == odd[t]))
    assert odd_one_out(features, odd).tolist() == wanted


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (3, 10), (33, 100), (100, 100)])
def test_wilson_s_interval_is_scipy_s(hits, count):
    assert wilson_interval(hits, count) == pytest.approx(tuple(binomtest(hits, count).proportion_ci(method="wilson")))


def test_features_of_layers_and_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Flatten(2), nn.Linear(36, 5))
    model[1].eval()
    model.train()
    model[0].eval()
    x = torch.rand(7, 3, 8, 8)
    found = layer_features(model, x, ["0", "2", "3"], batch=3)
    maps = model[0](x)
    torch.testing.assert_close(found["0"], maps.mean((2, 3)))
    torch.testing.assert_close(found["2"], maps.flatten(2).mean(1))
    first = layer_features(model, x, ["3"], pool="first")["3"]
    torch.testing.assert_close(first, model[3](maps.flatten(2)[:, 0]))
    assert [part.training for part in model] == [False, True, True, True]
    assert not any(part._forward_hooks for part in model)
    with pytest.raises(RuntimeError):
        layer_features(model, torch.rand(2, 5, 8, 8), ["0"])
    assert model.training and not any(part._forward_hooks for part in model)


def test_people_beside_it():
    trials = oddity_trials(pictures(30), shuffled, seeded())
    rows = disrt(lambda x: {"none": torch.ones(len(x), 2)}, {"tile": trials, "other": trials}, human={"tile": 0.9})
    assert rows[0].lead == pytest.approx(1 / 3 - 0.9) and rows[1].lead is None
    assert [row[-1] for row in disrt_table(rows).rows] == ["-0.567", "-"]
    assert isinstance(rows[0], Disrt) and rows[0].low < 1 / 3 < rows[0].high


def test_bad_input():
    x = pictures(2)
    with pytest.raises(ValueError, match="tile must divide the sides"):
        tile_shuffle(x, 5, seeded())
    with pytest.raises(ValueError, match="tile must leave two tiles"):
        tile_shuffle(x, 24, seeded())
    for blend in (1, -2, 6):
        with pytest.raises(ValueError, match="blend must be even, from 0 to tile 4"):
            tile_shuffle(x, 4, seeded(), blend=blend)
    with pytest.raises(ValueError, match="keep_centre needs odd numbers of tiles; they were 6 x 6"):
        tile_shuffle(x, 4, seeded(), keep_centre=True)
    with pytest.raises(ValueError, match="odd must be 'intact' or 'distorted'"):
        oddity_trials(x, shuffled, seeded(), odd="first")
    with pytest.raises(ValueError, match="images must be"):
        oddity_trials(x[0], shuffled, seeded())
    with pytest.raises(ValueError, match=r"features and odd must be \(T, 3, D\) and \(T,\)"):
        odd_one_out(torch.rand(4, 2, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="hits must be from 0 to count"):
        wilson_interval(6, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="layers must be modules of the model; it has no head"):
        layer_features(model, x, ["0", "head"])
    with pytest.raises(ValueError, match="pool must be 'mean' or 'first'"):
        layer_features(model, x, ["0"], pool="max")
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="must run once a batch; 'unused' gave 0 vectors for 2"):
        layer_features(model, x, ["unused"])
    with pytest.raises(ValueError, match="channels, layers, filters and size must be at least 1, size odd"):
        RandomConvs(size=4)
    with pytest.raises(ValueError, match="maps, targets and weights must be one a layer"):
        gram_distance([torch.rand(1, 2, 3, 3)], [])
    with pytest.raises(ValueError, match="grid must be from 1 to the side of the smallest map; it was 4"):
        gram_distance([torch.rand(1, 2, 3, 3)], [torch.rand(1, 2, 3, 3)], grid=4)
    with pytest.raises(ValueError, match="steps and depth at least 1"):
        synthesise(x, seeded(), steps=0)
