"""The most bytes that tensors held at once while something ran, on any device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["HeldBytes"]


class HeldBytes(TorchDispatchMode):
    """A ``with`` block that counts the bytes of tensors made in it, each storage once, for as long as it lives.

    What is there before does not count: a model's weights, its inputs. Scratch memory inside of a kernel is not seen.

    Attributes:
        now: bytes held.
        peak: the most of them so far.

    >>> with HeldBytes() as held:
    ...     for _ in range(3):
    ...         x = torch.ones(250).exp_()
    >>> held.peak <= 2000, held.now
    (True, 1000)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self._add(tensor.untyped_storage(), before)
        return out

    def _add(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._seen or number in before:
            return  # a view, or in place

        def gone(_: Any) -> None:
            self._seen.pop(number, None)
            self.now -= size

        self._seen[number] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
