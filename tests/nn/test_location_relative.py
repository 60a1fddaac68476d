"""S071: mixtures against torch.distributions and Graves's formula, the prior against scipy, convolutions by loops."""

import numpy as np
import pytest
import torch
from scipy.stats import betabinom
from torch.distributions import Categorical, MixtureSameFamily, Normal

from glocal.nn import DynamicConvolutionAttention, GMMAttention, beta_binomial

B, N, T, D, C = 2, 4, 12, 3, 5
VERSIONS = ("v0", "v1", "v2", "v1b", "v2b")


def inputs(steps=N, frames=T):
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(B, steps, D, generator=draw, dtype=torch.double)
    memory = torch.randn(B, frames, C, generator=draw, dtype=torch.double)
    real = torch.ones(B, frames, dtype=torch.bool)
    real[1, frames - 3 :] = False
    return queries, memory, real


def gmm(version="v2", **options):
    torch.manual_seed(1)
    layer = GMMAttention(D, C, version=version, **({"components": 3, "hidden": 7} | options)).double()
    torch.nn.init.normal_(layer.mixture.weight)
    return layer


def dca(**options):
    torch.manual_seed(1)
    given = {"hidden": 7, "filters": 2, "width": 5, "reach": 4, "alpha": 0.3}
    return DynamicConvolutionAttention(D, C, **(given | options)).double()


@pytest.mark.parametrize("version", VERSIONS)
def test_mixtures_by_densities(version):
    """Normals of torch.distributions, for v0 the formula of Graves: sum of a exp(-b (k - j)^2)."""
    queries, memory, real = inputs()
    layer = gmm(version)
    contexts, weights = layer.over(queries, memory, real)
    means, frames = torch.zeros(B, 3, dtype=torch.double), torch.arange(T, dtype=torch.double)[:, None]
    for n in range(N):
        made = layer.mixture(torch.tanh(layer.inner(queries[:, n])))
        a, k, b = made[:, :3], made[:, 3:6], made[:, 6:]
        if version == "v0":
            means = means + torch.exp(k)
            apart = (means[:, None] - frames) ** 2
            wanted = (torch.exp(a)[:, None] * torch.exp(-torch.exp(b)[:, None] * apart)).sum(-1)
        else:
            old = version.startswith("v1")
            means = means + (torch.exp(k) if old else torch.nn.functional.softplus(k))
            width = torch.exp(b).sqrt() if old else torch.nn.functional.softplus(b)
            mixture = MixtureSameFamily(Categorical(logits=a), Normal(means, width), validate_args=False)
            wanted = mixture.log_prob(frames).exp().mT
        wanted = wanted * real
        assert torch.allclose(weights[:, n], wanted, atol=1e-12)
        assert torch.allclose(contexts[:, n], torch.einsum("bt,btc->bc", wanted, memory), atol=1e-12)


@pytest.mark.parametrize("version", ["v1b", "v2b"])
def test_biases_make_steps_of_one_frame_and_widths_of_ten(version):
    layer = gmm(version)
    torch.nn.init.zeros_(layer.mixture.weight)
    _, steps, widths = layer.components_of(torch.randn(B, D, dtype=torch.double))
    assert torch.allclose(steps, torch.ones_like(steps), atol=1e-6)
    assert torch.allclose(widths, torch.full_like(widths, 10), atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_means_never_go_back(version):
    queries, memory, real = inputs(steps=20)
    layer, state, last = gmm(version), None, torch.zeros(B, 3, dtype=torch.double)
    state = layer.start(memory, real)
    for query in (9 * queries).unbind(1):
        _, state = layer(query, state)
        assert (state.position > last).all()
        last = state.position


@pytest.mark.parametrize("version", VERSIONS)
def test_more_frames_leave_the_weights_of_a_mixture_as_they_are(version):
    queries, memory, _ = inputs()
    layer = gmm(version)
    longer = torch.cat([memory, torch.randn_like(memory)], 1)
    assert torch.equal(layer.over(queries, longer)[1][..., :T], layer.over(queries, memory)[1])


@pytest.mark.parametrize("n,alpha,beta", [(10, 0.1, 0.9), (4, 2.0, 0.5), (0, 1.0, 1.0)])
def test_the_prior_by_scipy(n, alpha, beta):
    assert np.allclose(
        beta_binomial(n, alpha, beta).numpy(), betabinom.pmf(np.arange(n + 1), n, alpha, beta), atol=1e-13
    )


def test_the_prior_moves_a_frame_forward_by_its_probabilities():
    layer = dca(reach=10, alpha=0.1)
    last = torch.zeros(1, 30, dtype=torch.double)
    last[0, 12] = 1
    moved = layer.prior_logits(last).exp()[0]
    assert np.allclose(moved[12:23].detach().numpy(), betabinom.pmf(np.arange(11), 10, 0.1, 0.9), atol=1e-6)
    assert torch.allclose(moved[:12], torch.full_like(moved[:12], 1e-6)) and (moved[23:] < 1.1e-6).all()


def test_dynamic_convolution_by_loops():
    queries, memory, real = inputs()
    layer = dca()
    contexts, weights = layer.over(queries, memory, real)
    pmf = betabinom.pmf(np.arange(5), 4, 0.3, 0.9)
    for b in range(B):
        length, last = int(real[b].sum()), [1.0] + [0.0] * (T - 1)
        for n in range(N):
            filters = layer.filter_proj.weight @ torch.tanh(layer.filter_inner(queries[b, n]))
            filters, energies = filters.view(2, 5), []
            for t in range(length):
                taps = torch.tensor([last[t + o] if 0 <= t + o < T else 0.0 for o in range(-2, 3)], dtype=torch.double)
                f, g = layer.static.weight @ taps, filters @ taps
                inner = torch.tanh(layer.static_proj.weight @ f + layer.dynamic_proj(g))
                prior = sum(pmf[k] * last[t - k] for k in range(5) if t - k >= 0)
                energies.append((layer.energy.weight[0] @ inner) + np.log(max(prior, 1e-6)))
            row = torch.softmax(torch.stack(energies), 0)
            assert torch.allclose(weights[b, n, :length], row, atol=1e-6) and (weights[b, n, length:] == 0).all()
            assert torch.allclose(contexts[b, n], row @ memory[b, :length], atol=1e-5)
            last = row.tolist() + [0.0] * (T - length)


def prior_alone():
    """Static and dynamic filters do nothing."""
    layer = dca(reach=10, alpha=0.1)
    for part in (layer.static_proj.weight, layer.dynamic_proj.weight):
        torch.nn.init.zeros_(part)
    torch.nn.init.zeros_(layer.dynamic_proj.bias)
    return layer


def test_without_filters_the_prior_is_folded_with_itself():
    queries, memory, _ = inputs(frames=40)
    _, weights = prior_alone().over(queries, memory)
    pmf, wanted = betabinom.pmf(np.arange(11), 10, 0.1, 0.9), np.ones(1)
    for n in range(N):
        wanted = np.maximum(np.convolve(np.pad(wanted, (0, 40 - len(wanted))), pmf)[:40], 1e-6)
        wanted /= wanted.sum()
        assert np.allclose(weights[0, n].detach().numpy(), wanted, atol=1e-6)


def test_with_the_prior_weight_moves_forward():
    """By one frame a step on average, which is the mean of the prior."""
    queries, memory, _ = inputs(steps=12, frames=200)
    _, weights = prior_alone().over(queries, memory)
    middle = (weights[0] * torch.arange(200)).sum(-1)
    assert torch.allclose(middle.diff(), torch.ones(11, dtype=torch.double), atol=0.05)


@pytest.mark.parametrize("make", [*VERSIONS, "dca"])
def test_derivatives_over_three_steps_by_finite_differences(make):
    queries, memory, real = inputs(steps=3, frames=6)
    layer = dca() if make == "dca" else gmm(make)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    class Over(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, queries, memory):
            return torch.cat([part.flatten() for part in layer.over(queries, memory, real)])

    def run(queries, memory, *weights):
        given = {f"layer.{name}": weight for name, weight in zip(names, weights, strict=True)}
        return torch.func.functional_call(Over(), given, (queries, memory))

    given = [t.detach().clone().requires_grad_() for t in (queries, memory, *parameters)]
    assert torch.autograd.gradcheck(run, given, fast_mode=True)


@pytest.mark.parametrize("kind", [GMMAttention, DynamicConvolutionAttention])
def test_half_precision_counts_frames(kind):
    """Beyond 256 frames bfloat16 cannot add one."""
    torch.manual_seed(0)
    layer = kind(D, C).bfloat16()
    memory, queries = torch.randn(1, 600, C, dtype=torch.bfloat16), torch.randn(1, 400, D, dtype=torch.bfloat16)
    contexts, weights = layer.over(queries, memory)
    assert contexts.dtype == weights.dtype == torch.bfloat16 and weights.isfinite().all()
    if kind is GMMAttention:
        middle = (weights[0].float() * torch.arange(600)).sum(-1) / weights[0].float().sum(-1)
        whole = layer.float().over(queries.float(), memory.float())[1]
        wanted = (whole[0] * torch.arange(600)).sum(-1) / whole[0].sum(-1)
        assert wanted[-1] > 300 and torch.allclose(middle, wanted, rtol=0.02, atol=0.5)


def test_the_state_of_a_layer_is_its_parameters():
    for layer in (gmm(), dca()):
        assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()}


@pytest.mark.parametrize(
    "run,match",
    [
        (lambda: GMMAttention(D, C, version="v3"), "version must be one of v0, v1"),
        (lambda: GMMAttention(D, C, components=0), "components and hidden must be at least 1; they were 0"),
        (lambda: DynamicConvolutionAttention(D, C, width=20), "width must be odd, .* it was 20"),
        (lambda: DynamicConvolutionAttention(D, C, filters=0), "hidden and filters must be at least 1"),
        (lambda: DynamicConvolutionAttention(D, C, alpha=0.0), "alpha and beta positive; they were 10, 0.0"),
    ],
)
def test_bad_settings(run, match):
    with pytest.raises(ValueError, match=match):
        run()
