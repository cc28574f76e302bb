"""The table of Spectrim's own networks."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from spectrim.models.cifar_resnet import resnet20, resnet32, resnet44, resnet56
from spectrim.models.mini_resnet import mini_resnet
from spectrim.models.mlp import mlp

NETWORKS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {factory.__name__: factory for factory in (mlp, mini_resnet, resnet20, resnet32, resnet44, resnet56)}
)
"""Every network of `spectrim.models` by name; each has a size for every argument, so it can be called without any."""
