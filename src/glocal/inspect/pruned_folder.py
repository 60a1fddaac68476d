"""Models of transformers with heads removed, on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glocal.inspect.pruning import head_counts, prune_heads, pruned

__all__ = ["load_pruned", "save_pruned"]

_INDEX, _CONFIG, _WEIGHTS, _VERSION = "pruned.json", "config.json", "model.safetensors", 1


def save_pruned(model: nn.Module, folder: str | Path) -> None:
    """Write a model whose heads `prune_heads` removed: its configuration, its weights, and which heads it has.

    Each file is written beside its place and renamed; ``pruned.json`` goes first and comes last, so that what was cut
    short is known for that. The folder is not for ``from_pretrained``: use `load_pruned`.

    Args:
        model: of transformers; without removed heads too.
        folder: is made where it is not there; a pruned model in it is overwritten.

    Raises:
        TypeError: no model of a class that transformers has under its name.
        ValueError: the folder holds other things, or is a file.
    """
    import transformers
    from safetensors.torch import save_file

    kind = type(model)
    if not isinstance(model, transformers.PreTrainedModel) or getattr(transformers, kind.__name__, None) is not kind:
        raise TypeError(f"model must be of a class of transformers; it was {kind.__module__}.{kind.__name__}")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a folder or not there; {str(folder)!r} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    ours = {name + more for name in (_INDEX, _CONFIG, _WEIGHTS) for more in ("", ".part")}
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours)
    if others:
        raise ValueError(f"folder must be empty or hold a pruned model; {str(folder)!r} has {others[0]!r}")
    (folder / _INDEX).unlink(missing_ok=True)
    generation = getattr(model, "generation_config", None)
    index = {
        "version": _VERSION,
        "class": kind.__name__,
        "heads": pruned(model),
        "generation": None if generation is None else json.loads(generation.to_json_string()),
    }
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in _own(model.state_dict()).items()}
    save_file(kept, folder / f"{_WEIGHTS}.part", metadata={"format": "pt"})
    (folder / f"{_CONFIG}.part").write_text(model.config.to_json_string(use_diff=False), encoding="utf-8")
    for name in (_WEIGHTS, _CONFIG):
        os.replace(folder / f"{name}.part", folder / name)
    index["bytes"] = {name: (folder / name).stat().st_size for name in (_WEIGHTS, _CONFIG)}
    (folder / f"{_INDEX}.part").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    os.replace(folder / f"{_INDEX}.part", folder / _INDEX)


def load_pruned(folder: str | Path) -> Any:
    """Read what `save_pruned` wrote: the model is built, its heads are removed, then the weights are loaded.

    Args:
        folder: of the model.

    Returns:
        The model of transformers, in evaluation mode.

    Raises:
        ValueError: the folder holds no pruned model, or files that are cut short, damaged or do not fit; the message
            says which.
    """
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    index = _read(folder / _INDEX)
    try:
        version, name = index["version"], str(index["class"])
        heads = {str(path): [int(head) for head in kept] for path, kept in index["heads"].items()}
        sizes = {file: int(index["bytes"][file]) for file in (_WEIGHTS, _CONFIG)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(folder / _INDEX)!r} is damaged: {error!r}") from None
    if version != _VERSION:
        raise ValueError(f"{str(folder / _INDEX)!r} is of version {version}; this one reads version {_VERSION}")
    for file, wanted in sizes.items():
        there = (folder / file).stat().st_size if (folder / file).is_file() else 0
        if there != wanted:
            raise ValueError(f"{str(folder / file)!r} was cut short: it has {there:,} bytes of {wanted:,}")
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"{str(folder / _INDEX)!r} names the model {name!r}, which this transformers has not")
    settings = _read(folder / _CONFIG)
    try:
        config: Any = kind.config_class
        model: Any = kind(config.from_dict(settings)).eval()
        _prune_to(model, heads)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(folder)!r} cannot be built: {error}") from None
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(folder / _WEIGHTS)!r} is damaged: {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in _own(model.state_dict()).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise ValueError(
            f"{str(folder / _WEIGHTS)!r} does not fit: {wrong} must be {expected.get(wrong, 'absent')}; "
            f"it was {found.get(wrong, 'absent')}"
        )
    model.load_state_dict(tensors, strict=False, assign=True)  # what is missing is tied to something that is not
    model.tie_weights()
    if index.get("generation"):
        model.generation_config = transformers.GenerationConfig.from_dict(index["generation"])
    return model


def _prune_to(model: nn.Module, heads: Mapping[str, list[int]]) -> None:
    """Remove all heads but these, layers by their path."""
    counts = head_counts(model) if heads else {}
    numbers = {path: number for number, path in enumerate(counts)}
    gone = []
    for path, kept in heads.items():
        if path not in counts:
            raise ValueError(f"it has no attention at {path!r}")
        if sorted(set(kept)) != kept or (kept and not 0 <= kept[0] <= kept[-1] < counts[path]):
            raise ValueError(f"heads of {path!r} must ascend from 0 to {counts[path] - 1}; they were {kept}")
        gone += [(numbers[path], head) for head in range(counts[path]) if head not in kept]
    prune_heads(model, gone)


def _own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without names of tensors that have another name before: tied weights are written once."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        found[name] = tensor
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is damaged: it must be an object; it was {type(found).__name__}")
    return found
