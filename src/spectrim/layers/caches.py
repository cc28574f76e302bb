"""Caches of keys and values that keep of each head only the numbers that its narrowed values have.

The attentions of transformers shape their values by the size of a head, so narrowed ones have zeros at the end. A hook
before such an attention gives it a view of its cache, which keeps what lies before the zeros. Heads that hold different
numbers share the room: the cache has as many for each as they hold on average. The first decoding step tries whether
the attention takes values as wide as the widest head; where it does not, they are filled up to the size of a head.
"""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from spectrim.core.nested import alike
from spectrim.layers.heads import HeadOutput, HeadValues

_ARGUMENTS = {"cache", "past_key_values", "past_key_value", "layer_past"}
_PAIRED = "self_attention_cache"
_SEEN: dict[type, type] = {}
"""By the class of a cache that of its views; torch's compiler warns of functools.cache."""
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def match_caches(model: nn.Module) -> None:
    """Put the hook before each attention with narrowed values that takes a cache, and before no other module."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, NarrowCache)]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    for name, values in model.named_modules():
        if isinstance(values, HeadValues):
            attention = _around(model, name)
            if not _ARGUMENTS.isdisjoint(inspect.signature(attention.forward).parameters):
                attention.register_forward_pre_hook(NarrowCache(values.size, tuple(values.ranks)), with_kwargs=True)


def _around(model: nn.Module, name: str) -> nn.Module:
    """The smallest module that holds these values and what reads the heads."""
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if any(isinstance(part, HeadOutput) for part in module.modules()):
            return module
    return model


def bytes_per_token(outputs: Any) -> int | None:
    """Bytes of keys and values of one token in the cache among a network's outputs; None without one.

    Beside those of a self-attention, a cross-attention has some for each token of the encoder, which are left out.
    """
    cache = next(filter(_is_cache, outputs.values() if isinstance(outputs, Mapping) else ()), None)
    layers: Any = getattr(getattr(cache, _PAIRED, cache), "layers", ())
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    filled = [part for pair in pairs for part in pair if part is not None and part.numel()]
    return sum(part[0, ..., 0, :].numel() * part.element_size() for part in filled) or None


class NarrowCache:
    """The hook. Copies of the model have copies of it.

    Attributes:
        size: Numbers of a head, as the attention takes it.
        ranks: By head, those of its values that are not zero.
        takes_narrow: By attention implementation, whether the attention takes values of that width.
    """

    def __init__(self, size: int, ranks: tuple[int, ...]) -> None:
        self.size, self.ranks = size, ranks
        self.takes_narrow: dict[str, bool] = {}

    def __call__(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """The arguments with views in the place of caches."""
        if not any(map(_is_cache, (*args, *kwargs.values()))):
            return None
        hidden = args[0] if args else kwargs.get("hidden_states")
        is_step = isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[1] == 1
        config = next((part.config for part in attention.modules() if hasattr(part, "config")), None)
        implementation = str(getattr(config, "_attn_implementation", None))
        if is_step and implementation not in self.takes_narrow and not _is_watched(attention):
            self.takes_narrow[implementation] = self._try(attention, args, kwargs)
        narrow = is_step and self.takes_narrow.get(implementation, False)
        return _View(self.size, self.ranks, narrow=narrow).arguments(args, kwargs)

    def _try(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether values of their own width give what they give with zeros. Caches stay as they are."""
        outputs = []
        try:
            with torch.no_grad():
                for narrow in (False, True):
                    view = _View(self.size, self.ranks, narrow=narrow, is_dry_run=True)
                    seen, named = view.arguments(args, kwargs)
                    outputs.append(attention.forward(*seen, **named))
            return alike(*outputs)
        except Exception:
            return False


@dataclass(frozen=True)
class _View:
    """How a cache is seen.

    Attributes:
        size: Numbers of a head, as the attention takes it.
        ranks: Those that are kept, by head.
        narrow: Values are read as they are kept; else with zeros.
        is_dry_run: Nothing is stored.
    """

    size: int
    ranks: tuple[int, ...]
    narrow: bool
    is_dry_run: bool = False

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The arguments with the caches among them seen so."""
        return tuple(map(self.of, args)), {name: self.of(value) for name, value in kwargs.items()}

    def of(self, value: Any) -> Any:
        """An object of the cache's class that has the same attributes; any other value as it is."""
        if not _is_cache(value):
            return value
        kind, own = value.__class__, _SeenPair if hasattr(value, _PAIRED) else _Seen
        if kind not in _SEEN:
            _SEEN[kind] = type("NarrowCache", (own, kind), {"__slots__": ("view",)})
        seen: Any = object.__new__(_SEEN[kind])
        seen.__dict__ = vars(value)
        seen.view = self
        return seen

    @property
    def mean_rank(self) -> int:
        """Numbers that a cache has room for in each head."""
        return sum(self.ranks) // len(self.ranks)

    @property
    def is_even(self) -> bool:
        """Whether all heads have as many."""
        return min(self.ranks) == max(self.ranks)

    def packed(self, values: Tensor) -> Tensor:
        """Values (batch, heads, length, size) without zeros: (batch, heads, length, `mean_rank`)."""
        if self.is_even:
            return values[..., : self.mean_rank]
        each = [values[:, head, :, :rank] for head, rank in enumerate(self.ranks)]
        packed: Tensor = torch.cat(each, dim=-1).unflatten(-1, (len(self.ranks), self.mean_rank))
        return packed.transpose(1, 2)

    def unpacked(self, values: Tensor, *, width: int) -> Tensor:
        """What was packed, each head with zeros up to a width."""
        if self.is_even:
            return nn.functional.pad(values, [0, width - self.mean_rank])
        each = values.transpose(1, 2).flatten(2).split(self.ranks, dim=-1)
        return torch.stack([nn.functional.pad(part, [0, width - part.shape[-1]]) for part in each], dim=1)

    def fits(self, layer: Any, values: Tensor) -> bool:
        """Whether the layer of a cache can keep values without their zeros: not quantised, nor with others before."""
        before = getattr(layer, "values", None)
        has_each = self.is_even or (values.ndim == 4 and values.shape[1] == len(self.ranks))  # not repeated for queries
        if hasattr(layer, "_quantize") or not has_each:
            return False
        if before is not None:
            return before.shape[-1] in (0, self.mean_rank)
        # of a fixed length; in transformers 4 the values get the size of the keys
        is_static = getattr(layer, "is_compileable", False)
        return not is_static or "value_states" in inspect.signature(layer.lazy_initialization).parameters


def _is_cache(value: Any) -> bool:
    """Whether it is a cache of transformers with an object for each layer, or a pair of them."""
    if hasattr(value, _PAIRED):
        return True
    return isinstance(getattr(value, "layers", None), list) and hasattr(value, "get_seq_length")


def _is_watched(attention: nn.Module) -> bool:
    """Whether a second pass would be noticed, or differ from the first."""
    is_traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if attention.training or is_traced or _get_current_dispatch_mode() is not None:
        return True
    parts = (part for part in attention.modules() if part is not attention)
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


class _Seen:
    """Before the class of a cache, whose `update` it calls with values that are cut."""

    __slots__ = ()
    view: _View
    layers: list[Any]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        view, update = self.view, super().update  # type: ignore[misc]
        if not isinstance(value_states, Tensor) or value_states.shape[-1] != view.size:
            return update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        values = view.packed(value_states) if view.fits(layer, value_states) else value_states
        if not view.is_dry_run:
            keys, values = update(key_states, values, layer_idx, *args, **kwargs)
        elif layer is None:
            keys = key_states
        else:  # those of a fixed length change in place
            layer = copy.deepcopy(layer) if layer.is_compileable else copy.copy(layer)
            keys, values = layer.update(key_states, values, *args, **kwargs)
        width = max(view.ranks) if view.narrow else view.size
        if values.shape[-1] == view.size:
            return keys, values[..., :width]
        return keys, view.unpacked(values, width=width)


class _SeenPair:
    """Before the class of a pair of caches; values of a cross-attention are not narrowed."""

    __slots__ = ()
    view: _View

    @property
    def self_attention_cache(self) -> Any:
        return self.view.of(vars(self)[_PAIRED])
