"""Does adding gated queries and keys place by place do the work of softmax attention, at a fraction of its cost?

    python benchmarks/proofs/s003_casvit.py [--seeds 2] [--steps 250]

scikit-learn's digits enlarged to 32 x 32, networks of four blocks on 8 x 8 tokens: those of CAS-ViT, and the same
with multi-head softmax attention in place of the mixer and a feed-forward that is wider by what the mixer had more.
Test accuracy; then the operations of one mixer on 64 x 64 tokens, counted and not timed: they do not depend on what
else a machine does. Zhang et al., 2024, arXiv 2408.03703.
"""

from __future__ import annotations

import argparse

import torch
from digits_bed import digits, score
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glocal.models.vision.casvit import CASBlock
from glocal.nn import MLP, Attention
from glocal.nn.additive import ConvAdditiveAttention
from glocal.papers.verdict import verdict

DIM, HEADS, DEPTH, BATCH, SIDE = 32, 4, 4, 64, 64


class Net(nn.Module):
    """Tokens of 4 x 4 pixels, four blocks, mean, ten logits."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(1, DIM, 4, stride=4), nn.BatchNorm2d(DIM), nn.ReLU())
        self.blocks = nn.Sequential(*[CASBlock(DIM) for _ in range(DEPTH)])
        for block in self.blocks if softmax else ():
            assert isinstance(block, CASBlock)
            whole = sum(p.numel() for p in block.parameters())
            block.mixer = Attention(DIM, HEADS)
            block.mlp = MLP(DIM, 1)
            block.mlp = MLP(DIM, 1 + round((whole - sum(p.numel() for p in block.parameters())) / (2 * DIM + 1)))
        self.norm, self.head = nn.BatchNorm1d(DIM), nn.Linear(DIM, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.embed(images).movedim(1, -1))
        out: Tensor = self.head(self.norm(x.mean((1, 2))))
        return out


def train(softmax: bool, seed: int, steps: int) -> tuple[float, int]:
    """Accuracy on digits that were not in training, and the network's parameters."""
    images, labels = digits(32)
    cut = len(images) // 3
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Net(softmax)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        picked = cut + torch.randint(len(images) - cut, (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[picked]), labels[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        plan.step()
    model.eval()
    return score(model, images[:cut], labels[:cut]), sum(p.numel() for p in model.parameters())


def cost(layer: nn.Module) -> int:
    """Operations of a forward pass on 64 x 64 tokens."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        layer(torch.randn(1, SIDE, SIDE, DIM))
    return counted.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=250)
    options = parser.parse_args()
    torch.set_num_threads(1)

    layers = {"additive": ConvAdditiveAttention(DIM), "softmax": Attention(DIM, HEADS, backend="sdpa")}
    accuracy, work = {}, {}
    print(f"{'mixer':<10}{'parameters':>12}{'accuracy':>10}{'MFLOP':>10}   each seed's accuracy")
    for name, layer in layers.items():
        found = [train(name == "softmax", seed, options.steps) for seed in range(options.seeds)]
        accuracy[name] = sum(a for a, _ in found) / len(found)
        work[name] = cost(layer.eval())
        each = "  ".join(f"{a:.3f}" for a, _ in found)
        print(
            f"{name:<10}{found[0][1]:>12,}{accuracy[name]:>10.3f}{work[name] / 1e6:>10.1f}   {each}",
            flush=True,
        )
    less = work["softmax"] / work["additive"]
    verdict(
        "casvit",
        f"digits at 32 x 32 with accuracy {accuracy['additive']:.3f}, softmax attention {accuracy['softmax']:.3f} at "
        f"equal parameters; on 64 x 64 tokens {less:.0f} times fewer operations",
        accuracy["additive"] > accuracy["softmax"] - 0.015 and less > 3,
    )


if __name__ == "__main__":
    main()
