"""Peers that must not be on the path: libraries in a folder of their own, imported from there for a test.

`make test` puts them into ``peers`` inside the virtual environment; the environment variable GLOCAL_PEERS names
another folder. Where a peer is not there, or cannot be loaded, its tests are skipped and say so.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

__all__ = ["geometric", "load_fla", "load_kvpress", "load_port", "load_timm"]

FOLDER = Path(os.environ.get("GLOCAL_PEERS", Path(sys.prefix) / "peers"))

_PORTS = (
    "agent-attention-pytorch",
    "linear-attention-transformer",
    "axial-positional-embedding",
    "linformer",
    "taylor-series-linear-attention",
    "rotary-embedding-torch",
    "gaussian-adaptive-attention",
    "multimatch-gaze",
)
_TOPS = (
    "fla",
    "kvpress",
    "timm",
    "torchvision",
    "product_key_memory",
    "torch_geometric",
    *(name.replace("-", "_") for name in _PORTS),
)
_HELD: dict[str, ModuleType] = {}  # what was imported from there so far; out of sys.modules between loads
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def load_timm(name: str) -> ModuleType:
    """The module ``timm.<name>``."""
    with _peers("timm torchvision==0.28.0"):
        _import_torchvision()
        return importlib.import_module(f"timm.{name}")


def load_fla(name: str) -> ModuleType:
    """The module ``fla.<name>`` of flash-linear-attention, which must be pure torch; no package's own code runs.

    Triton's kernels stay away: the mean over chunks, all that a module of definitions takes from them, is ours.
    """
    with _peers("fla-core"):
        _bare("fla", "fla.ops", "fla.ops.nsa", "fla.ops.utils")
        pooling = sys.modules["fla.ops.utils.pooling"] = ModuleType("fla.ops.utils.pooling")
        vars(pooling)["mean_pooling"] = _chunk_means
        vars(sys.modules["fla.ops.utils"])["prepare_chunk_offsets"] = None
        return importlib.import_module(f"fla.{name}")


def load_kvpress(name: str) -> ModuleType:
    """The module ``kvpress.<name>``, without the whole package, which asks for an older transformers."""
    with _peers("kvpress"):
        _bare("kvpress", "kvpress.presses")
        return importlib.import_module(f"kvpress.{name}")


@contextmanager
def geometric(name: str) -> Iterator[ModuleType]:
    """The module ``torch_geometric.<name>``, for as long as it is used: it imports more when its layers are made.

    What it asks for to download data sets stays away.
    """
    with _peers("torch_geometric"):
        absent = {part: ModuleType(part) for part in ("requests", "xxhash") if not importlib.util.find_spec(part)}
        sys.modules.update(absent)
        try:
            yield importlib.import_module(f"torch_geometric.{name}")
        finally:
            for part in absent:
                del sys.modules[part]


def load_port(name: str) -> ModuleType:
    """A module of one of the small packages above, which are one paper each.

    No package's own code runs: it would ask for more packages. Product-key memories, of which only the name is
    imported, stay away.
    """
    with _peers(" ".join(_PORTS)):
        _bare(name.split(".")[0])
        vars(sys.modules.setdefault("product_key_memory", ModuleType("product_key_memory")))["PKM"] = None
        return importlib.import_module(name)


@contextmanager
def _peers(packages: str) -> Iterator[None]:
    """Imports find the folder of peers; afterwards nothing of it is importable, and no other test changes with it."""
    import transformers  # noqa: F401  it looks for torchvision when it is first imported, and must not find this one

    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in _TOPS}
    for name in before:
        del sys.modules[name]
    sys.modules.update(_HELD)
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    except ImportError as error:
        pytest.skip(f"{error}; make test, or: pip install --no-deps --target FOLDER {packages}, GLOCAL_PEERS=FOLDER")
    finally:
        sys.path.remove(str(FOLDER))
        _HELD.update({name: module for name, module in sys.modules.items() if name.split(".")[0] in _TOPS})
        for name in _HELD:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def _bare(*packages: str) -> None:
    """Packages whose modules can be imported, without running their own code."""
    for package in packages:
        sys.modules.setdefault(package, ModuleType(package)).__path__ = [str(FOLDER.joinpath(*package.split(".")))]


def _import_torchvision() -> None:
    """There is no build of it for CPUs: its Python loads once the two operators that it describes have names."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            _LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def _chunk_means(x: torch.Tensor, size: int, offsets: None = None) -> torch.Tensor:
    """``(B, N, H, D)`` to ``(B, N / size, H, D)``."""
    assert offsets is None
    return x.unflatten(1, (-1, size)).mean(2)
