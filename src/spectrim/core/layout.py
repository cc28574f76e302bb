"""How images lie in memory while a network runs on them."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from spectrim.core.errors import ModelError
from spectrim.core.execution import Forward, ForwardFunction, Inputs, call, device_of, evaluating, is_image
from spectrim.core.nested import alike

_TRIED = 2
"""Samples that a network is tried on."""


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """Whether networks on a CPU may be given images with their channels last in memory, which convolutions run faster.

    The numbers are the same, and so is what a network gives for them, unless its code looks at how they lie in memory:
    `x.view(len(x), -1)` fails there. So each network is tried on a few samples of each shape.

    Attributes:
        networks: All of them have to give the same; None counts for none.
        forward: How they are called, where it is not with just the inputs.
    """

    networks: Sequence[nn.Module | None]
    forward: ForwardFunction | None = None
    _known: dict[tuple[torch.Size, ...], bool] = field(default_factory=dict)

    def of(self, inputs: Inputs) -> Inputs:
        """The inputs, marked where that holds."""
        shapes = tuple(tensor.shape[1:] for tensor in inputs.tensors() if is_image(tensor))
        if not shapes:
            return inputs
        if shapes not in self._known:
            few = inputs.split(_TRIED)[0]
            self._known[shapes] = all(self._is_same(network, few) for network in self.networks if network is not None)
        return replace(inputs, channels_last=self._known[shapes])

    def _is_same(self, network: nn.Module, few: Inputs) -> bool:
        """Whether a network gives the same for some inputs in both ways."""
        called = Forward(network, self.forward) if self.forward else network
        if device_of(network).type != "cpu":
            return False
        with evaluating(network), suppress(ModelError):
            return alike(call(called, few), call(called, replace(few, channels_last=True)))
        return False
