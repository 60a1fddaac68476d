"""S052: adapters that attend: their start, by definition, decoding, padding, what they leave frozen."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from glocal.nn.attention_lora import AttentionLoRA, adapters, add_adapters, remove_adapters, streaming


def make(trained=True, d_in=12, d_out=10, **options):
    torch.manual_seed(0)
    layer = AttentionLoRA(nn.Linear(d_in, d_out), **({"rank": 8, "num_heads": 2} | options)).double().eval()
    if trained:
        nn.init.normal_(layer.up.weight)
        if layer.where == "rank":
            nn.init.normal_(layer.v_proj.weight)
    return layer


def x(batch=2, n=9, d=12):
    return torch.randn(batch, n, d, generator=torch.Generator().manual_seed(1), dtype=torch.double)


@pytest.mark.parametrize("where", ["rank", "output"])
def test_at_the_start_it_is_the_frozen_map(where):
    layer = make(trained=False, where=where)
    assert torch.equal(layer(x()), layer.base(x()))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_by_definition(residual, causal):
    layer = make(residual=residual, causal=causal, alpha=4.0)
    z = x() @ layer.down.weight.T
    q, k, v = ((z @ p.weight.T).view(2, 9, 2, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    u = scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
    wanted = layer.base(x()) + 4.0 / 8 * ((z + u if residual else u) @ layer.up.weight.T)
    assert torch.allclose(layer(x()), wanted, atol=1e-12)


def test_at_the_output_slices_of_what_comes_out_are_mixed():
    layer = make(where="output")
    z = layer.down(x())
    q, k = ((p(z)).view(2, 9, 2, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    v = layer.up(z).view(2, 9, 2, 5).transpose(1, 2)
    u = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    assert torch.allclose(layer(x()), layer.base(x()) + 2.0 * (layer.up(z) + u), atol=1e-12)


def test_without_values_it_is_lora():
    """And peft's, where it is installed."""
    layer = make()
    nn.init.zeros_(layer.v_proj.weight)
    wanted = layer.base(x()) + 2.0 * layer.up(layer.down(x()))
    assert torch.allclose(layer(x()), wanted, atol=1e-12)
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], lora_dropout=0.0)
    base = nn.Linear(12, 10)
    base.load_state_dict(layer.base.state_dict())
    theirs = peft.get_peft_model(nn.Sequential(base), config).double().eval()
    inner = theirs.base_model.model[0]
    with torch.no_grad():
        inner.lora_A["default"].weight.copy_(layer.down.weight)
        inner.lora_B["default"].weight.copy_(layer.up.weight)
    assert torch.allclose(layer(x()), theirs(x()), atol=1e-6)


def test_one_token_is_a_linear_map():
    layer = make()
    z = layer.down(x(n=1))
    wanted = layer.base(x(n=1)) + 2.0 * layer.up(z + layer.v_proj(z))
    assert torch.allclose(layer(x(n=1)), wanted, atol=1e-12)


def test_the_future_changes_nothing():
    layer, other = make(), x()
    other[:, 5:] += 1.0
    assert torch.equal(layer(x())[:, :5], layer(other)[:, :5]) and not torch.equal(layer(x()), layer(other))


@pytest.mark.parametrize("cuts", [[1] * 9, [4, 1, 1, 3]])
@pytest.mark.parametrize("where", ["rank", "output"])
def test_pieces_equal_the_whole(cuts, where):
    layer = make(where=where)
    with streaming(layer):
        pieces = torch.cat([layer(part) for part in x().split(cuts, 1)], 1)
        assert layer.state.k.shape == (2, 2, 9, 4)
    assert torch.allclose(pieces, layer(x()), atol=1e-12) and layer.state is None and not layer.streams


def test_padding_on_the_left_is_as_if_it_were_not_there():
    layer = make()
    keys = torch.arange(6) >= torch.tensor([[2], [0]])
    with streaming(layer, keys):
        found = torch.cat([layer(part) for part in x().split([6, 1, 2], 1)], 1)
    assert torch.allclose(found[:1, 2:], layer(x()[:1, 2:]), atol=1e-12)
    assert torch.allclose(found[1:], layer(x()[1:]), atol=1e-12)


def test_dropout_is_of_what_the_adapter_sees():
    layer = make(dropout=0.5).train()
    torch.manual_seed(3)
    found = layer(x())
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x(), 0.5)
    assert torch.allclose(found, layer.base(x()) + make()(dropped) - layer.base(dropped), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype):
    layer = make()
    wanted = layer(x())
    found = layer.to(dtype)(x().to(dtype))
    assert found.dtype == dtype and (found.double() - wanted).abs().max() < 0.05 * wanted.abs().max()
    half = AttentionLoRA(nn.Linear(12, 10, dtype=dtype))
    assert {p.dtype for p in half.parameters()} == {dtype}


def test_derivatives_by_finite_differences():
    layer = make(d_in=5, d_out=4, rank=4)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def run(t, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (t,))

    learned = [p.detach().clone().requires_grad_() for p in layer.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(run, [x(1, 4, 5).requires_grad_(), *learned])


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=40)
    return LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).eval()


def test_a_pretrained_model_adapted_and_restored():
    model, ids = llama(), torch.randint(40, (2, 12))
    before = model(ids).logits
    names = add_adapters(model, rank=4, num_heads=2)
    assert len(names) == 4 and names[0] == "model.layers.0.self_attn.q_proj"
    assert torch.equal(model(ids).logits, before)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("base" not in name and any(name.startswith(n) for n in names) for name in learning)
    counts = {name: sum(p.numel() for p in a.parameters() if p.requires_grad) for name, a in adapters(model)}
    assert all(count == 4 * (32 + 32) + 3 * 16 for count in counts.values())  # r (d_in + d_out) + 3 r^2
    model(ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    remove_adapters(model)
    assert torch.equal(model(ids).logits, before) and not list(adapters(model))


def test_generation_with_a_cache_equals_the_parallel_form():
    model = llama()
    add_adapters(model, rank=4, num_heads=2)
    for _, adapter in adapters(model):
        nn.init.normal_(adapter.up.weight)
        nn.init.normal_(adapter.v_proj.weight)
    ids = torch.randint(1, 40, (2, 7))
    mask = torch.arange(7) >= torch.tensor([[0], [3]])
    with streaming(model, mask):
        found = model.generate(ids, attention_mask=mask.long(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    for row, real in zip(found, mask, strict=True):
        whole = row[int((~real).sum()) :][None]
        best = model(whole).logits[0, -6:-1].argmax(-1)
        assert torch.equal(row[-5:], best)


def test_bad_input():
    with pytest.raises(ValueError, match="rank must be a multiple of num_heads; they were 6 and 4"):
        make(rank=6, num_heads=4)
    with pytest.raises(ValueError, match="where must be 'rank' or 'output'"):
        make(where="input")
    with pytest.raises(ValueError, match="out_features 10 a multiple of num_heads 4"):
        make(where="output", num_heads=4)
    with pytest.raises(ValueError, match=r"x must be \(B, N, 12\): the adapter attends"):
        make()(x()[0])
    with pytest.raises(ValueError, match=r"x must be \(B, N, 12\): the adapter attends"):
        make()(x(d=11))
    for change in (make().merge, make().unmerge):
        with pytest.raises(TypeError, match="cannot be merged"):
            change()
    with pytest.raises(ValueError, match="it has no w_proj"):
        add_adapters(nn.Sequential(nn.Linear(3, 3)), ["w_proj"])
    model = nn.ModuleDict({"q_proj": nn.Linear(12, 8), "o_proj": nn.Linear(8, 7)})
    with pytest.raises(ValueError, match="out_features 7 a multiple of num_heads 4"):
        add_adapters(model, ["q_proj", "o_proj"], where="output")
    assert {type(m) for m in model.values()} == {nn.Linear}
    add_adapters(model, ["q_proj"])
    with pytest.raises(ValueError, match="model has adapters already"):  # q_proj of an adapter is a linear map, too
        add_adapters(model, ["q_proj"])
    with pytest.raises(ValueError, match="must contain layers of kind AttentionLoRA"):
        remove_adapters(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="model has no adapters"), streaming(nn.Linear(3, 3)):
        pass
    layer = make()
    layer.keys = torch.ones(2, 3) > 0
    with pytest.raises(ValueError, match=r"keys must be booleans \(2, 9\)"):
        layer(x())
