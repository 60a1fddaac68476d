"""What a decoder keeps of the past: policies, each of them equal to a mask."""

from glocal.cache.base import Cache, FullCache, Kept, replay
from glocal.cache.blocks import BlockCache
from glocal.cache.compressed import CompressedCache
from glocal.cache.cores import CoreCache
from glocal.cache.descriptors import DescriptorCache
from glocal.cache.dilated import DilatedWindowCache
from glocal.cache.heavy import HeavyHitters
from glocal.cache.latents import LatentCache
from glocal.cache.queries import QueryCache
from glocal.cache.roles import TokenRoles
from glocal.cache.rows import BlockRowCache
from glocal.cache.selected import BestTokens, SelectedTokens
from glocal.cache.state import StateCache
from glocal.cache.window import WindowCache

__all__ = [
    "BestTokens",
    "BlockCache",
    "BlockRowCache",
    "Cache",
    "CompressedCache",
    "CoreCache",
    "DescriptorCache",
    "DilatedWindowCache",
    "FullCache",
    "HeavyHitters",
    "Kept",
    "LatentCache",
    "QueryCache",
    "SelectedTokens",
    "StateCache",
    "TokenRoles",
    "WindowCache",
    "replay",
]
