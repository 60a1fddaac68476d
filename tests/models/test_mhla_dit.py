"""S060: DiT's published size and what MHLA changes in it; a network that starts as zero, and learns everywhere."""

import pytest
import torch

import glocal
from glocal.models.vision.mhla_dit import MHLADiT


@pytest.mark.parametrize("name,dim,depth", [("small", 384, 12), ("base", 768, 12), ("large", 1024, 24)])
def test_sizes(name, dim, depth):
    with torch.device("meta"):
        model = glocal.create(f"mhla_dit_{name}")
    assert (model.dim, len(model.blocks), model.blocks[0].attention[1].head_dim) == (dim, depth, 64)
    assert model.blocks[0].attention[1].blocks == (4, 4)


def test_parameters_are_those_of_dit_but_for_what_differs():
    """DiT-XL/2 prints 675,129,632, with its 256 fixed positions."""
    with torch.device("meta"):
        model = glocal.create("mhla_dit_xlarge")
    # No biases of q, k and v; a norm, norms of q and k, a convolution of 3 x 3, a matrix of 16 x 16.
    changed = 28 * (-3 * 1152 + 2 * 1152 + 2 * 1152 + 10 * 1152 + 256) - 256 * 1152
    assert sum(p.numel() for p in model.parameters()) == 675_129_632 + changed


def small(**options):
    torch.manual_seed(0)
    return MHLADiT(16, 2, 2, **({"size": 8, "block_size": 4, "num_classes": 10} | options))


def inputs(size=(8, 8)):
    return torch.randn(2, 4, *size), torch.tensor([0.0, 700.0]), torch.tensor([3, 10])


def shaken():
    model = small().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def test_it_starts_as_zero_and_places_patches_where_they_were():
    assert torch.equal(small()(*inputs()), torch.zeros(2, 8, 8, 8))
    model = small(variance=False)
    torch.nn.init.eye_(model.head.weight.data)  # channels 0 to 15 of a token: row, column, channel
    x = model.embed(inputs()[0]).movedim(1, -1)
    model.embed.weight.data.zero_()
    out = model(*inputs())
    assert out.shape == (2, 4, 8, 8) and x.shape == (2, 4, 4, 16)
    # Only places are left: equal in both images, and what stands in a patch is a token's channels in this order.
    from glocal.nn.sincos import sincos_grid

    tokens = torch.nn.functional.layer_norm(sincos_grid(4, 4, 16), (16,), eps=1e-6).view(4, 4, 2, 2, 4)
    for row in range(8):
        for column in range(8):
            wanted = tokens[row // 2, column // 2, row % 2, column % 2]
            assert torch.allclose(out[:, :, row, column], wanted.expand(2, -1), atol=1e-5)


def test_time_and_class_count():
    model, (x, time, label) = shaken(), inputs()
    out = model(x, time, label)
    assert not torch.allclose(model(x, time + 1, label), out, atol=1e-4)
    assert not torch.allclose(model(x, time, label - 1), out, atol=1e-4)
    assert model(*inputs((12, 20))).shape == (2, 8, 12, 20)
    model.train()
    model.label_dropout = 0.999999
    assert torch.equal(model(x, time, label), model(x, time, torch.full((2,), 10)))


def test_one_step_of_training_reaches_every_weight():
    model = shaken()
    model(*inputs()).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_it_exports():
    model, given = shaken(), inputs()
    assert torch.allclose(torch.export.export(model, given).module()(*given), model(*given), atol=1e-4)


def test_bad_settings():
    with pytest.raises(ValueError, match="block_size must be the square"):
        small(block_size=8)
    with pytest.raises(ValueError, match="block_size must be the square"):
        small(block_size=9)
    with pytest.raises(ValueError, match="patch must divide"):
        small(patch=3)
    x, time, label = inputs()
    with pytest.raises(ValueError, match="latents"):
        small()(x[:, :3], time, label)
    with pytest.raises(ValueError, match="label must be"):
        small()(x, time, label.float())
