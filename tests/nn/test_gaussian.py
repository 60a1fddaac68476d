"""S047: Gaussian gates against the published package, by their product form, and at their limits."""

import pytest
import torch

from glocal.models.language.gaussian import GaussianClassifier
from glocal.nn.gaussian import GaussianAdaptiveAttention, GaussianBlock, importance_factor
from tests.peers import load_port


def make(heads=1, gaussians=1, **options):
    torch.manual_seed(0)
    layer = GaussianAdaptiveAttention(heads, gaussians, **options).double()
    torch.nn.init.normal_(layer.offsets)
    return layer


def x(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("heads,gaussians", [(1, 1), (1, 5), (3, 2)])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("padding", [None, 0.5])
def test_it_is_the_published_package(heads, gaussians, axis, padding):
    peer = load_port("gaussian_adaptive_attention.GaussianBlock")
    theirs = peer.MultiHeadGaussianAdaptiveAttention(axis, heads, gaussians, padding_value=padding).double()
    layer = make(heads, gaussians, axis=axis, padding_value=padding, eps=1e-30)
    torch.nn.init.uniform_(layer.widths, 1.0, 2.0)  # narrower ones underflow in the package
    with torch.no_grad():
        for head, one in enumerate(theirs.attention_heads):
            one.eps = 1e-30  # its least sum of weights, which several Gaussians fall below
            one.mean_offsets.copy_(layer.offsets[head])
            one.c.copy_(layer.widths[head])
    given = x(2, 10, 11)
    if padding is not None:
        given[:, 7:, ::2] = padding
    out, weights = theirs(given, return_attention_details=True)
    assert torch.allclose(layer(given), out, atol=1e-7) and torch.allclose(layer.weights(given), weights, atol=1e-7)


def test_by_the_product_of_gaussians():
    layer, given = make(2, 3), x(4, 9)
    rows = []
    for row in given:
        parts = []
        for head, chunk in enumerate((row[:4], row[4:])):
            total = torch.ones_like(chunk)
            for offset, width in zip(layer.offsets[head], layer.widths[head], strict=True):
                at = (chunk - chunk.mean() - offset) ** 2 / (2 * (chunk.var() + 1e-8) * width**2)
                total = total * torch.exp(-at)
            parts.append(total / total.sum())
        rows.append(torch.cat(parts))
    assert torch.allclose(layer.weights(given), torch.stack(rows), atol=1e-12)


def test_wide_gaussians_are_a_uniform_gate():
    layer, given = make(), x(3, 8)
    torch.nn.init.constant_(layer.widths, 1e6)
    assert torch.allclose(layer(given), given / 8, atol=1e-9)


def test_many_gaussians_do_not_underflow():
    layer, given = make(1, 60), x(2, 16)
    torch.nn.init.constant_(layer.widths, 2.0)
    torch.nn.init.ones_(layer.offsets)
    assert torch.allclose(layer.weights(given).sum(-1), torch.ones(2).double(), atol=1e-12)


def test_a_change_of_unit_changes_no_weight():
    layer, other, given = make(2, 2), make(2, 2), x(3, 12)
    with torch.no_grad():
        other.offsets.mul_(3.0)
    assert torch.allclose(layer.weights(given), other.weights(3.0 * given + 7.0), atol=1e-7)


def test_derivatives_by_finite_differences():
    layer = make(2, 2)
    names = [name for name, _ in layer.named_parameters()]

    def run(t, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (t,))

    given = [x(2, 7).requires_grad_(), *(p.detach().clone().requires_grad_() for p in layer.parameters())]
    assert torch.autograd.gradcheck(run, given)


def test_a_block_adds_each_gate():
    torch.manual_seed(0)
    block, given = GaussianBlock([(-1, 2, 2), (1, 3, 1)]).double(), x(2, 6, 8)
    out, gates = block(given, return_weights=True)
    first = given + given * gates[0]
    assert torch.allclose(out, first + first * gates[1], atol=1e-12) and torch.equal(block(given), out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs(dtype):
    layer, given = make(2, 2).float(), x(2, 64).to(dtype)
    assert layer(given).dtype == dtype
    assert torch.allclose(layer.weights(given).float(), layer.weights(given.float()), atol=1e-2)


def test_importance():
    weights = torch.tensor([[[0.1, 0.2, 0.7]], [[0.3, 0.2, 0.5]]])
    assert torch.allclose(importance_factor(weights), torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(importance_factor(weights.mT, axis=1), importance_factor(weights))
    assert (importance_factor(torch.ones(2, 5)) == 0).all()


def classifier(**options):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=3, vocab_size=50)
    return GaussianClassifier(BertModel(BertConfig(**sizes)), 4, layers=2, **options)


def test_only_gates_and_the_head_learn():
    model = classifier(num_heads=2, num_gaussians=3, gates=2).train()
    ids = torch.randint(50, (3, 7))
    assert not model.encoder.training and torch.equal(model.features(ids), model.features(ids))
    model(model.features(ids)).sum().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if not name.startswith("encoder")}
    assert sum(p.numel() for name, p in model.named_parameters() if "block" in name) == 2 * 2 * 2 * 3


def test_padding_is_as_if_it_were_not_there():
    model, ids = classifier().eval(), torch.randint(50, (1, 7))
    wanted = model(model.features(ids))
    padded, real = torch.cat([ids, torch.zeros(1, 3).long()], 1), torch.arange(10)[None] < 7
    assert torch.allclose(model(model.features(padded, real), real), wanted, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="num_gaussians must be at least 1"):
        GaussianAdaptiveAttention(1, 0)
    with pytest.raises(ValueError, match="at least 4 entries along axis -1; it had 3"):
        make(4)(x(2, 3))
    with pytest.raises(ValueError, match=r"among them 2; it was \(2, 3\)"):
        make(axis=2)(x(2, 3))
    with pytest.raises(ValueError, match="layers must be at least one"):
        GaussianBlock([])
    with pytest.raises(ValueError, match="from 1 to the encoder's 3; it was 4"):
        GaussianClassifier(classifier().encoder, 2, layers=4)
