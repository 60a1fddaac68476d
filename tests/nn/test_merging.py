"""S004: token merging by a loop, and AgentSD in blocks of both namings, taken out again bit for bit."""

import pytest
import torch
from torch import nn

from glocal.nn.agent import agent_attend
from glocal.nn.merging import AgentSD, Phase, match_tokens


def tokens(batch=2, rows=6, columns=8, channels=5):
    torch.manual_seed(0)
    return torch.randn(batch, rows * columns, channels)


def by_loop(x, found, count):
    """Merged by the definition, token by token; the order is that of `Matching`."""
    out = []
    for b in range(len(x)):
        targets = found.targets.tolist()
        sources = [n for n in range(x.shape[1]) if n not in targets]
        best = []
        for s in sources:
            likeness = [float(torch.cosine_similarity(x[b, s], x[b, t], dim=0)) for t in targets]
            best.append((max(likeness), s, likeness.index(max(likeness))))
        best.sort(key=lambda each: -each[0])
        groups = {t: [x[b, t]] for t in targets}
        for _, s, t in best[:count]:
            groups[targets[t]].append(x[b, s])
        stay = [x[b, s] for _, s, _ in best[count:]]
        out.append(torch.stack(stay + [torch.stack(groups[t]).mean(0) for t in targets]))
    return torch.stack(out)


@pytest.mark.parametrize("grid,cell", [((6, 8), 2), ((6, 8), 3), ((7, 5), 2), ((1, 9), 1)])
def test_merged_by_a_loop(grid, cell):
    x = tokens(rows=grid[0], columns=grid[1])
    found = match_tokens(x, grid, cell, generator=torch.Generator().manual_seed(0))
    number = found.sources.shape[1]
    for count in {0, min(1, number), number // 2, number}:
        assert torch.allclose(found.merge(x, count), by_loop(x, found, count), atol=1e-6)


def test_one_target_in_each_cell():
    x = tokens(rows=7, columns=9)
    first = match_tokens(x, (7, 9), 2).targets
    assert first.tolist() == [r * 9 + c for r in (0, 2, 4) for c in (0, 2, 4, 6)]
    chosen = match_tokens(x, (7, 9), 2, generator=torch.Generator().manual_seed(3)).targets
    cells = {(int(t) // 9 // 2, int(t) % 9 // 2) for t in chosen}
    assert cells == {(r, c) for r in range(3) for c in range(4)} and not torch.equal(first, chosen)
    again = match_tokens(x, (7, 9), 2, generator=torch.Generator().manual_seed(3)).targets
    assert torch.equal(chosen, again)


def test_what_was_not_merged_comes_back_exactly_and_the_rest_is_its_target():
    x = tokens()
    found = match_tokens(x, (6, 8), 2)
    back = found.unmerge(found.merge(x, 20))
    for b in range(2):
        gone, into = found.sources[b, :20], found.targets[found.into[b, :20]]
        untouched = [n for n in range(48) if n not in {*gone.tolist(), *into.tolist()}]
        assert len(untouched) >= 48 - 40 and torch.equal(back[b, untouched], x[b, untouched])
        assert torch.equal(back[b, gone], back[b, into])
    assert torch.equal(found.unmerge(found.merge(x, 0)), x)


def test_merging_keeps_the_mean_of_what_it_merges():
    x = tokens(batch=1)
    found = match_tokens(x, (6, 8), 2)
    merged = found.merge(x, 36)
    sizes = 1 + torch.bincount(found.into[0, :36], minlength=12)
    assert torch.allclose((merged[0] * sizes[:, None]).sum(0), x[0].sum(0), atol=1e-5)


def test_similarities_in_parts(monkeypatch):
    x = tokens()
    whole = match_tokens(x, (6, 8), 2)
    monkeypatch.setattr("glocal.nn.merging._AT_ONCE", 50)
    assert all(torch.equal(a, b) for a, b in zip(whole, match_tokens(x, (6, 8), 2), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs(dtype):
    x = tokens().to(dtype)
    found = match_tokens(x, (6, 8), 2)
    wide = match_tokens(x.float(), (6, 8), 2)
    assert torch.equal(found.sources, wide.sources)
    merged = found.merge(x, 20)
    assert merged.dtype == dtype and torch.allclose(merged.float(), wide.merge(x.float(), 20), atol=0.05)


def test_gradients_reach_what_was_merged():
    x = tokens().double().requires_grad_()
    found = match_tokens(x, (6, 8), 2)
    assert torch.autograd.gradcheck(lambda t: found.unmerge(found.merge(t, 20)), x)


def test_bad_inputs():
    x = tokens()
    with pytest.raises(ValueError, match=r"x must be \(B, 42, C\)"):
        match_tokens(x, (6, 7))
    with pytest.raises(ValueError, match="cell must be from 1"):
        match_tokens(x, (6, 8), 7)
    found = match_tokens(x, (6, 8))
    with pytest.raises(ValueError, match="count must be from 0 to 36"):
        found.merge(x, 37)
    with pytest.raises(ValueError, match="matched tokens"):
        found.merge(x[:, 1:], 2)
    with pytest.raises(ValueError, match="K from 12 to 48"):
        found.unmerge(x[:, :11])


# AgentSD, in blocks of our own that are named as those of latent diffusion and of diffusers.


class Attend(nn.Module):
    """Softmax attention with the parts of both; ``listed`` names and wraps them as diffusers does."""

    def __init__(self, dim, heads, listed, context=None):
        super().__init__()
        context = dim if context is None else context
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k, self.to_v = nn.Linear(context, dim, bias=False), nn.Linear(context, dim, bias=False)
        self.to_out = (nn.ModuleList if listed else lambda parts: nn.Sequential(*parts))(
            [nn.Linear(dim, dim), nn.Dropout(0.0)]
        )

    def forward(self, hidden_states, context=None, mask=None):
        context = hidden_states if context is None else context
        q, k, v = (
            to(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for to, t in ((self.to_q, hidden_states), (self.to_k, context), (self.to_v, context))
        )
        scores = q @ k.mT * self.scale
        out = (scores if mask is None else scores + mask).softmax(-1) @ v
        out = out.transpose(1, 2).flatten(2)
        for part in self.to_out:
            out = part(out)
        return out


class TransformerBlock(nn.Module):
    def __init__(self, dim, heads, listed):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn1, self.attn2 = Attend(dim, heads, listed), Attend(dim, heads, listed, context=7)
        self.ff = nn.Sequential(nn.Linear(dim, dim), nn.GELU())

    def forward(self, hidden_states, context, mask=None):
        x = hidden_states + self.attn1(self.norm1(hidden_states), mask=mask)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class UNet(nn.Module):
    """Two blocks on the latent image, one on half of it."""

    def __init__(self, listed=True, dim=16, heads=2):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, dim, 3, padding=1), nn.Conv2d(dim, 4, 3, padding=1)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, listed) for _ in range(2))
        self.low = TransformerBlock(dim, heads, listed)

    def forward(self, sample, context, mask=None, broken=False):
        x = self.first(sample)
        size = x.shape[2:]
        tokens = x.flatten(2).mT
        for block in self.blocks:
            tokens = block(tokens, context, mask)
        x = tokens.mT.unflatten(2, size)
        low = nn.functional.avg_pool2d(x, 2)
        if broken:
            raise KeyError("broken")
        low = self.low(low.flatten(2).mT, context).mT.unflatten(2, low.shape[2:])
        return self.last(x + nn.functional.interpolate(low, size))


def unet(listed=True, size=(8, 8), batch=2):
    torch.manual_seed(0)
    model = UNet(listed).double().eval()
    return model, torch.randn(batch, 4, *size).double(), torch.randn(batch, 3, 7).double()


AGENTS = {0: Phase(4, 0.4, 0.95)}


@pytest.mark.parametrize("listed", [False, True], ids=["latent diffusion", "diffusers"])
@pytest.mark.parametrize("batch", [2, 3])
def test_the_block_by_its_definition(listed, batch):
    model, image, context = unet(listed, (8, 12), batch)
    block, x = model.blocks[0], model.first(image).flatten(2).mT
    generator = torch.Generator().manual_seed(5) if batch == 2 else None
    found = match_tokens(x, (8, 12), 4, generator=generator)
    normed = block.norm1(x)
    merged, agents = found.merge(normed, int(96 * 0.4)), found.merge(normed, 90)  # 6 cells of 16: 6 agents
    assert agents.shape[1] == 6 and merged.shape[1] == 58
    q, k, v, a = (
        to(t).unflatten(-1, (2, 8)).transpose(1, 2)
        for to, t in (
            (block.attn1.to_q, merged),
            (block.attn1.to_k, merged),
            (block.attn1.to_v, merged),
            (block.attn1.to_q, agents),
        )
    )
    gathered = (a @ k.mT * 8**-0.5).softmax(-1) @ v
    out = (q @ a.mT * (8**-0.5) ** 0.3).softmax(-1) @ gathered + 0.075 * v
    y = x + found.unmerge(block.attn1.to_out[0](out.transpose(1, 2).flatten(2)))
    y = y + block.attn2(block.norm2(y), context)
    wanted = y + block.ff(block.norm3(y))
    seen = []
    watch = block.register_forward_hook(lambda *given: seen.append(given[-1]))
    with AgentSD(model, schedule=AGENTS, seed=5):
        model(image, context)
    watch.remove()
    assert torch.allclose(seen[0], wanted, atol=1e-12)


def test_merging_without_agents_is_the_models_own_attention_on_fewer_tokens():
    model, image, context = unet()
    block, x = model.blocks[0], model.first(image).flatten(2).mT
    found = match_tokens(x, (8, 8), 2, generator=torch.Generator().manual_seed(0))
    wanted = found.unmerge(block.attn1(found.merge(block.norm1(x), int(64 * 0.4))))
    seen, was = [], block.attn1.register_forward_hook(lambda *given: seen.append(given[-1]))
    with AgentSD(model, schedule={0: Phase(2, 0.4, 0.5)}):  # 32 would not be fewer than half of 39
        model(image, context)
    was.remove()
    assert torch.equal(seen[0], wanted)


@pytest.mark.parametrize("phase", [Phase(2, 0.0, 0.5), Phase(4, 0.0, 0.0), Phase(2, 0.001, 0.5)])
def test_nothing_merged_and_too_many_agents_is_the_model_bit_for_bit(phase):
    model, image, context = unet()
    with AgentSD(model, schedule={0: phase}):
        found = model(image, context)
    assert torch.equal(found, model(image, context))


def test_agents_without_merging_need_no_order():
    model, image, context = unet()
    attention, x = model.blocks[0].attn1, model.first(image).flatten(2).mT
    normed = model.blocks[0].norm1(x)
    agents = match_tokens(x, (8, 8), 4, generator=torch.Generator().manual_seed(0)).merge(normed, 60)
    q, k, v, a = (
        to(t).unflatten(-1, (2, 8)).transpose(1, 2)
        for name, t in (("to_q", normed), ("to_k", normed), ("to_v", normed), ("to_q", agents))
        for to in (getattr(attention, name),)
    )
    out = agent_attend(q, k, v, a, spread_scale=8**-0.15) + 0.5 * v
    seen, watch = [], attention.register_forward_hook(lambda *given: seen.append(given[-1]))
    with AgentSD(model, schedule={0: Phase(4, 0.0, 0.95)}, shortcut=0.5):
        model(image, context)
    watch.remove()
    assert torch.allclose(seen[0], attention.to_out[0](out.transpose(1, 2).flatten(2)), atol=1e-12)


@pytest.mark.parametrize("broken", [False, True])
def test_it_is_taken_out(broken):
    model, image, context = unet()
    own = lambda *given, **more: Attend.forward(model.blocks[1].attn1, *given, **more)  # noqa: E731
    model.blocks[1].attn1.forward = own  # as accelerate puts one there
    whole = model(image, context)
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    try:
        with AgentSD(model) as sd:
            changed = model(image, context)
            with pytest.raises(RuntimeError, match="already"):
                sd.__enter__()
            model(image, context, broken=broken)
    except KeyError:
        assert broken
    assert not torch.allclose(changed, whole) and torch.equal(model(image, context), whole)
    assert "forward" not in vars(model.blocks[0].attn1) and model.blocks[1].attn1.forward is own
    assert hooks == [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


def test_only_the_finest_blocks_and_only_their_self_attention():
    model, image, context = unet()
    tokens = {}

    def note(name):
        return lambda module, given: tokens.update({name: given[0].shape[1]})

    parts = {"attn1": model.blocks[0].attn1, "attn2": model.blocks[0].attn2, "ff": model.blocks[0].ff}
    watch = [m.to_q.register_forward_pre_hook(note(n)) for n, m in parts.items() if n != "ff"]
    watch += [parts["ff"].register_forward_pre_hook(note("ff"))]
    watch += [model.low.attn1.to_q.register_forward_pre_hook(note("low"))]
    with AgentSD(model, schedule={0: Phase(2, 0.4, 0.5)}):
        model(image, context)
    assert tokens == {"attn1": 64 - 25, "attn2": 64, "ff": 64, "low": 16}
    tokens.clear()
    with AgentSD(model, schedule={0: Phase(2, 0.4, 0.5)}, max_downsample=2):
        model(image, context)
    assert tokens["low"] == 16 - 6
    for each in watch:
        each.remove()


def test_the_schedule_and_its_steps():
    model, image, context = unet()
    plain = model(image, context)
    with AgentSD(model, schedule={1: Phase(4, 0.4, 0.95), 2: Phase(2, 0.4, 0.5)}) as sd:
        outs = [model(image, context) for _ in range(3)]
        assert sd.step == 3
        sd.step = 0
        assert torch.equal(model(image, context), plain)
    assert torch.equal(outs[0], plain)
    assert not torch.allclose(outs[1], plain) and not torch.allclose(outs[2], outs[1])


def test_a_seed_gives_the_same_picture_again():
    model, image, context = unet()
    outs = []
    for seed in (0, 0, 1):
        with AgentSD(model, seed=seed):
            outs.append(model(image, context))
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])


def test_a_grid_that_cells_do_not_divide():
    model, image, context = unet(size=(9, 11))
    with AgentSD(model):
        out = model(image, context)
    assert out.isfinite().all() and not torch.allclose(out, model(image, context))


def test_gradients_flow():
    model, image, context = unet()
    with AgentSD(model):
        model(image, context).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_what_it_refuses():
    model, image, context = unet()
    with pytest.raises(ValueError, match="Linear has none"):
        AgentSD(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="schedule must map"):
        AgentSD(model, schedule={0: Phase(2, 1.0, 0.5)})
    with pytest.raises(ValueError, match="no mask"), AgentSD(model):
        model(image, context, mask=torch.zeros(64, 64).double())
    with pytest.raises(ValueError, match="latent images"), AgentSD(model):
        model(context, context)
    model.blocks[0].attn1.norm_q = nn.Identity()
    with pytest.raises(ValueError, match="does more than project and attend: norm_q"):
        AgentSD(model)
