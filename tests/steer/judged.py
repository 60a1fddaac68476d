"""Features, and judgments of people about them, by a rule."""

import torch


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_triplets(objects, count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(objects, generator=draw)[:3] for _ in range(count)])


def planted(objects=60, dim=16, count=1500, seed=0):
    """Features of which only the first quarter decides what people say, and those triplets, in people's order."""
    x = normal(objects, dim, seed=seed)
    triplets = some_triplets(objects, count, seed)
    alike = x[:, : dim // 4] @ x[:, : dim // 4].T
    pairs = torch.stack([alike[triplets[:, a], triplets[:, b]] for a, b in ((0, 1), (0, 2), (1, 2))], 1)
    orders = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 2, 0]])
    return x, triplets.gather(1, orders[pairs.argmax(1)])
