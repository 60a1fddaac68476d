"""Caches for ``generate`` that keep what a policy keeps: the policies of `glocal.cache`, as transformers' ``Cache``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin

from glocal.cache import Cache, FullCache, HeavyHitters, SelectedTokens, WindowCache
from glocal.hf.install import NAME, attention_modules, crosses
from glocal.hf.mechanism import Mechanism, frame_for, own_window
from glocal.nn import AllOrHereAttention, Attention, LessIsMore
from glocal.nn.frame import Call
from glocal.patterns import Causal, Full, Pattern, Sinks, Sliding

if TYPE_CHECKING:
    from glocal.hf.adapt import Adapted

__all__ = [
    "STACK",
    "AllOrHereCache",
    "BlocksCache",
    "CoreContextCache",
    "HeavyHitterCache",
    "LessIsMoreCache",
    "PolicyCache",
    "PolicyLayer",
    "TokenRolesCache",
    "WindowSinksCache",
]

_TAG = "_glocal_layer"
STACK = "_glocal_adapted"  # where `glocal.hf.adapt` notes a model's adaptations


Policy = Callable[[Attention], Cache]
"""Makes an empty cache for a layer, whose scale is that of its model by then."""


class Decoding(Attention):
    """Full attention over a prompt, as the model's pattern and window have it, and a policy for the tokens after it."""

    def __init__(self, *args: Any, policy: Policy, window: int | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.policy, self.window, self.pattern = policy, window, Full()

    pattern: Pattern

    def where(self, q: Tensor, k: Tensor, call: Call) -> Pattern:
        own = super().where(q, k, call) if self.window is None else Sliding(self.window - 1, 0)
        return own if isinstance(self.pattern, Full) else self.pattern & own

    def new_cache(self) -> Cache:
        return self.policy(self)

    def step(self, q: Tensor, k: Tensor, v: Tensor, call: Call, cache: Cache) -> Tensor:
        if not (isinstance(cache, WindowCache) and cache.seen and q.shape[2] > 1):
            return super().step(q, k, v, call, cache)
        # A later piece of a prompt, at once: only tokens that none of it sees are missing before it.
        (part,) = cache.kept()
        order = part.position[0, 0].argsort()
        keys, values = (torch.cat([old[:, :, order], new], 2) for old, new in ((part.k, k), (part.v, v)))
        seen: Pattern = Sliding(cache.windows[0] - 1, 0)
        if cache.sinks:
            seen = (seen | Sinks(cache.sinks)) & Causal()
        out: Tensor = self.attend(q, keys, values, seen, call)
        cache.update(k, v)
        return out

    def signals(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> dict[str, Tensor]:
        return {"queries": q}


class PolicyLayer(CacheLayerMixin):
    """One layer's policy. `update` only hands the new tokens on; `attend`, which has the queries too, decides.

    Rows of a batch that begin with padding get a policy each, fed with their real tokens only, so that a row decodes
    as it would alone.
    """

    is_sliding = False

    def __init__(self, frame: Attention, config: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.frame, self.config = frame, config
        self.policies: list[Cache] = []  # made when tokens come, and with them the scale of the model's scores
        self.seen = self.batch = 0
        self._by_row = self._pending = False

    @staticmethod
    def of(key: Tensor) -> PolicyLayer | None:
        """The layer that these keys came through."""
        found: PolicyLayer | None = getattr(key, _TAG, None)
        return found

    # What transformers calls.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        adapted = str(getattr(self.config, "_attn_implementation", None)).startswith(NAME)
        if self._pending or not adapted:
            raise RuntimeError(
                "this cache needs a model that glocal has adapted: use it inside `with glocal.hf.adapt(model):`"
            )
        self.is_initialized = self._pending = True
        key_states = key_states.view_as(key_states)  # a tensor of our own to put the tag on
        setattr(key_states, _TAG, self)
        return key_states, value_states

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        count = query_length if isinstance(query_length, int) else len(query_length)  # positions, before 5.3
        return self.seen + count, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, by its name in older versions."""
        return -1

    def reset(self) -> None:
        self.policies, self.seen, self.batch = [], 0, 0
        self._by_row = self._pending = self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.seen:
            return
        if self._by_row:
            self.policies = [copy.deepcopy(self.policies[i]) for i in indices.tolist()]
        else:
            self.policies[0].select(indices)
        self.batch = len(indices)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: what was dropped cannot come back, as assisted decoding would need."""
        raise ValueError("a cache that drops tokens cannot be cropped: assisted decoding is not possible with it")

    # What the attention function calls.

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call, pattern: Pattern) -> Tensor:
        """New tokens ``q (B, H, n, D)``, ``k, v (B, Hkv, n, D)`` over what the policy keeps, ``(B, H, n, Dv)``."""
        self._pending = False
        if isinstance(self.frame, Decoding):
            self.frame.pattern = pattern
        elif not isinstance(pattern, Full | Causal):
            raise ValueError(
                f"{type(self.frame).__name__} decides alone what is read: its cache cannot be combined with the "
                f"pattern {pattern}; use it inside `with glocal.hf.adapt(model):`"
            )
        count, real = q.shape[2], call.real  # `real` is of the past too
        if not self.seen:
            self.policies, self.batch = [self.frame.new_cache()], q.shape[0]
            self._by_row = real is not None and not self._bears_padding(pattern)
            if self._by_row:
                self.policies = [self.frame.new_cache() for _ in range(self.batch)]
        elif q.shape[0] != self.batch:
            raise ValueError(f"the cache holds the past of {self.batch} rows; the batch had {q.shape[0]}")
        self.seen += count
        if not self._by_row:
            policy = self.policies[0]
            if real is not None and not self._bears_padding(pattern):
                raise ValueError("padding must be at the start of the prompt; it came after real tokens")
            return self.frame.step(q, k, v, call._replace(cache=policy), policy)
        out = q.new_zeros(*q.shape[:-1], v.shape[-1])
        for row, policy in enumerate(self.policies):
            at = slice(row, row + 1)
            some = slice(None) if real is None else real[row, -count:].nonzero().squeeze(1)
            x = call.x[at][:, some]
            one = Call(x, x, None, policy, False)
            mine, key, value = (t[at][:, :, some] for t in (q, k, v))
            if mine.shape[2]:
                out[row, :, some] = self.frame.step(mine, key, value, one, policy)[0]
        return out

    def _bears_padding(self, pattern: Pattern) -> bool:
        """Whether padding before a token changes nothing of what it sees: all is kept, and no position counts."""
        kept = type(self.policies[0]) in (FullCache, SelectedTokens)
        plain = type(self.frame) in (Attention, Decoding) and isinstance(pattern, Full | Causal)
        return kept and (plain or isinstance(self.frame, AllOrHereAttention))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(policy.nbytes for policy in self.policies)


class PolicyCache(TransformersCache):
    """A cache for ``generate`` of which each layer keeps what a policy of `glocal.cache` keeps.

    The model must be adapted (`glocal.hf.adapt`, also with nothing but ``"full()"``), as a policy needs the queries.
    The prompt runs in parallel under the adaptation's pattern, then the policy decides. Rows with left padding decode
    as they would alone. Beams are reordered; a cache cannot be cropped, so assisted decoding is refused.
    Layers that have a sliding window of their own keep just that.

    Args:
        model: a decoder of transformers.
        frames: for each attention module's path its layer of `glocal.nn`; None for a full cache.

    Raises:
        ValueError: the model is no decoder, or a path is missing.
    """

    def __init__(self, model: nn.Module, frames: Mapping[str, Attention | None]) -> None:
        modules = _decoder_modules(model)
        layers: list[Any] = []
        for path, module in modules.items():
            frame = frames.get(path)
            if frame is None:
                own = _own_window(model, path, module)
                frame = frame_for(module, Decoding, policy=_full if own is None else _keep_window(own), window=own)
            layers.append(PolicyLayer(frame, module.config))
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, PolicyLayer))


class WindowSinksCache(PolicyCache):
    """The last ``window`` tokens and the ``sinks`` first ones (StreamingLLM; Xiao et al., 2023, arXiv 2309.17453).

    Args:
        model: an adapted decoder.
        window: tokens, the newest included.
        sinks: tokens at the start.

    Raises:
        ValueError: a window below 1, negative sinks, or as in `PolicyCache`.

    Example::

        with adapt(model, "sliding(255, 0) | sinks(4)"):
            model.generate(**batch, past_key_values=WindowSinksCache(model, 256, sinks=4))
    """

    def __init__(self, model: nn.Module, window: int, sinks: int = 4) -> None:
        WindowCache(window, sinks)  # its errors, now
        super().__init__(model, _frames(model, lambda _: WindowCache(window, sinks), window))


class HeavyHitterCache(PolicyCache):
    """The ``heavy`` tokens of most attention so far and the ``recent`` last ones (H2O; arXiv 2306.14048).

    The prompt is read in full, then cut down once, as the authors' code does.

    Args:
        model: an adapted decoder.
        heavy, recent: tokens that each key head keeps of each kind, besides the newest.

    Raises:
        ValueError: negative numbers, or as in `PolicyCache`.

    Example::

        with adapt(model):
            model.generate(**batch, past_key_values=HeavyHitterCache(model, heavy=128, recent=128))
    """

    def __init__(self, model: nn.Module, heavy: int, recent: int) -> None:
        HeavyHitters(heavy, recent)  # its errors, now

        def policy(layer: Attention) -> Cache:
            return HeavyHitters(heavy, recent, scale=layer.scale, softcap=layer.softcap, prompt="whole")

        super().__init__(model, _frames(model, policy))


class LessIsMoreCache(PolicyCache):
    """Everything is kept; layers after ``start`` read ``budget`` tokens that it has chosen for all heads.

    LessIsMore (Yang et al., 2025, arXiv 2508.07101): memory is that of a full cache, reading is not. See
    `glocal.nn.LessIsMore` for what is chosen.

    Args:
        model: an adapted decoder; its sliding layers are left alone and do not count.
        budget, ratio, sinks, start, correction: as in `glocal.nn.LessIsMore`.

    Raises:
        ValueError: numbers that do not fit the model.

    Example::

        with adapt(model):
            model.generate(**batch, past_key_values=LessIsMoreCache(model, budget=512, start=2))
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int,
        *,
        ratio: float = 0.75,
        sinks: int = 4,
        start: int = 2,
        correction: int | None = None,
    ) -> None:
        modules = _decoder_modules(model)
        frames: dict[str, Attention] = {
            path: frame_for(module, Attention)
            for path, module in modules.items()
            if _own_window(model, path, module) is None
        }
        self.chooser = LessIsMore(
            nn.ModuleList(frames.values()), budget=budget, ratio=ratio, sinks=sinks, start=start, correction=correction
        )
        self.chooser.__enter__()  # the frames are this cache's own, and stay so
        super().__init__(model, frames)


class BlocksCache(PolicyCache):
    """Everything is kept, with the mean key of each block; a query reads the ``top_k`` blocks that it agrees with.

    MoBA (Lu et al., 2025, arXiv 2502.13189); the prompt is read so too.

    Args:
        model: an adapted decoder.
        block_size, top_k: as in `glocal.nn.MixtureOfBlocksAttention`.

    Raises:
        ValueError: sizes below 1, or as in `PolicyCache`.
    """

    def __init__(self, model: nn.Module, block_size: int = 64, top_k: int = 3) -> None:
        super().__init__(model, _layers(model, Mechanism("moba", {"block_size": block_size, "top_k": top_k})))


class CoreContextCache(PolicyCache):
    """Near tokens as they are, one pooled token for each group of far ones: ``1 / group_size`` of a full cache.

    Core context aware attention (2024, arXiv 2412.12465); the prompt is read so too. Made for models that were tuned
    to it (`glocal.hf.tune`).

    Args:
        model: an adapted decoder.
        group_size, window: as in `glocal.nn.CoreContextAttention`.

    Raises:
        ValueError: sizes below 1, or as in `PolicyCache`.
    """

    def __init__(self, model: nn.Module, group_size: int = 16, window: int = 256) -> None:
        super().__init__(model, _layers(model, Mechanism("cca", {"group_size": group_size, "window": window})))


class _Learned(PolicyCache):
    name = ""

    def __init__(self, handle: Adapted) -> None:
        if not any(str(chosen).startswith(f"{self.name}(") for chosen in handle.where.values()):
            raise ValueError(f"{type(self).__name__} needs a model adapted with {self.name}(...); it was {handle!r}")
        super().__init__(handle.model, dict(handle.frames))


class TokenRolesCache(_Learned):
    """Each key head drops a token when its learned role says so (Neural Attention Search; arXiv 2502.13251).

    Args:
        handle: of ``adapt(model, "nats(window=...)")``, with trained scorers.

    Raises:
        ValueError: an adaptation without ``nats``.
    """

    name = "nats"


class AllOrHereCache(_Learned):
    """Everything is kept; a learned gate lets each token and head read all of it or a window (arXiv 2512.22562).

    Args:
        handle: of ``adapt(model, "aha(window=...)")``, with trained gates.

    Raises:
        ValueError: an adaptation without ``aha``.
    """

    name = "aha"


def _decoder_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The self-attention modules by path, in the order of a cache's layers."""
    config: Any = getattr(model, "config", None)
    modules = {path: m for path, m in attention_modules(model).items() if not crosses(path)}
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("a cache policy is for decoders; of an encoder-decoder, adapt the attention by patterns")
    numbers = [getattr(module, "layer_idx", None) for module in modules.values()]
    if not modules or numbers != list(range(len(modules))) or not all(_is_causal(m) for m in modules.values()):
        raise ValueError(f"{type(model).__name__} is no decoder whose layers a cache could number")
    return modules


def _is_causal(module: nn.Module) -> bool:
    return bool(getattr(module, "is_causal", False))


def _own_window(model: nn.Module, path: str, module: nn.Module) -> int | None:
    """The sliding window that the model itself has in a layer; None where it has none, or an adaptation took it."""
    kept = (handle.own_window for handle in reversed(vars(model).get(STACK, [])) if path in handle.where)
    return own_window(module) if next(kept, True) else None


def _frames(model: nn.Module, policy: Policy, most: int | None = None) -> dict[str, Attention]:
    """A policy for each layer; one with a window of its own keeps that, or the smaller of the two."""
    frames: dict[str, Attention] = {}
    for path, module in _decoder_modules(model).items():
        own = _own_window(model, path, module)
        mine = policy if own is None else _keep_window(own if most is None else min(own, most))
        frames[path] = frame_for(module, Decoding, policy=mine, window=own)
    return frames


def _layers(model: nn.Module, mechanism: Mechanism) -> dict[str, Attention]:
    """A mechanism for each layer that has no window of its own."""
    return {p: mechanism.frame(m) for p, m in _decoder_modules(model).items() if _own_window(model, p, m) is None}


def _full(layer: Attention) -> Cache:
    return FullCache()


def _keep_window(size: int) -> Policy:
    return lambda _: WindowCache(size)
