"""Which positions of a batch's sequences are tokens: padding counts in no statistic, sensitivity or fit."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.core.errors import DataError, warn
from spectrim.core.execution import Inputs
from spectrim.core.nested import fractions
from spectrim.layers.types import layer_type_of
from spectrim.layers.types.base import SampledPlaces, sample

_OF_TOKENS = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")
_OF_PADDING = ("key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
"""Arguments (batch, length) of Hugging Face's models, and of torch's, where True is padding."""


@dataclass(frozen=True, eq=False)
class TokenPlaces:
    """Where the tokens of a tensor are that has a sequence for each sample.

    Attributes:
        index: Places in its first two dimensions, flattened, or in its first one, of one sample after the other.
        sizes: How many there are of each sample.
        dims: Dimensions that the sequences take: 2, or 1 where they are flattened.
    """

    index: Tensor
    sizes: Sequence[int]
    dims: int

    def take(self, tensor: Tensor) -> Tensor:
        """The tokens one after the other: (n, ..)."""
        return tensor.flatten(0, self.dims - 1)[self.index.to(tensor.device)]

    def weigh(self, tensor: Tensor) -> Tensor:
        """Zero at padding, and scaled so that a sample's mean square over all places is that over its tokens."""
        flat = tensor.flatten(0, self.dims - 1)
        sizes = torch.tensor(self.sizes)
        weights = torch.zeros(len(flat), dtype=torch.float64)
        weights[self.index] = (len(flat) / len(sizes) / sizes).sqrt().repeat_interleave(sizes).double()
        weights = weights.to(flat).reshape(-1, *[1] * (flat.ndim - 1))
        return torch.where(weights > 0, flat * weights, 0).reshape(tensor.shape)


@dataclass(frozen=True, eq=False)
class TokenMasks:
    """The masks of one batch, if it has any.

    Attributes:
        masks: Each (batch, length), True at tokens.
        length_first: Whether sequences in the model may be (length, batch, ..), as a layer of torch says.
    """

    masks: Sequence[Tensor]
    length_first: bool = False
    _known: dict[Any, TokenPlaces] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs) -> "TokenMasks":
        """Those of a model's inputs: `inputs.mask`, or arguments with the names that Hugging Face and torch use.

        Raises:
            DataError: there is no `inputs.mask` of the shape (batch, length).
        """
        length_first = any(getattr(module, "batch_first", True) is False for module in model.modules())
        if isinstance(inputs.mask, Tensor):
            return cls([_is_token(inputs.mask, "")], length_first)
        named = _by_name(model, inputs)
        names = (*_OF_TOKENS, *_OF_PADDING) if inputs.mask is None else (inputs.mask,)
        values = {name: named[name] for name in names if isinstance(named.get(name), Tensor)}
        masks = [_is_token(mask, name) for name, mask in values.items() if mask.ndim == 2]
        masks = [mask for mask in masks if not _is_causal(mask)]
        if inputs.mask is not None and not masks:
            raise DataError(
                f"mask={inputs.mask!r}: the inputs ({inputs.describe()}) have no entry of this name and of shape "
                "(batch, length); name one that is nonzero at tokens and zero at padding"
            )
        return cls(masks, length_first)

    def places(self, shape: Sequence[int], *, positions: SampledPlaces | None = None) -> TokenPlaces | None:
        """The tokens of a tensor (batch, length, .., size) or (batch * length, size), at most so many of a sample.

        They are those that the sample would have alone, without padding. Tensors may be (length, batch, .., size) as
        well. None for tensors without a sequence that a mask belongs to, and where the order cannot be told. Where
        several masks fit, as of encoder and decoder, what any of them calls a token is one.
        """
        sequences = tuple(shape[:1] if len(shape) == 2 else shape[:2])
        if len(shape) < 2:
            return None
        for length_first in (self.length_first, not self.length_first):
            fitting = [mask for mask in self.masks if sequences in (_order(mask, length_first).shape, (mask.numel(),))]
            if fitting and not (self.length_first and fitting[0].shape[0] == fitting[0].shape[1]):
                key = (sequences, positions)
                if key not in self._known:
                    together = torch.stack(fitting).any(dim=0)
                    self._known[key] = _located(together, len(sequences), positions, length_first=length_first)
                return self._known[key]
        return None

    def routed(self, index: Tensor, _: int) -> Tensor:
        """Indices of experts (tokens, places), with -1 at padding."""
        places = self.places(index.shape)
        if places is None:
            return index
        tokens = torch.full_like(index, -1)
        tokens[places.index] = index[places.index]
        return tokens

    def warn_if_unused(self) -> None:
        """Warn of padding that no layer was found to see."""
        padded = [mask for mask in self.masks if not mask.all()]
        if padded and not self._known:
            warn(
                f"the mask {list(padded[0].shape)} leaves padding out, and no layer reads sequences of these sizes, or "
                "in which of two orders cannot be told where there are as many as they are long: the padding counts as "
                "data; give batches of another size"
            )

    def mapped(self, outputs: Any, change: Callable[[TokenPlaces, Tensor], Tensor]) -> list[Tensor]:
        """Every tensor of a model's outputs that holds fractions, with `change` of those that have sequences."""
        each = ((tensor, self.places(tensor.shape)) for tensor in fractions(outputs))
        return [tensor if places is None else change(places, tensor) for tensor, places in each]

    def rows_of(self, layer: nn.Module, shape: Sequence[int], *, positions: SampledPlaces | None) -> TokenPlaces | None:
        """The places to look at in a call of a layer; None if that has no padding."""
        if layer_type_of(layer).feature_dim(layer) != -1:
            return None
        places = self.places(shape, positions=positions)
        whole = self.places(shape)
        padded = whole is not None and len(whole.index) < math.prod(shape[: whole.dims])
        return places if padded else None


def input_rows(
    layer: nn.Module, x: Tensor, *, output: Tensor, positions: SampledPlaces | None, masks: TokenMasks, samples: int
) -> tuple[Tensor, int | Sequence[int]]:
    """As `LayerType.input_rows`, without padding, and of how many samples, or how many of each, they are."""
    kind = layer_type_of(layer)
    if kind.is_lookup:  # every index counts, and each is a vector
        x, positions = x.unsqueeze(-1), None
        output = x
    places = masks.rows_of(layer, x.shape, positions=positions)
    if places is None:
        return kind.input_rows(layer, x, output=output, positions=positions), samples
    x, output = places.take(x), places.take(output)
    rows = kind.input_rows(layer, x.flatten(0, -2), output=output.flatten(0, -2), positions=None)
    return rows, [size * rows.shape[1] // max(1, len(x)) for size in places.sizes]


def output_rows(layer: nn.Module, output: Tensor, *, positions: SampledPlaces | None, masks: TokenMasks) -> Tensor:
    """As `LayerType.output_rows`, without padding."""
    kind = layer_type_of(layer)
    places = masks.rows_of(layer, output.shape, positions=positions)
    if places is None:
        return kind.output_rows(layer, output, positions=positions)
    return kind.output_rows(layer, places.take(output).flatten(0, -2), positions=None)


def _order(mask: Tensor, length_first: bool) -> Tensor:  # noqa: FBT001
    return mask.T if length_first else mask


def _located(mask: Tensor, dims: int, positions: SampledPlaces | None, *, length_first: bool) -> TokenPlaces:
    numbers = _order(torch.arange(mask.numel()).reshape(_order(mask, length_first).shape), length_first)
    of_sample = [numbers[row, mask[row]] for row in range(len(mask))]
    if dims == 2:
        of_sample = [places[sample(len(places), positions, sequence=True)] for places in of_sample]
    return TokenPlaces(torch.cat(of_sample), [len(places) for places in of_sample], dims)


def _by_name(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    try:
        bound = inspect.signature(model.forward).bind_partial(*inputs.args, **inputs.kwargs)
    except (TypeError, ValueError):
        return dict(inputs.kwargs)
    return {**bound.arguments, **inputs.kwargs}


def _is_causal(mask: Tensor) -> bool:
    """Whether it says which places see which, in the place of which are tokens."""
    return len(mask) > 1 and mask.shape[0] == mask.shape[1] and torch.equal(mask, torch.ones_like(mask).tril())


def _is_token(mask: Tensor, name: str) -> Tensor:
    """True at tokens; of a mask that is added to scores, such as 0 and minus infinity, where it adds nothing."""
    mask = mask.detach().cpu()
    if mask.is_floating_point() and not (mask > 0).any():
        return mask == 0
    return mask == 0 if name.endswith("key_padding_mask") else mask != 0
