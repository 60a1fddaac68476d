"""Where to look: pure geometry, which knows no model and no kernel."""

from glocal.patterns.base import Complement, Intersection, Pattern, Union
from glocal.patterns.boxes import Box, BoxForm, NoBoxForm, Spans
from glocal.patterns.convert import from_flash, from_hf, from_natten
from glocal.patterns.data import Between, Choose, Keys, PerHead, Selected, Where
from glocal.patterns.hilbert import hilbert_order
from glocal.patterns.order import Causal, Full, Prefix, Segments, Sinks, Tokens
from glocal.patterns.schedules import is_global, multiscale_windows
from glocal.patterns.text import parse
from glocal.patterns.windows import Block, Sliding, Strided, Window

__all__ = [
    "Between",
    "Block",
    "Box",
    "BoxForm",
    "Causal",
    "Choose",
    "Complement",
    "Full",
    "Intersection",
    "Keys",
    "NoBoxForm",
    "Pattern",
    "PerHead",
    "Prefix",
    "Segments",
    "Selected",
    "Sinks",
    "Sliding",
    "Spans",
    "Strided",
    "Tokens",
    "Union",
    "Where",
    "Window",
    "from_flash",
    "from_hf",
    "from_natten",
    "hilbert_order",
    "is_global",
    "multiscale_windows",
    "parse",
]
