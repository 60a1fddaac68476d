"""Steering: make a pretrained language or vision-language model look at the right thing, without training it.

Methods that act inside a model are dataclasses of settings with a ``with`` block: what they change is gone after it,
also after an exception. They find their places in any model of transformers whose language part uses the attention
registry, with batches padded on the left, greedy decoding and sampling, dynamic and static caches.

    with steer.PAINT(model, alpha=0.7):
        model.generate(**inputs)
"""

from glocal.steer.abs import ABS
from glocal.steer.agla import AGLA
from glocal.steer.buckets import AttentionBuckets
from glocal.steer.carve import CARVE
from glocal.steer.compression import Compressor
from glocal.steer.contextual import contextual_scores
from glocal.steer.focus import FocusDirections, FocusOracle, train_directions
from glocal.steer.head_pursuit import HeadScale, head_writes, rank_heads
from glocal.steer.hooks import Hooks, Run, Site
from glocal.steer.matcher import BlipMatcher, Matcher, SelfMatcher
from glocal.steer.method import Method
from glocal.steer.paint import PAINT
from glocal.steer.record import RecordRows
from glocal.steer.red_circle import RedCircle
from glocal.steer.relevance import attention_relevance
from glocal.steer.similarity import GlocalTransform, align
from glocal.steer.sinks import VAR, find_sink_dims
from glocal.steer.spans import SpanMap
from glocal.steer.streaming import StreamingAssistant
from glocal.steer.tower import TowerAttention
from glocal.steer.tracker import VPTracker
from glocal.steer.waveform import search_bases

__all__ = [
    "ABS",
    "AGLA",
    "CARVE",
    "PAINT",
    "VAR",
    "AttentionBuckets",
    "BlipMatcher",
    "Compressor",
    "FocusDirections",
    "FocusOracle",
    "GlocalTransform",
    "HeadScale",
    "Hooks",
    "Matcher",
    "Method",
    "RecordRows",
    "RedCircle",
    "Run",
    "SelfMatcher",
    "Site",
    "SpanMap",
    "StreamingAssistant",
    "TowerAttention",
    "VPTracker",
    "align",
    "attention_relevance",
    "contextual_scores",
    "find_sink_dims",
    "head_writes",
    "rank_heads",
    "search_bases",
    "train_directions",
]
