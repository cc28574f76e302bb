"""Small reference networks for studies and tests, and `resolve`, which makes a network from its name."""

from spectrim.models.networks import (
    CIFAR_MEAN,
    CIFAR_STD,
    NETWORKS,
    cifar_inputs,
    mini_resnet,
    mlp,
    resnet20,
    resnet32,
    resnet44,
    resnet56,
)
from spectrim.models.references import resolve

__all__ = [
    "CIFAR_MEAN",
    "CIFAR_STD",
    "NETWORKS",
    "cifar_inputs",
    "mini_resnet",
    "mlp",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resolve",
]
