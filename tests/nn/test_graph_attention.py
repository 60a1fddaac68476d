"""S106: attention over edges against a dense loop, torch_geometric on equal weights, and by what must not change."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from glocal.inspect import reach
from glocal.nn import GraphAttention, cosine_edges, edge_softmax
from tests.peers import geometric


@pytest.fixture
def graph():
    """Nodes, and edges with one to itself and one isolated node."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(9, 6, generator=draw, dtype=torch.double)
    edges = torch.tensor([[0, 1, 2, 3, 4, 4, 5, 6, 7, 7, 3], [1, 0, 1, 2, 4, 5, 4, 2, 6, 0, 0]])
    return x, edges


def layer(*sizes, seed=1, **options):
    torch.manual_seed(seed)
    made = GraphAttention(*sizes, **options).double().eval()
    torch.nn.init.normal_(made.bias)
    return made


def by_loops(made, x, edges):
    """Over a dense mask, node by node and head by head, from the parameters alone."""
    n, mask = len(x), torch.eye(len(x), dtype=torch.bool)
    mask[edges[1], edges[0]] = True
    rows = []
    for i in range(n):
        heads = []
        for head in range(made.num_heads):
            w = made.lin.weight.view(made.num_heads, made.out_dim, -1)[head]
            near = [j for j in range(n) if mask[i, j]]
            raw = [made.att_dst[0, head] @ w @ x[i] + made.att_src[0, head] @ w @ x[j] for j in near]
            scores = torch.stack([e if e > 0 else 0.2 * e for e in raw]).softmax(0)
            heads.append(sum(a * (w @ x[j]) for a, j in zip(scores, near, strict=True)))
        rows.append(torch.cat(heads) if made.concat else torch.stack(heads).mean(0))
    return torch.stack(rows) + made.bias


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_against_loops_over_a_dense_mask(graph, heads, concat):
    x, edges = graph
    made = layer(6, 4, heads, concat=concat)
    x.requires_grad_()
    found, wanted = made(x, edges), by_loops(made, x, edges)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(found)
    inputs = [x, *made.parameters()]
    for mine, theirs in zip(
        *(torch.autograd.grad((out * weights).sum(), inputs) for out in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("loops", [True, False])
def test_against_torch_geometric_on_equal_weights(loops):
    """The published layer: 32 to 3, two heads averaged, from the peer's state dict. An edge twice counts twice."""
    draw = torch.Generator().manual_seed(2)
    x, edges = torch.randn(40, 32, generator=draw, dtype=torch.double), torch.randint(40, (2, 150), generator=draw)
    edges = torch.cat([edges, edges[:, :5]], 1)
    made = GraphAttention(32, 3, 2, self_loops=loops).double()
    with geometric("nn.conv.gat_conv") as library:
        peer = library.GATConv(32, 3, heads=2, concat=False, add_self_loops=loops).double()
        torch.nn.init.normal_(peer.bias)
        made.load_state_dict(peer.state_dict())
        torch.testing.assert_close(made(x, edges), peer(x, edges), rtol=1e-9, atol=1e-9)


def test_without_edges_a_node_is_mapped_alone(graph):
    x, edges = graph
    made, none = layer(6, 4, 2), edges[:, :0]
    wanted = (x @ made.lin.weight.T).unflatten(1, (2, 4)).mean(1) + made.bias
    torch.testing.assert_close(made(x, none), wanted)
    torch.testing.assert_close(layer(6, 4, 2, self_loops=False)(x, none), made.bias.expand(9, -1))


def test_nodes_in_another_order_give_outputs_in_that_order(graph):
    x, edges = graph
    made, order = layer(6, 4, 2), torch.randperm(9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made(x[order], order.argsort()[edges]), made(x, edges)[order])


def test_an_edge_between_components_changes_its_end_alone():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(4), dtype=torch.double)
    apart = torch.tensor([[0, 1, 1, 2, 3, 4, 4, 5], [1, 0, 2, 1, 4, 3, 5, 4]])
    made = layer(5, 3, 2)
    joined = torch.cat([apart, torch.tensor([[2, 3], [3, 2]])], 1)
    changed = (made(x, joined) != made(x, apart)).any(1)
    assert changed.tolist() == [False, False, True, True, False, False]
    # And what reaches what is exactly the edges and the nodes themselves.
    mask = torch.eye(6, dtype=torch.bool)
    mask[joined[1], joined[0]] = True
    assert torch.equal(reach(lambda t: made(t[0], joined)[None], x[None]), mask)


def test_softmax_over_edges():
    to = torch.tensor([2, 0, 2, 2, 0])
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(5), dtype=torch.double)
    found = edge_softmax(scores, to, 4)
    for node in (0, 2):
        torch.testing.assert_close(found[to == node], scores[to == node].softmax(0))
    torch.testing.assert_close(edge_softmax(scores + 1e4, to, 4), found)
    assert torch.autograd.gradcheck(lambda s: edge_softmax(s, to, 4), scores.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(graph, dtype):
    x, edges = graph
    made = layer(6, 4, 2)
    wanted = made(x, edges)
    found = made.to(dtype)(x.to(dtype), edges)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, atol=0.05, rtol=0.05)


def test_dropout_is_of_weights_and_in_training_only(graph):
    x, edges = graph
    made = layer(6, 4, 2, dropout=0.5)
    wanted = made(x, edges)
    torch.testing.assert_close(made(x, edges), wanted)
    made.train()
    torch.manual_seed(0)
    mean = torch.stack([made(x, edges) for _ in range(4000)]).mean(0)
    assert not torch.equal(made(x, edges), wanted)
    torch.testing.assert_close(mean, wanted, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("rows", [1, 3, 1024])
def test_edges_of_alike_nodes_by_loops(rows):
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(6), dtype=torch.double)
    x[4] = 0
    wanted = [(i, j) for i in range(10) for j in range(10) if i != j and float(cosine_similarity(x[i], x[j], 0)) >= 0.5]
    found = cosine_edges(x, 0.5, rows=rows)
    assert list(map(tuple, found.T.tolist())) == wanted and wanted
    assert not bool((found == 4).any())
    assert {(j, i) for i, j in wanted} == set(wanted)
    assert cosine_edges(x[:0], 0.5).shape == (2, 0)


def test_bad_input(graph):
    x, edges = graph
    with pytest.raises(ValueError, match="num_heads must be at least 1; it was 0"):
        GraphAttention(6, 4, 0)
    with pytest.raises(ValueError, match="dropout must be"):
        GraphAttention(6, 4, dropout=1.0)
    made = layer(6, 4)
    with pytest.raises(ValueError, match=r"x must be \(N, 6\); it was \(9, 5\)"):
        made(x[:, :5], edges)
    with pytest.raises(ValueError, match=r"edges must be \(2, E\) of torch.long"):
        made(x, edges.T)
    with pytest.raises(ValueError, match="edges must name nodes 0 to 8; it went from 0 to 9"):
        made(x, torch.tensor([[0], [9]]))
    with pytest.raises(ValueError, match=r"x must be \(N, d\)"):
        cosine_edges(x[0], 0.5)
