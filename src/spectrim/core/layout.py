"""How images lie in memory while a network runs on them."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spectrim.core.errors import ModelError
from spectrim.core.execution import Forward, ForwardFunction, Inputs, call, device_of, evaluating, is_image
from spectrim.core.nested import alike, fractions

_DIFFERENTIATED, _SHAPES = 2, 8
"""Samples that gradients are tried on, and how many shapes of batches are tried."""


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """Whether networks on a CPU may be given images with their channels last in memory, which convolutions run faster.

    The numbers are the same, and so is what a network gives for them, unless its code looks at how they lie in memory:
    `x.view(len(x), -1)` fails there. So each network is tried on the first batch of each shape: whether it gives the
    same, and whether gradients come through.

    Attributes:
        networks: All of them have to give the same; None counts for none.
        forward: How they are called, where it is not with just the inputs.
        training: Whether they are tried in training mode as well, where some networks run more of themselves.
    """

    networks: Sequence[nn.Module | None]
    forward: ForwardFunction | None = None
    training: bool = False
    _known: dict[tuple[torch.Size, ...], bool] = field(default_factory=dict)

    def of(self, inputs: Inputs) -> Inputs:
        """The inputs, marked where that holds."""
        shapes = tuple(tensor.shape for tensor in inputs.tensors() if is_image(tensor))
        if not shapes:
            return inputs
        if shapes not in self._known and len(self._known) < _SHAPES:
            networks = (network for network in self.networks if network is not None)
            self._known[shapes] = False
            with suppress(RuntimeError, TypeError):  # of modules that cannot be copied
                self._known[shapes] = all(self._is_same(network, inputs) for network in networks)
        return replace(inputs, channels_last=self._known.get(shapes, False))

    def _is_same(self, network: nn.Module, inputs: Inputs) -> bool:
        """Whether a network gives the same for some inputs in both ways."""
        if device_of(network).type != "cpu":
            return False
        # a pass of one process alone would leave the others waiting
        network = getattr(network, "module", network) if isinstance(network, DistributedDataParallel) else network
        network = copy.deepcopy(network) if self.training else network  # which may change itself in training mode
        called = Forward(network, self.forward) if self.forward else network
        other = replace(inputs, channels_last=True)
        with evaluating(network), suppress(ModelError):
            if alike(call(called, inputs), call(called, other)):
                few, others = (each.split(_DIFFERENTIATED)[0] for each in (inputs, other))
                modes = (False, True) if self.training else (False,)
                return all(
                    _has_gradients(called.train(mode), others) or not _has_gradients(called, few) for mode in modes
                )
        return False


def _has_gradients(network: nn.Module, few: Inputs) -> bool:
    with suppress(Exception), torch.enable_grad():
        own = few.map(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)
        total = sum((value.sum() for value in fractions(call(network, own))), torch.zeros(()))
        torch.autograd.grad(total, [x for x in own.tensors() if x.requires_grad], allow_unused=True)
        return True
    return False
