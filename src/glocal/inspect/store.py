"""Records on disk: a file of safetensors for each layer, and an index that is written last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Store", "read"]

_INDEX, _INPUTS, _VERSION = "record.json", "inputs.safetensors", 1


class Store:
    """Writes a record, layer by layer.

    Args:
        folder: is made where it is not there; an older record in it is overwritten.

    Raises:
        ValueError: it holds other things, or is a file.
    """

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"folder must be a folder or not there; {str(folder)!r} is a file")
        folder.mkdir(parents=True, exist_ok=True)
        others = [path for path in folder.iterdir() if not _ours(path)]
        if others:
            raise ValueError(f"folder must be empty or hold an older record; {str(folder)!r} has {others[0].name!r}")
        for path in sorted(folder.iterdir(), key=lambda path: path.name != _INDEX):  # the index goes first
            path.unlink()
        self.folder = folder
        self.layers: list[dict[str, Any]] = []

    def add(self, settings: dict[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Write a layer; what it gives reads its tensors from there."""
        name = f"layer-{len(self.layers):05}.safetensors"
        size = _write(self.folder / name, tensors)
        self.layers.append({**settings, "file": name, "bytes": size})
        return OnDisk(self.folder / name)

    def close(self, inputs: Mapping[str, Tensor]) -> None:
        """Write what the model was given, and the index."""
        size = _write(self.folder / _INPUTS, inputs)
        index = {"version": _VERSION, "inputs": size, "layers": self.layers}
        part = self.folder / f"{_INDEX}.part"
        part.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.folder / _INDEX)


class OnDisk(Mapping[str, Tensor]):
    """Tensors of a file, each read when it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: tuple[str, ...] | None = None

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        if name not in self._all():
            raise KeyError(name)
        with safe_open(self.path, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> tuple[str, ...]:
        from safetensors import safe_open

        if self._names is None:
            with safe_open(self.path, framework="pt") as file:
                self._names = tuple(file.keys())
        return self._names


def read(folder: Path) -> tuple[list[tuple[dict[str, Any], Mapping[str, Tensor]]], dict[str, Tensor]]:
    """Settings and tensors of the layers, and what the model was given.

    Raises:
        ValueError: it is no record, or was cut short or damaged.
    """
    if not (folder / _INDEX).is_file():
        started = folder.is_dir() and any(_ours(path) for path in folder.iterdir())
        why = f"was cut short: {_INDEX}, which is written last, is not there" if started else "holds no record"
        raise ValueError(f"{str(folder)!r} {why}")
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        version, layers, size = index["version"], index["layers"], index["inputs"]
        files = [(str(layer["file"]), int(layer["bytes"])) for layer in layers]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder / _INDEX)!r} is damaged: {error}") from None
    if version != _VERSION:
        raise ValueError(f"{str(folder)!r} is a record of version {version}; this one reads version {_VERSION}")
    for name, wanted in [*files, (_INPUTS, int(size))]:
        path = folder / name
        there = path.stat().st_size if path.is_file() else 0
        if there != wanted:
            raise ValueError(f"{str(path)!r} was cut short: it has {there:,} bytes of {wanted:,}")
    return [(layer, OnDisk(folder / layer["file"])) for layer in layers], dict(OnDisk(folder / _INPUTS))


def _ours(path: Path) -> bool:
    return path.name in (_INDEX, _INPUTS, f"{_INDEX}.part") or (
        path.name.startswith("layer-") and path.name.endswith((".safetensors", ".safetensors.part"))
    )


def _write(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Beside the target, then renamed; the size in bytes."""
    from safetensors.torch import save_file

    part = path.with_name(f"{path.name}.part")
    # Copies, because a file of safetensors holds no two views of one memory.
    whole = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_file(whole, part)
    os.replace(part, path)
    return path.stat().st_size
