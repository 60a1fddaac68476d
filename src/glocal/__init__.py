"""Local-global attention for PyTorch: which keys each query looks at, computed exactly and fast.

>>> import torch, glocal
>>> q = k = v = torch.randn(1, 8, 1024, 64)
>>> glocal.attend(q, k, v, glocal.Sliding(255, 0) | glocal.Prefix(4)).shape
torch.Size([1, 8, 1024, 64])
"""

from glocal.attention import Explanation, attend, explain, merge
from glocal.linear import linear_attend
from glocal.models import create
from glocal.patterns import (
    Between,
    Block,
    Causal,
    Choose,
    Full,
    Keys,
    Pattern,
    PerHead,
    Prefix,
    Segments,
    Selected,
    Sinks,
    Sliding,
    Strided,
    Tokens,
    Where,
    Window,
    parse,
)

__version__ = "0.1.0"

__all__ = [
    "Between",
    "Block",
    "Causal",
    "Choose",
    "Explanation",
    "Full",
    "Keys",
    "Pattern",
    "PerHead",
    "Prefix",
    "Segments",
    "Selected",
    "Sinks",
    "Sliding",
    "Strided",
    "Tokens",
    "Where",
    "Window",
    "attend",
    "create",
    "explain",
    "linear_attend",
    "merge",
    "parse",
]
