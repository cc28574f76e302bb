"""How images lie in memory while a network runs on them."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spectrim.core.errors import ModelError
from spectrim.core.execution import Forward, ForwardFunction, Inputs, call, device_of, evaluating, is_image
from spectrim.core.nested import alike, fractions

_TRIED = 2
"""Samples that a network is tried on."""


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """Whether networks on a CPU may be given images with their channels last in memory, which convolutions run faster.

    The numbers are the same, and so is what a network gives for them, unless its code looks at how they lie in memory:
    `x.view(len(x), -1)` fails there. So each network is tried on a few samples of each shape: whether it gives the
    same, and whether gradients come through, also in training mode, where some networks run more of themselves.

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
        if device_of(network).type != "cpu":
            return False
        # a pass of one process alone would leave the others waiting
        network = getattr(network, "module", network) if isinstance(network, DistributedDataParallel) else network
        called = Forward(network, self.forward) if self.forward else network
        other = replace(few, channels_last=True)
        with evaluating(network), suppress(ModelError):
            if alike(call(called, few), call(called, other)):
                return _has_gradients(called, other) or not _has_gradients(called, few)
        return False


def _has_gradients(network: nn.Module, few: Inputs) -> bool:
    """Whether gradients come through, in evaluation mode and in training mode."""
    with suppress(Exception), torch.enable_grad():
        own = few.map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)
        for is_training in (False, True):
            values = fractions(call(network.train(is_training), own))
            total = sum((value.sum() for value in values), torch.zeros(()))
            torch.autograd.grad(total, [x for x in own.tensors() if x.requires_grad], allow_unused=True)
        return True
    return False
