"""S115: SUM's sizes, its parts, what a condition does, and that a map may have any size that its strides allow."""

import pytest
import torch
from einops import rearrange

import glocal
from glocal.models.human.sum import SUM, Condition, VSSBlock
from glocal.models.vision.patches import PatchExpand, PatchMerge


def small(**options):
    torch.manual_seed(0)
    return SUM((16, 32), (1, 2), (2, 1), **({"state": 4} | options))


@pytest.mark.parametrize("name,count", [("sum_small", 57_501_196), ("sum_vssm", 44_657_908)])
def test_parameters(name, count):
    with torch.device("meta"):
        model = glocal.create(name)
    assert sum(p.numel() for p in model.parameters()) == count
    if name == "sum_small":
        inside = sum(p.numel() for part in (model.encoder, model.down) for p in part.parameters())
        assert count - inside == 13_859_212


def test_merging_and_expanding_have_the_order_of_the_release():
    x = torch.randn(2, 4, 6, 8)
    merge, expand = PatchMerge(8), PatchExpand(8, 2)
    quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    assert torch.equal(merge(x), merge.proj(merge.norm(torch.cat(quarters, -1))))
    parts = rearrange(expand.proj(x), "b h w (p q c) -> b (h p) (w q) c", p=2, q=2)
    assert torch.equal(expand(x), expand.norm(parts))


def test_a_condition_that_says_nothing_leaves_a_block_as_it_is_without():
    torch.manual_seed(0)
    plain, told = VSSBlock(16, state=4), VSSBlock(16, state=4, conditions=3)
    told.load_state_dict(plain.state_dict(), strict=False)
    x, which = torch.randn(2, 5, 4, 16), torch.tensor([0, 2])
    assert not torch.equal(told(x, which), plain(x))
    with torch.no_grad():
        told.condition.mlp[-1].weight.zero_()
        told.condition.mlp[-1].bias.zero_()
    assert torch.equal(told(x, which), plain(x))


def test_a_condition_scales_and_shifts_where_it_is_said_to():
    torch.manual_seed(0)
    block = VSSBlock(16, state=4, conditions=2)
    x, which = torch.randn(1, 5, 4, 16), torch.tensor([1])
    shift1, scale1, shift2, scale2, scale3 = block.condition(which).flatten().tolist()
    mixer, seen = block.mixer, block.norm(x) * (1 + scale1) + shift1
    u, gate = mixer.in_proj(seen).chunk(2, -1)
    y = mixer.scan(torch.nn.functional.silu(mixer.conv(u))) * (1 + scale3)
    y = mixer.norm(y) * (1 + scale2) + shift2
    wanted = x + mixer.out_proj(y * torch.nn.functional.silu(gate))
    assert torch.allclose(block(x, which), wanted, atol=1e-6)


def test_conditions_with_equal_rows_give_equal_maps_and_gradients_reach_the_chosen_rows_only():
    model = small().eval()
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x, 0), model(x, 1))
    tables = [m.table for m in model.modules() if isinstance(m, Condition)]
    assert len(tables) == 3  # one for each block of the decoder
    with torch.no_grad():
        for table in tables:
            table[1] = table[0]
    assert torch.equal(model(x, 0), model(x, 1)) and torch.equal(model(x, torch.tensor([0, 1])), model(x, 0))
    model(x, torch.tensor([1, 3])).sum().backward()
    for table in tables:
        assert [bool(row.any()) for row in table.grad] == [False, True, False, True]


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (16, 72)])
def test_any_size_and_one_step_of_training(size):
    model = small(drop_path=0.1).train()
    x = torch.rand(3, 3, *size)
    out = model(x, torch.tensor([0, 1, 2]))
    assert out.shape == (3, 1, *size) and ((out > 0) & (out < 1)).all()
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_it_exports():
    model = small().eval()
    x, which = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    exported = torch.export.export(model, (x, which)).module()
    assert torch.allclose(exported(x, which), model(x, which), atol=1e-5)


def test_bad_input():
    model = small()
    with pytest.raises(ValueError, match="sides that 8 divides"):
        model(torch.randn(1, 3, 12, 32))
    with pytest.raises(ValueError, match="condition must be from 0 to 3"):
        model(torch.randn(1, 3, 8, 8), 4)
    with pytest.raises(ValueError, match="one entry a level"):
        SUM((16, 32), (1,), (1, 1))
    with pytest.raises(ValueError, match="double from level to level"):
        SUM((16, 48), (1, 1), (1, 1))
