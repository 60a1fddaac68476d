"""Models that draw: what frames see of each other, halting, rounding, and on whose frames they are trained."""

import copy

import pytest
import torch
from torch import nn

import glocal
from glocal.models.vision.scratchpad import Drawn, ScratchpadViT
from glocal.models.vision.scratchpad_training import draw_next, nearest_colour, scratchpad_loss

from .networks import assert_a_step_changes, assert_exports

KINDS = ("none", "single", "multi", "inductive")


def tiny(kind, **options):
    torch.manual_seed(0)
    frames = {"frames": 4} if kind == "multi" else {}
    model = glocal.create("scratchpad_vit_tiny", scratchpad=kind, size=32, **(frames | options))
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    return model


def inputs(kind, batch=2, dtype=torch.float32):
    shape = (batch, 3, 3, 32, 32) if kind == "multi" else (batch, 3, 32, 32)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def plain_loss(out):
    return sum(t.square().mean() for t in out if t is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_learn_and_halves_work(kind):
    model = tiny(kind)
    out = model(inputs(kind))
    plain_loss(out).backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() and p.grad.any()
        for p in model.parameters()
        if p is not model.time
    )
    assert_a_step_changes(model)
    assert (out.frame is None) == (kind == "none") and (out.halt is None) == (kind != "inductive")
    half = copy.deepcopy(model).bfloat16()(inputs(kind, dtype=torch.bfloat16))
    assert half.label.dtype == torch.bfloat16 and half.label.isfinite().all()


def test_export():
    class Label(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny("none").eval()

        def forward(self, x):
            return self.model(x).label

    assert_exports(Label(), inputs("none"))


def test_frames_do_not_see_later_ones():
    """Changing frame t + 1 leaves what comes of frames up to t; changing frame 0 changes all."""
    model, x = tiny("multi").double(), inputs("multi", dtype=torch.float64)
    for t in range(3):
        other = x.clone()
        other[:, t] = 1 - other[:, t]
        a, b = model(x), model(other)
        for one, two in ((a.label, b.label), (a.frame, b.frame)):
            moved = (one - two).flatten(2).abs().amax((0, 2))
            assert (moved[:t] < 1e-6).all() and (moved[t:] > 1e-6).all()


def test_frames_are_the_dense_mask():
    """The blocks against softmax under a mask over flattened tokens."""
    model, x = tiny("multi", depth=1).double(), torch.randn(2, 3, 5, 48).double()
    layer = model.blocks[0].attention
    flat = x.flatten(1, 2)
    frame = torch.arange(15) // 5
    mask = frame[:, None] >= frame
    q, k, v = (p(flat).unflatten(-1, (4, 12)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    weights = (q @ k.mT / 12**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    wanted = layer.o_proj((weights @ v).transpose(1, 2).flatten(2)).view_as(x)
    torch.testing.assert_close(layer(x), wanted)


def test_one_frame_of_many_is_a_single_scratchpad():
    many, one = tiny("multi", frames=1), tiny("single")
    state = {name: value for name, value in many.state_dict().items() if name != "time"}
    one.load_state_dict(state)
    many.time.data.zero_()
    x = inputs("single")
    torch.testing.assert_close(many(x[:, None]).frame[:, 0], one(x).frame)
    torch.testing.assert_close(many(x[:, None]).label[:, 0], one(x).label)


def test_patches_are_put_back_where_they_came_from():
    """A stem that cuts patches and a head that gives them back make the picture."""
    model = ScratchpadViT(3 * 64, 0, 1, scratchpad="single", size=24, patch=8).double()

    class Cut(nn.Module):
        def forward(self, x):
            return nn.functional.unfold(x, 8, stride=8).unflatten(-1, (3, 3))

    model.stem, model.norm = Cut(), nn.Identity()
    for p in (model.place, model.token, model.pixels.bias):
        p.data.zero_()
    model.pixels.weight.data.copy_(torch.eye(3 * 64))
    x = torch.rand(2, 3, 24, 24).double()
    torch.testing.assert_close(model(x).frame, x)


class Counter(ScratchpadViT):
    """Adds 1 to each picture and halts at 3; its label is what it was given."""

    def forward(self, frames):
        value = frames[:, 0, 0, 0]
        return Drawn(torch.stack([value, -value], 1), frames + 1.2, value - 2.5)


def test_roll_out_halts_rounds_and_is_capped():
    model = Counter(8, 0, 1, size=16)
    start = torch.tensor([0.0, 2.0, 5.0, -9.0]).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    found = model.roll_out(start, lambda drawn, before: drawn.floor(), cap=5)
    assert found.steps.tolist() == [3, 1, 0, 5] and found.halted.tolist() == [True, True, True, False]
    assert found.frame[:, 0, 0, 0].tolist() == [3, 3, 5, -4] and found.label[:, 0].tolist() == [3, 3, 5, -4]
    none = model.roll_out(start, lambda drawn, before: drawn, cap=0)
    assert none.steps.tolist() == [0] * 4 and torch.equal(none.frame, start)
    drifted = model.roll_out(start, lambda drawn, before: drawn, cap=5)
    assert float(drifted.frame[0, 0, 0, 0]) == pytest.approx(3.6)  # without rounding


def test_roll_out_of_many_frames_is_one_pass_over_them():
    model, settle = tiny("multi"), nearest_colour(torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 0, 1]]))
    start = inputs("none")
    found = model.roll_out(start, settle, cap=3)
    frames = [start]
    for _ in range(3):
        frames.append(settle(model(torch.stack(frames, 1)).frame[:, -1]))
    torch.testing.assert_close(found.frame, frames[-1])
    torch.testing.assert_close(found.label, model(torch.stack(frames, 1)).label[:, -1])
    assert not found.halted.any() and found.steps.tolist() == [3, 3]


def test_nearest_colour_by_loops():
    palette = torch.rand(5, 3)
    x = torch.rand(2, 3, 4, 6)
    got = nearest_colour(palette)(x)
    for b in range(2):
        for i in range(4):
            for j in range(6):
                best = min(palette, key=lambda c: float((c - x[b, :, i, j]).norm()))
                assert torch.equal(got[b, :, i, j], best)


def test_own_frames_are_only_where_asked():
    model = tiny("inductive")
    before, frame = inputs("none", 4), torch.rand(4, 3, 32, 32)
    settle = nearest_colour(torch.eye(3))
    own = torch.tensor([True, False, True, False])
    made = draw_next(model, before, frame, settle, own)
    torch.testing.assert_close(made[~own], frame[~own])
    torch.testing.assert_close(made[own], settle(model(before).frame)[own])
    assert not made.requires_grad
    assert draw_next(model, before, frame, settle, ~own & own) is frame


def test_losses():
    logits, frame, halt = torch.randn(3, 2), torch.rand(3, 3, 4, 4), torch.randn(3)
    labels, target, last = torch.tensor([0, 1, 1]), torch.rand(3, 3, 4, 4), torch.tensor([True, False, True])
    nats = -logits.log_softmax(-1)[torch.arange(3), labels]
    squared = (frame - target).square().mean()
    stop = -torch.where(last, halt.sigmoid().log(), (-halt).sigmoid().log()).mean()
    torch.testing.assert_close(scratchpad_loss(Drawn(logits, None, None), labels), nats.mean())
    torch.testing.assert_close(
        scratchpad_loss(Drawn(logits, frame, None), labels, target, weight=2), nats.mean() + 2 * squared
    )
    wanted = (nats[0] + nats[2]) / 2 + stop + squared
    torch.testing.assert_close(scratchpad_loss(Drawn(logits, frame, halt), labels, target, last), wanted)
    many = Drawn(torch.stack([torch.randn(3, 2), logits], 1), frame[:, None], None)
    torch.testing.assert_close(scratchpad_loss(many, labels, target[:, None]), nats.mean() + squared)


def test_sizes_are_those_of_vision_transformers():
    """ViT-S/16 has 22.05 million parameters with 1,000 classes; here the head has 2 and there is a pixel head."""
    model = glocal.create("scratchpad_vit_s16", scratchpad="none", classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 22_050_664


def test_bad_input():
    with pytest.raises(ValueError, match=r"scratchpad must be 'none', .*; it was 'some'"):
        ScratchpadViT(8, 1, 1, scratchpad="some")
    with pytest.raises(ValueError, match="size must be a multiple of patch 16; it was 30"):
        ScratchpadViT(8, 1, 1, size=30)
    with pytest.raises(ValueError, match="frames must be 1, or more with scratchpad 'multi'; it was 3"):
        ScratchpadViT(8, 1, 1, frames=3)
    with pytest.raises(ValueError, match=r"frames must be \(B, up to 4, 3, 32, 32\) with scratchpad 'multi'"):
        tiny("multi")(torch.rand(1, 5, 3, 32, 32))
    with pytest.raises(ValueError, match=r"frames must be \(B, 3, 32, 32\) .*; it was \(1, 1, 32, 32\)"):
        tiny("single")(torch.rand(1, 1, 32, 32))
    settle = nearest_colour(torch.eye(3))
    with pytest.raises(ValueError, match="roll_out needs scratchpad 'multi' or 'inductive'; it was 'single'"):
        tiny("single").roll_out(inputs("none"), settle)
    with pytest.raises(ValueError, match="cap must be from 0, and below frames 4 with 'multi'; it was 4"):
        tiny("multi").roll_out(inputs("none"), settle, cap=4)
    with pytest.raises(ValueError, match=r"x must be frames of tokens, \(B, T, N, 48\); it was \(1, 5, 48\)"):
        tiny("multi").blocks[0].attention(torch.rand(1, 5, 48))
    with pytest.raises(ValueError, match="target must be given for models that draw"):
        scratchpad_loss(tiny("single")(inputs("none")), torch.tensor([0, 1]))
