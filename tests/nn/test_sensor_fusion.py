"""Gates against loops and symmetries of the formula; the contrastive loss against one written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from glocal.nn.sensor_fusion import SensorFusion, contrastive_alignment, squared_alignment


def tokens(seed=0, shape=(2, 6, 8), dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2)]


def layer(fusion, seed=0, **options):
    torch.manual_seed(seed)
    made = SensorFusion(8, fusion=fusion, **options).double()
    if fusion == "adaptive":
        made.query.data.normal_()
        for norm in made.norms:
            norm.weight.data.normal_()
            norm.bias.data.normal_()
    return made


def test_coded_gates_by_loops():
    made, (optical, radar) = layer("coded"), tokens()
    found = made(optical, radar)
    assert found.shape == (2, 12, 8)
    query = made.query.detach()
    for b in range(2):
        for n in range(6):
            s = sum(float(query[k, c] * radar[b, n, c] * optical[b, n, c]) for k in range(2) for c in range(8))
            gate = 1 / (1 + math.exp(-s))
            torch.testing.assert_close(found[b, n], radar[b, n] * gate)
            torch.testing.assert_close(found[b, 6 + n], optical[b, n] * gate)


def test_coded_gates_cannot_tell_the_sensors_apart():
    made, (optical, radar) = layer("coded"), tokens()
    gates = made.gates(optical, radar)
    assert torch.equal(gates[0], gates[1]) and gates.std() > 0.1
    assert torch.equal(made.gates(radar, optical), gates)
    with torch.no_grad():
        shift = torch.randn(8, dtype=torch.float64)
        made.query += torch.stack([shift, -shift])
    torch.testing.assert_close(made.gates(optical, radar), gates)
    with torch.no_grad():
        made.query[0] += shift
    assert not torch.allclose(made.gates(optical, radar), gates)


def test_coded_gates_saturate_with_width():
    """The score's variance is twice the channels for tokens of variance 1."""
    torch.manual_seed(0)
    shares = []
    for dim in (4, 1024):
        gates = SensorFusion(dim).gates(*tokens(shape=(1, 500, dim), dtype=torch.float32))
        shares.append(float(((gates < 0.05) | (gates > 0.95)).double().mean()))
    assert shares[0] < 0.5 and shares[1] > 0.9


def test_adaptive_gates_by_hand():
    made, (optical, radar) = layer("adaptive"), tokens()
    gates = made.gates(optical, radar)
    scores = []
    for norm, query, each in zip(made.norms, made.query, (optical, radar), strict=True):
        mean, var = each.mean(-1, keepdim=True), each.var(-1, keepdim=True, unbiased=False)
        scores.append(((((each - mean) / (var + 1e-5).sqrt()) * norm.weight + norm.bias) * query).sum(-1) / 8**0.5)
    torch.testing.assert_close(gates[0], 2 * torch.sigmoid(scores[0] - scores[1]))
    torch.testing.assert_close(gates.sum(0), torch.full((2, 6), 2.0, dtype=torch.float64))
    torch.testing.assert_close(
        made(optical, radar), torch.cat([radar * gates[1, ..., None], optical * gates[0, ..., None]], 1)
    )
    assert gates.std() > 0.1


def test_when_gates_act():
    optical, radar = tokens()
    plain = torch.cat([radar, optical], 1)
    coded, adaptive = layer("coded").eval(), layer("adaptive").eval()
    assert torch.equal(coded(optical, radar), plain) and not torch.equal(coded.train()(optical, radar), plain)
    assert torch.equal(adaptive(optical, radar), adaptive.train()(optical, radar))
    kept = layer("coded", gate_at_inference=True)
    assert torch.equal(kept.eval()(optical, radar), kept.train()(optical, radar))
    assert torch.equal(layer("adaptive", gate_at_inference=False).eval()(optical, radar), plain)
    fresh = SensorFusion(8, fusion="adaptive").double()
    assert torch.equal(fresh(optical, radar), plain)


@pytest.mark.parametrize("fusion", ["coded", "adaptive"])
def test_gradients_reach_all(fusion):
    made, (optical, radar) = layer(fusion), tokens()
    given = [optical.requires_grad_(), radar.requires_grad_()]
    assert torch.autograd.gradcheck(made, given)
    weight = torch.randn(2, 12, 8, dtype=torch.float64)
    (weight * made(optical, radar)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())
    fresh = SensorFusion(8, fusion="adaptive").double()
    (weight * fresh(*tokens())).sum().backward()
    assert (fresh.query.grad.abs() > 0).all()  # queries at 0 begin to learn


def test_alignment():
    optical, radar = tokens()
    assert float(layer("coded").alignment(optical, radar)) == pytest.approx(float(((optical - radar) ** 2).mean()))
    found = layer("adaptive", temperature=0.2).alignment(optical, radar)
    total = 0.0
    for b in range(2):
        similar = F.cosine_similarity(optical[b][:, None], radar[b][None], dim=-1) / 0.2
        for n in range(6):
            total -= float(similar[n, n] - similar[n].logsumexp(0) + similar[n, n] - similar[:, n].logsumexp(0))
    assert float(found) == pytest.approx(total / 24)
    assert float(contrastive_alignment(optical, radar)) == pytest.approx(float(contrastive_alignment(radar, optical)))
    torch.testing.assert_close(contrastive_alignment(3 * optical, radar), contrastive_alignment(optical, radar))
    each = [contrastive_alignment(optical[n : n + 1], radar[n : n + 1]) for n in range(2)]
    torch.testing.assert_close(contrastive_alignment(optical, radar), sum(each) / 2)
    blind = torch.ones(1, 5, 3)
    assert float(contrastive_alignment(blind, blind)) == pytest.approx(math.log(5))


@pytest.mark.parametrize("fusion", ["coded", "adaptive"])
def test_half_precision(fusion):
    made, (optical, radar) = layer(fusion), tokens()
    exact, loss = made(optical, radar), made.alignment(optical, radar)
    half = made.bfloat16()
    found = half(optical.bfloat16(), radar.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, atol=0.1, rtol=0.1)
    torch.testing.assert_close(
        half.alignment(optical.bfloat16(), radar.bfloat16()).double(), loss, atol=0.05, rtol=0.02
    )


def test_bad_input():
    optical, radar = tokens()
    for options, message in (
        (dict(fusion="mean"), "fusion must be"),
        (dict(dim=0), "dim must be at least 1"),
        (dict(temperature=0.0), "temperature must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SensorFusion(**{"dim": 8} | options)
    for call in (SensorFusion(8), SensorFusion(8).gates, squared_alignment, contrastive_alignment):
        with pytest.raises(ValueError, match="optical and radar must be"):
            call(optical, radar[:, :3])
    with pytest.raises(ValueError, match=r"\(B, N, 7\)"):
        SensorFusion(7)(optical, radar)
