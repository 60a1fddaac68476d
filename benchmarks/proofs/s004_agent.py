"""Does agent attention, put into a trained diffusion model without training, disturb it less than other cheap forms?

    python benchmarks/proofs/s004_agent.py [--steps 1200] [--seeds 3]

A small denoiser of digits of 16 x 16 with one softmax attention over all 256 pixels is trained to predict the noise.
Then only that attention is exchanged: for agents, 32 of them made by merging and with the scales of AgentSD; for linear
attention with elu + 1; for softmax over 32 averages of keys and values. The mean squared error on held-out digits over
all noise levels, against softmax. Without its attention the model says how much there is to lose. Han et al., 2024,
arXiv 2312.08874.
"""

from __future__ import annotations

import argparse

import torch
from digits_bed import digits, mean
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from glocal import attend, linear_attend
from glocal.nn.merging import AgentSD, Phase
from glocal.nn.sincos import sincos, sincos_grid
from glocal.papers.verdict import verdict

SIZE, DIM, HEADS, AGENTS, BATCH, TEST = 16, 32, 2, 32, 32, 297
KINDS = ("softmax", "agent", "linear", "pooled", "none")


class Attend(nn.Module):
    """Self-attention in the layout of diffusers; ``kind`` says how it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kind = HEADS, "softmax"
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(DIM, DIM)])

    def forward(self, x: Tensor) -> Tensor:
        parts = (self.to_q(x), self.to_k(x), self.to_v(x))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in parts)
        if self.kind == "linear":
            out = linear_attend(q, k, v)
        elif self.kind == "pooled":
            k, v = (pooled(t) for t in (k, v))
            out = attend(q, k, v)
        else:
            out = attend(q, k, v)
        if self.kind == "none":
            out = torch.zeros_like(out)
        mixed: Tensor = self.to_out[0](out.transpose(1, 2).flatten(2))
        return mixed


def pooled(t: Tensor) -> Tensor:
    """Means over cells of 2 x 4 pixels: ``(B, H, 256, D)`` to 32."""
    cells = t.unflatten(2, (SIZE // 2, 2, SIZE // 4, 4))
    out: Tensor = cells.mean((3, 5)).flatten(2, 3)
    return out


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(DIM), Attend()
        self.norm2, self.ff = nn.LayerNorm(DIM), nn.Sequential(nn.Linear(DIM, 128), nn.GELU(), nn.Linear(128, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        out: Tensor = x + self.ff(self.norm2(x))
        return out


class Denoiser(nn.Module):
    """Pixels of a noisy image, and the level of the noise, to the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.level = nn.Conv2d(1, DIM, 3, padding=1), nn.Linear(DIM, DIM)
        self.places = nn.Parameter(sincos_grid(SIZE, SIZE, DIM))
        self.block = TransformerBlock()
        self.out = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 1))

    def forward(self, image: Tensor, t: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).mT + self.places + self.level(sincos(1000 * t, DIM))[:, None]
        out: Tensor = self.out(self.block(x)).mT.view_as(image)
        return out


def noisy(images: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """At level ``t`` from 0 to 1, by a cosine."""
    angle = t[:, None, None, None] * torch.pi / 2
    return images * angle.cos() + noise * angle.sin()


def trained(images: Tensor, steps: int, seed: int) -> Denoiser:
    torch.manual_seed(seed)
    model, draw = Denoiser(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        some = images[torch.randint(len(images), (BATCH,), generator=draw)]
        t, noise = torch.rand(BATCH, generator=draw), torch.randn(some.shape, generator=draw)
        mse_loss(model(noisy(some, t, noise), t), noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def error(model: Denoiser, images: Tensor, kind: str) -> float:
    """Mean squared error of the predicted noise, the same noise for every kind."""
    draw, attention = torch.Generator().manual_seed(1), model.block.attn1
    attention.kind = "softmax" if kind == "agent" else kind
    found = []
    for some in images.split(BATCH):
        some = some[: len(some) // 2 * 2]
        t, noise = torch.rand(len(some), generator=draw), torch.randn(some.shape, generator=draw)
        if kind == "agent":
            # 256 tokens are merged to 32 for the agents; queries, keys and values stay as many as they were.
            with AgentSD(model, schedule={0: Phase(3, 0.0, 1 - AGENTS / SIZE**2)}):
                shown = model(noisy(some, t, noise), t)
        else:
            shown = model(noisy(some, t, noise), t)
        found.append((shown - noise).square().mean())
    attention.kind = "softmax"
    return float(torch.stack(found).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images, _ = digits(SIZE)
    errors: dict[str, list[float]] = {kind: [] for kind in KINDS}
    print("error of the noise" + "".join(f"{kind:>10}" for kind in KINDS))
    for seed in range(arguments.seeds):
        model = trained(images[TEST:], arguments.steps, seed)
        for kind in KINDS:
            errors[kind].append(error(model, images[:TEST], kind))
        print(f"seed {seed:<13}" + "".join(f"{errors[kind][-1]:10.4f}" for kind in KINDS), flush=True)
    more = {kind: mean(errors[kind]) / mean(errors["softmax"]) - 1 for kind in KINDS}
    print("more than softmax " + "".join(f"{more[kind]:>+10.1%}" for kind in KINDS))
    verdict(
        "agent",
        f"error of the noise {mean(errors['softmax']):.4f} by softmax; exchanged without training: agents "
        f"{more['agent']:+.1%}, linear {more['linear']:+.1%}, pooled keys {more['pooled']:+.1%}, no attention "
        f"{more['none']:+.1%}",
        more["agent"] <= 0.15 and more["agent"] < min(more["linear"], more["pooled"]),
    )


if __name__ == "__main__":
    main()
