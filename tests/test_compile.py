"""torch.compile without a graph break: the same numbers and gradients as eager."""

import shutil

import pytest
import torch

import glocal
from glocal import Block, Causal, Full, Keys, Prefix, Sliding, Strided, Window
from glocal.scores import RelativePosition
from tests.conformance.cases import inputs, run

CASES = [
    (Full(), (9,), (9,)),
    (Causal(), (9,), (9,)),
    (Causal(), (4,), (9,)),
    (Sliding(3, 0), (9,), (9,)),
    (Sliding(2, 1) | Prefix(1), (9,), (9,)),
    (Window((3, 3)), (5, 7), (5, 7)),
    (Window(3, dilation=2, causal=(True, False)), (6, 7), (6, 7)),
    (Block(2) & ~Strided(2), (5, 3), (5, 3)),
]


def both(function, tensors, compiler="aot_eager"):
    """Outputs and gradients, eager and compiled: by default with ahead-of-time autograd, without generated code."""
    torch._dynamo.reset()
    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend=compiler)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        outs = call(*leaves)
        loss = sum(out.sin().sum() for out in (outs if isinstance(outs, tuple) else (outs,)))
        results.append((outs, torch.autograd.grad(loss, leaves)))
    return results


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@pytest.mark.parametrize(("where", "grid_q", "grid_k"), CASES, ids=repr)
def test_compiled_equals_eager(where, grid_q, grid_k, backend):
    def attention(q, k, v):
        return glocal.attend(q * 1.5, k, v, where, backend=backend) + 1

    eager, compiled = both(attention, inputs(grid_q, grid_k, heads=4, kv_heads=2))
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", [Full(), Sliding(3, 0)], ids=repr)
def test_with_the_log_sum_exp_and_merge(where):
    # Patterns are made outside: the compiler cannot trace ``~``.
    here, elsewhere = where & Prefix(4), where & ~Prefix(4)

    def attention(q, k, v):
        near = glocal.attend(q, k, v, here, return_lse=True, backend="sdpa")
        far = glocal.attend(q, k, v, elsewhere, return_lse=True, backend="sdpa")
        return glocal.merge([near, far], return_lse=True)

    eager, compiled = both(attention, inputs((9,)))
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


def test_with_padding_that_comes_as_a_tensor():
    real = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])

    def attention(q, k, v):
        return glocal.attend(q, k, v, Sliding(3, 0) & Keys(real), backend="sdpa")

    eager, compiled = both(attention, inputs((9,), batch=2))
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


def test_with_a_learned_bias():
    def attention(q, k, v, values):
        return glocal.attend(q, k, v, Window(3), bias=RelativePosition(values), softcap=5.0, backend="sdpa")

    values = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    eager, compiled = both(attention, [*inputs((5, 4)), values])
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "native"])
def test_generated_code(backend):
    """With torch's code generator, which trusts the strides that operators promise, on heads-last tensors."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch's code generator needs a C++ compiler")
    where = Sliding(3, 0)
    run(backend, *inputs((9,)), where)  # skips where the backend cannot run

    def attention(q, k, v):
        return glocal.attend(*(t.transpose(1, 2) for t in (q, k, v)), where, backend=backend).transpose(1, 2) * 2

    tensors = [t.transpose(1, 2).contiguous() for t in inputs((9,), heads=4, kv_heads=2)]
    eager, compiled = both(attention, tensors, "inductor")
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


def test_a_pattern_that_does_not_fit_is_an_error_while_compiled_too():
    attention = torch.compile(lambda q: glocal.attend(q, q, q, Window(9), backend="sdpa"), backend="aot_eager")
    with pytest.raises(Exception, match="size of Window"):
        attention(inputs((5,))[0])
