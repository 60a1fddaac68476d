"""Convolutions with channels last: each by its definition or its peer in timm."""

import pytest
import torch

from glocal.nn import BatchNorm, ConvMLP, Depthwise, LocalInteraction
from tests.peers import load_timm


def test_depthwise_is_a_convolution_of_each_channel_alone():
    conv = Depthwise(3, 5)
    x = torch.randn(2, 6, 7, 3)
    for c in range(3):
        alone = torch.nn.functional.conv2d(x[..., c][:, None], conv.weight[c : c + 1], conv.bias[c : c + 1], padding=2)
        assert torch.allclose(conv(x)[..., c], alone[:, 0], atol=1e-6)


@pytest.mark.parametrize("side", [3, 7])
def test_local_interaction_is_that_of_xcit(side):
    peer = load_timm("models.xcit").LPI(6, kernel_size=side).double()
    layer = LocalInteraction(6, side).double()
    for name, theirs in peer.named_parameters():
        torch.nn.init.normal_(theirs)
        layer.get_parameter(name.replace("bn.", "norm.")).data.copy_(theirs.data)
    x = torch.randn(3, 9, 8, 6).double()
    for training in (True, False):  # by the batch's own statistics, and then by the running ones that are left
        peer.train(training)
        layer.train(training)
        theirs = peer(x.flatten(1, 2), 9, 8).unflatten(1, (9, 8))
        torch.testing.assert_close(layer(x), theirs)


def test_local_interaction_reaches_six_pixels():
    """Two sides of 7: three pixels and three more."""
    layer = LocalInteraction(2, 7).eval()
    x = torch.randn(1, 17, 17, 2, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x)[0, 8, 8].sum(), x)
    at = found.abs().sum(-1)[0].nonzero()
    assert at.min(0).values.tolist() == [2, 2] and at.max(0).values.tolist() == [14, 14]


@pytest.mark.parametrize("residual", [True, False])
def test_a_feed_forward_with_a_convolution_by_definition(residual):
    torch.manual_seed(0)
    layer = ConvMLP(4, 8, residual=residual)
    x = torch.randn(2, 5, 6, 4)
    hidden = layer.fc1(x)
    if residual:
        hidden = torch.nn.functional.gelu(hidden)
        hidden = hidden + layer.dw(hidden)
    else:
        hidden = torch.nn.functional.gelu(layer.dw(hidden))
    assert torch.equal(layer(x), layer.fc2(hidden))


def test_batch_norm_is_over_all_places():
    x = torch.randn(3, 5, 6, 4)
    flat = torch.nn.functional.batch_norm(x.flatten(0, 2), None, None, training=True)
    assert torch.allclose(BatchNorm(4)(x), flat.view_as(x), atol=1e-5)


def test_an_even_side_is_refused():
    with pytest.raises(ValueError, match="side must be odd"):
        LocalInteraction(8, 6)
