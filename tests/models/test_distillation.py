"""S094: what is exchanged, what learns, and the three losses by hand; and the small denoiser that is taught on."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import glocal
from glocal.models.distillation import Distillation, replace_layers
from glocal.models.vision.denoiser import Denoiser, noised
from glocal.nn import MLP, Attention, Block, DeltaConv
from glocal.nn.sincos import sincos
from tests.models.networks import assert_a_step_changes

# The denoiser.


def denoiser(depth=2, **options):
    torch.manual_seed(0)
    return Denoiser(16, depth, 2, **options).double()


def given(size=(6, 5), batch=3):
    torch.manual_seed(1)
    x, noise = torch.randn(2, batch, 1, *size).double()
    return x, torch.rand(batch).double(), noise


def test_noise_leaves_the_variance_and_levels_are_in_order():
    clean, noise = torch.randn(2, 5, 1, 200, 200).double().unbind()
    x = noised(clean, torch.linspace(0, 1, 5).double(), noise)
    assert torch.allclose(x[0], clean[0]) and torch.allclose(x[4], noise[4])
    assert x.var((1, 2, 3)).tolist() == pytest.approx([1.0] * 5, abs=0.05)
    like = [float(torch.corrcoef(torch.stack([x[i].flatten(), noise[i].flatten()]))[0, 1]) for i in range(5)]
    assert like == sorted(like)


def test_what_the_denoiser_says_depends_on_image_level_and_place():
    model, (x, time, _) = denoiser(), given()
    out = model(x, time)
    assert out.shape == x.shape and torch.allclose(out[:1], model(x[:1], time[:1]))
    assert not torch.allclose(model(x, time + 0.1), out, atol=1e-4)
    moved = model(x.roll(2, 3), time).roll(-2, 3)
    assert not torch.allclose(moved, out, atol=1e-3)
    far = x.clone()
    far[:, :, 5, 4] += 1
    assert not torch.allclose(model(far, time)[:, :, 0, 0], out[:, :, 0, 0], atol=1e-6)


def test_the_denoiser_learns_everywhere_and_exports():
    model, (x, time, noise) = denoiser(channels=1), given()
    mse_loss(model(x, time), noise).backward()
    names = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert names == []
    assert_a_step_changes(model)
    program = torch.export.export(model, (x, time)).module()
    assert torch.allclose(program(x, time), model(x, time))
    assert isinstance(glocal.create("denoiser_tiny", depth=2), Denoiser)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_denoiser_in_half_precision(dtype):
    model, (x, time, _) = denoiser(), given()
    wanted = model(x, time)
    found = model.to(dtype)(x.to(dtype), time)
    assert found.dtype == dtype and torch.allclose(found.double(), wanted, atol=0.05)


def test_bad_settings_of_the_denoiser():
    with pytest.raises(ValueError, match="dim must be a multiple of 4 for each of num_heads, 2; it was 12"):
        Denoiser(12, 1, 2)
    with pytest.raises(ValueError, match="num_heads, 0"):
        Denoiser(12, 1, 0)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        Denoiser(8, 0, 1)
    model, (x, time, _) = denoiser(), given()
    with pytest.raises(ValueError, match=r"x must be images \(B, 1, H, W\)"):
        model(x[:, 0], time)
    with pytest.raises(ValueError, match=r"time must be levels \(3,\)"):
        model(x, time[:2])


# Distillation.


def conv(name, layer):
    return DeltaConv(layer.dim, 3).double()


def shaken(teacher=None, **options):
    """A distillation whose new layers are not zero."""
    torch.manual_seed(2)
    run = Distillation(denoiser() if teacher is None else teacher, conv, **options)
    for p in run.learned():
        nn.init.normal_(p, std=0.3)
    return run


def test_only_what_is_chosen_is_exchanged():
    model = denoiser(3)
    rest = {name: t for name, t in model.state_dict().items() if ".attention." not in name}
    found = replace_layers(model, lambda name, layer: None if name.startswith("blocks.1") else conv(name, layer))
    assert found == ["blocks.0.attention", "blocks.2.attention"]
    assert [type(block.attention) for block in model.blocks] == [DeltaConv, Attention, DeltaConv]
    assert all(model.state_dict()[name] is t or torch.equal(model.state_dict()[name], t) for name, t in rest.items())


def test_gradients_are_on_the_new_layers_only():
    run, (x, time, noise) = shaken(), given()
    run(x, time, target=noise).total.backward()
    for name, p in run.named_parameters():
        new = name.startswith("student.") and ".attention." in name
        assert p.requires_grad == new and (p.grad is not None and p.grad.abs().max() > 0) == new, name
    assert sum(p.numel() for p in run.learned()) == 2 * sum(p.numel() for p in DeltaConv(16, 3).parameters())


def test_the_teacher_stays_what_it_was_and_the_student_has_the_rest_of_it():
    teacher = denoiser()
    before, (x, time, noise) = copy.deepcopy(teacher), given()
    run = shaken(teacher)
    optimizer = torch.optim.SGD(run.parameters(), 0.1)
    run(x, time, target=noise).total.backward()
    optimizer.step()
    assert torch.equal(teacher(x, time), before(x, time))
    student = run.student.state_dict()
    for name, t in before.state_dict().items():
        if ".attention." not in name:
            assert torch.equal(student[name], t) and student[name].data_ptr() != teacher.state_dict()[name].data_ptr()


def states(model, x, time):
    """Output and the states after each attention's residual, block by block."""
    t, after = model.embed(x).permute(0, 2, 3, 1) + model.time(sincos(1000 * time, 16).double())[:, None, None], []
    for block in model.blocks:
        t = t + block.attention(block.norm1(t))
        after.append(t)
        t = t + block.mlp(block.norm2(t))
    return model.head(model.norm(t)).permute(0, 3, 1, 2), after


@pytest.mark.parametrize("weights", [{}, dict(noise=0.0, output=2.0, features=0.5)])
def test_the_losses_by_hand(weights):
    run, (x, time, noise) = shaken(**weights), given()
    (mine, my_states), (theirs, their_states) = states(run.student, x, time), states(run.teacher, x, time)
    found = run(x, time, target=noise)
    parts = ((mine - noise).square().mean(), (mine - theirs).square().mean())
    far = sum((a - b).square().mean() for a, b in zip(my_states, their_states, strict=True))
    assert torch.allclose(torch.stack(found[:3]), torch.stack([*parts, far])) and found.features > 1e-3
    factors = (1.0, 1.0, 0.001) if not weights else (0.0, 2.0, 0.5)
    assert torch.allclose(found.total, factors[0] * parts[0] + factors[1] * parts[1] + factors[2] * far)


def test_each_output_loss_reaches_the_student():
    """In the published training of Stable Diffusion 1.5 the teacher's output stands in the student's place."""
    for weights in (dict(noise=1.0, output=0.0, features=0.0), dict(noise=0.0, output=1.0, features=0.0)):
        run, (x, time, noise) = shaken(**weights), given()
        run(x, time, target=noise).total.backward()
        assert all(p.grad.abs().max() > 0 for p in run.learned())


def test_a_copy_of_the_attention_is_at_no_distance():
    run, (x, time, noise) = Distillation(denoiser(), lambda name, layer: copy.deepcopy(layer)), given()
    found = run(x, time, target=noise)
    assert found.output == 0 and found.features == 0 and found.noise > 0


def test_only_new_layers_train_and_hooks_are_gone():
    def dropping(name, layer):
        return nn.Sequential(conv(name, layer), nn.Dropout(0.5))

    teacher = denoiser()
    teacher.blocks[0].mlp.drop.p = 0.5
    run, (x, time, noise) = Distillation(teacher, dropping), given()
    assert run.training and run.student.blocks[0].attention[1].training
    assert not run.student.blocks[0].mlp.training and not teacher.blocks[0].mlp.training
    run.eval()
    assert not run.student.blocks[0].attention[1].training
    with pytest.raises(ValueError, match="time must be levels"):
        run(x, time[:1], target=noise)
    assert not any(m._forward_pre_hooks for m in run.modules())


def test_tokens_in_a_row_and_states_of_one_s_own_choice():
    class Rows(nn.Module):
        """Without a `norm2`."""

        def __init__(self):
            super().__init__()
            self.mix, self.last = Attention(8, 2), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(x + self.mix(x))

    def make(name, layer):
        return DeltaConv(layer.dim, 3, grid=(3, 4))

    run = Distillation(Rows(), make, hidden=["last"])
    x = torch.randn(2, 12, 8)
    found = run(x, target=x)
    assert torch.allclose(found.features, (run.teacher.mix(x) - run.student.mix(x)).square().mean())
    assert Distillation(Rows(), make, hidden=[])(x, target=x).features == 0
    with pytest.raises(ValueError, match="hidden must name modules of Rows, such as a norm; 'norm2' is none"):
        Distillation(Rows(), make)


def test_bad_settings():
    with pytest.raises(ValueError, match="model must contain layers of kind Attention; it was a Linear without"):
        Distillation(nn.Linear(2, 2), conv)
    with pytest.raises(ValueError, match="model must contain layers of kind Attention"):
        replace_layers(Attention(8, 2), conv)
    with pytest.raises(ValueError, match="make must give a module"):
        Distillation(denoiser(), lambda name, layer: None)
    with pytest.raises(ValueError, match="features must not be negative; it was -1"):
        Distillation(denoiser(), conv, features=-1)

    class Unused(Block):
        def forward(self, x):
            return x + self.attention(x)

    run = Distillation(Unused(8, Attention(8, 2), MLP(8, 8)), lambda name, layer: DeltaConv(8, 3))
    x = torch.randn(1, 3, 3, 8)
    with pytest.raises(ValueError, match="'norm2' was not called"):
        run(x, target=x)
