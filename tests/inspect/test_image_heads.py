"""Heads of vision transformers: whole runs, scipy's divergence, loops over rings, planted maps."""

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from glocal.inspect import (
    MapAutoencoder,
    class_map,
    cluster_maps,
    edit_heads,
    head_counts,
    head_maps,
    image_heads,
    jensen_shannon,
    map_templates,
    masked_heads,
    measure,
    name_map,
    patch_distance,
    patch_entropy,
    prune_heads,
    record,
    ring_mass,
    ring_strength,
)
from glocal.nn import MLP, Attention, Block


def vit(layers=3, double=True):
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=20, num_labels=5,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double() if double else model


def images(count=6):
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("alone", [False, True])
def test_against_whole_runs(alone):
    """With hooks of transformers' own, head by head, no block skipped; the divergence is scipy's."""
    model, x = vit(), images()
    labels = torch.arange(6) % 5
    found = image_heads(model, x, labels, alone=alone)
    tokens = {}

    def run(layer=None, head=None):
        hooks = []
        blocks = model.vit.layers
        if layer is not None:
            gate = torch.ones(2)
            gate[(1 - head) if alone else head] = 0
            gate = gate.repeat_interleave(8).double()
            out = blocks[layer].attention.o_proj
            hooks.append(out.register_forward_pre_hook(lambda module, given: (given[0] * gate,)))
        hooks.append(blocks[-1].register_forward_hook(lambda m, i, out: tokens.update(now=out)))
        with torch.no_grad():
            p = model(x).logits.softmax(-1)
        for hook in hooks:
            hook.remove()
        states = tokens["now"]
        return p, (states[0] if isinstance(states, tuple) else states)[:, 0]

    base, token = run()
    for layer in range(3):
        for head in range(2):
            p, then = run(layer, head)
            for n in range(6):
                assert float(found.true[layer, head, n]) == pytest.approx(float(base[n, labels[n]] - p[n, labels[n]]))
                first = base[n].argmax()
                assert float(found.predicted[layer, head, n]) == pytest.approx(float(base[n, first] - p[n, first]))
                wanted = jensenshannon(base[n], p[n], 2) ** 2
                assert float(found.divergence[layer, head, n]) == pytest.approx(wanted, abs=1e-9)
                cosine = torch.cosine_similarity(token[n], then[n], dim=0)
                assert float(found.token[layer, head, n]) == pytest.approx(1 - float(cosine), abs=1e-12)
                assert bool(found.flip[layer, head, n]) == bool(p[n].argmax() != first)
    by_class = found.by_class(labels)["divergence"]
    torch.testing.assert_close(by_class[0], found.divergence[..., [0, 5]].mean(-1))
    ranks = found.rank_correlations()
    a, b = found.mean()["true"].flatten(), found.mean()["divergence"].flatten()
    assert ranks["true", "divergence"] == pytest.approx(spearmanr(a, b).statistic)


def test_only_later_blocks_run_again():
    model, runs = vit(), []
    for number, block in enumerate(model.vit.layers):
        block.mlp.register_forward_hook(lambda module, given, out, number=number: runs.append(number))
    modes = [module.training for module in model.train().modules()]
    image_heads(model, images(2))
    assert [runs.count(number) for number in range(3)] == [1 + 2, 1 + 4, 1 + 6]
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(ZeroDivisionError), edit_heads(model, lambda number, out: out):
        model.vit.layers[2].mlp.register_forward_hook(lambda *given: 1 / 0)
        model(images(2))


def test_removed_heads_are_the_gates():
    model, x = vit(), images()
    found = image_heads(model, x)
    with torch.no_grad():
        base = model(x).logits.softmax(-1)
        prune_heads(model, [(1, 0)])
        now = model(x).logits.softmax(-1)
    torch.testing.assert_close(found.divergence[1, 0], jensen_shannon(base, now) / math.log(2))
    later = image_heads(model, x)  # a layer with fewer heads
    assert later.flip.shape == (3, 2, 6) and later.divergence[1, 1].isnan().all()
    assert list(head_counts(model).values()) == [2, 1, 2]


def test_without_a_class_token():
    class Small(nn.Sequential):
        def forward(self, x):
            return super().forward(x).mean((1, 2))

    torch.manual_seed(0)
    model = Small(*[Block(8, Attention(8, 2), MLP(8, 8)) for _ in range(2)]).double()
    x = torch.randn(3, 4, 4, 8).double()
    found = image_heads(model, x, class_token=False)
    with torch.no_grad():
        base = model(x)
        with masked_heads(model, [(0, 1)]):
            now = model(x)
    torch.testing.assert_close(found.token[0, 1], 1 - torch.cosine_similarity(base, now, dim=-1))
    assert found.true.isnan().all()
    with pytest.raises(ValueError, match=r"labels must be \(3,\)"):
        image_heads(model, x, torch.zeros(2))
    with pytest.raises(ValueError, match="must give logits"):
        image_heads(nn.Sequential(*model), x)


def test_maps_are_those_of_the_weights():
    """Softmax of queries times keys, from the projections' weights by hand."""
    model, x = vit(1), images(2)
    entered = {}
    layer = model.vit.layers[0].attention
    layer.register_forward_pre_hook(
        lambda module, given, more: entered.update(x=given[0] if given else more["hidden_states"]), with_kwargs=True
    )
    (found,) = record(model, x)
    q, k = (
        (entered["x"] @ part.weight.T + (0 if part.bias is None else part.bias)).view(2, 17, 2, 8).transpose(1, 2)
        for part in (layer.q_proj, layer.k_proj)
    )
    torch.testing.assert_close(found.weights(), (q @ k.mT / math.sqrt(8)).softmax(-1))
    torch.testing.assert_close(class_map([found])[0], found.weights()[:, :, 0].mean(0))


# Rings.


class Planted(Attention):
    """With heads whose maps are given, ``(H, tokens, tokens)``."""

    def score(self, call):
        return self.table


def planted(tables):
    layer = Planted(4 * len(tables), len(tables), scale=0.0).double()
    layer.table = torch.stack(tables).double().clamp_min(1e-300).log()
    tokens = len(tables[0])
    return record(layer, torch.randn(1, tokens, 4 * len(tables)).double())


def ring(i, j, columns):
    return max(abs(i // columns - j // columns), abs(i % columns - j % columns))


@pytest.mark.parametrize("grid, first", [((4, 4), 1), ((3, 5), 1), ((3, 4), 0), ((2, 3), 2)])
def test_rings_by_loops(grid, first):
    torch.manual_seed(0)
    count = grid[0] * grid[1]
    table = torch.rand(2, first + count, first + count).double().softmax(-1)
    table = table / table.sum(-1, keepdim=True)
    found = planted(list(table))
    got = measure(found, {
        "mass": ring_mass(grid, first), "strength": ring_strength(grid, first),
        "distance": patch_distance(grid, first), "entropy": patch_entropy(first),
    })  # fmt: skip
    rings = max(grid)
    assert got["mass"].shape == (1, 2, rings + 1) and got["strength"].shape == (1, 2, rings)
    torch.testing.assert_close(got["mass"].sum(-1), torch.ones(1, 2).double())
    for h in range(2):
        inner = table[h, first:, first:]
        for r in range(rings):
            mass, means = 0.0, []
            for i in range(count):
                those = [float(inner[i, j]) for j in range(count) if ring(i, j, grid[1]) == r]
                mass += sum(those) / count
                means += [sum(those) / len(those)] if those else []
            assert float(got["mass"][0, h, r]) == pytest.approx(mass)
            assert float(got["strength"][0, h, r]) == pytest.approx(sum(means) / len(means))
        assert float(got["mass"][0, h, -1]) == pytest.approx(float(table[h, first:, :first].sum()) / count)
        among = inner / inner.sum(-1, keepdim=True)
        away = [[math.dist(divmod(i, grid[1]), divmod(j, grid[1])) for j in range(count)] for i in range(count)]
        wanted = (among * torch.tensor(away)).sum() / count
        assert float(got["distance"][0, h]) == pytest.approx(float(wanted))
        assert float(got["entropy"][0, h]) == pytest.approx(float(-(among * among.log()).sum()) / count)


def test_rings_of_known_heads():
    """Even attention gives a ring its share of patches; a head that looks at its patch, ring 0; a column on, ring 1."""
    aside = torch.zeros(16, 16)
    for i in range(16):
        aside[i, i + 1 if i % 4 < 3 else i] = 1  # at the border it looks at itself
    found = planted([torch.full((16, 16), 1 / 16), torch.eye(16), aside])
    got = measure(found, {"mass": ring_mass(first=0), "distance": patch_distance(first=0)})
    shares = [sum(ring(i, j, 4) == r for i in range(16) for j in range(16)) / 256 for r in range(4)]
    torch.testing.assert_close(got["mass"][0, 0, :4], torch.tensor(shares).double())
    torch.testing.assert_close(got["mass"][0, 1], torch.eye(5)[0].double())
    assert float(got["distance"][0, 1]) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(got["mass"][0, 2, :2], torch.tensor([0.25, 0.75]).double())
    with pytest.raises(ValueError, match="grid must be given: 16 tokens without the first 1 are no square"):
        measure(found, {"mass": ring_mass()})
    with pytest.raises(ValueError, match="grid must be of 16 patches; it was 3 x 4"):
        measure(found, {"mass": ring_mass((3, 4), 0)})


# Patterns.


def test_head_maps():
    model, x = vit(2), images(3)
    found = record(model, x)
    maps = head_maps(found)
    assert maps.maps.shape == (12, 16, 17) and maps.heads.unique(dim=0).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    for n, (layer, head) in enumerate(maps.heads.tolist()):
        wanted = found[layer].weights()[n % 6 // 2, head, 1:]
        torch.testing.assert_close(maps.maps[n], wanted.float())
        torch.testing.assert_close(maps.pictures()[n] * maps.scales[n], wanted[:, 1:].float())
    assert (
        maps.pictures(100.0).amax((1, 2)).allclose(torch.ones(12)) and (maps.pictures(100.0) >= maps.pictures()).all()
    )
    some = head_maps(found, limit=5)
    assert len(some.maps) == 5 and len(some.heads.unique(dim=0)) > 1


def test_templates_are_told_from_one_another():
    grid = (3, 5)
    templates = map_templates(grid)
    for name, template in templates.items():
        torch.testing.assert_close(template.sum(-1), torch.ones(15).double())
        noisy = 0.8 * template + 0.2 * torch.rand(15, 16, generator=torch.Generator().manual_seed(0)) / 16
        assert name_map(noisy, grid)[0] == name
    stripe = torch.zeros(15, 16)
    stripe[:, 1 + 7] = 1
    assert name_map(stripe, grid)[0] == "key"
    assert "class" not in map_templates(grid, 0)
    with pytest.raises(ValueError, match=r"pattern must be \(15, 16\); it was \(15, 15\)"):
        name_map(templates["row"][:, 1:], grid)


def test_planted_patterns_are_found():
    """Padded, since 18 is no multiple of 8."""
    generator = torch.Generator().manual_seed(0)
    templates = list(map_templates((3, 6), 0).values())[:4]
    truth = torch.arange(120) % 4
    maps = torch.stack([templates[n] for n in truth.tolist()]).float()
    maps = maps / maps.amax((1, 2), keepdim=True) + 0.1 * torch.rand(maps.shape, generator=generator)
    maps = maps / maps.amax((1, 2), keepdim=True)
    torch.manual_seed(0)
    network = MapAutoencoder(18)
    first = float((network(maps) - maps).detach().square().mean())
    assert network.learn(maps, epochs=30, batch=32) < first / 2
    clusters = cluster_maps(network.encode(maps), range(3, 7))
    assert clusters.count == 4 and adjusted_rand_score(truth, clusters.labels) == 1
    names = {name_map(pattern, (3, 6), 0)[0] for pattern in clusters.patterns(maps)}
    assert names == {"self", "local", "row", "column"}
    heads = torch.stack([truth // 2, truth % 2], 1)
    signatures = clusters.signatures(heads)
    assert signatures.shape == (2, 2, 4) and torch.equal(signatures.amax(-1), torch.ones(2, 2).double())
    with pytest.raises(ValueError, match=r"maps must be \(M, 18, 18\); it was \(2, 3, 3\)"):
        network(torch.rand(2, 3, 3))
    with pytest.raises(ValueError, match="counts must be from 2 to 119, for 120 maps; one was 1"):
        cluster_maps(network.encode(maps), [1])
