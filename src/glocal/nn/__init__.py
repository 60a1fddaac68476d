"""Layers with learned weights, one file a mechanism or a close family; all fill in one frame, `Attention`."""

from glocal.nn.block import MLP, Block, DropPath, SwiGLU
from glocal.nn.frame import USES, Attention, Call
from glocal.nn.moba import MixtureOfBlocksAttention
from glocal.nn.rope import Rope
from glocal.nn.window import MultiScaleWindowAttention, SlidingWindowAttention

__all__ = [
    "MLP",
    "USES",
    "Attention",
    "Block",
    "Call",
    "DropPath",
    "MixtureOfBlocksAttention",
    "MultiScaleWindowAttention",
    "Rope",
    "SlidingWindowAttention",
    "SwiGLU",
]
