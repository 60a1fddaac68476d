"""What a decoder keeps of the past: policies, each of them equal to a mask."""

from glocal.cache.base import Cache, FullCache, Kept, replay
from glocal.cache.blocks import BlockCache
from glocal.cache.window import WindowCache

__all__ = ["BlockCache", "Cache", "FullCache", "Kept", "WindowCache", "replay"]
