"""Small reference networks for studies and tests, `resolve`, which makes a network from its name, and `read_state`."""

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
from spectrim.models.weights import read_state

__all__ = [
    "CIFAR_MEAN",
    "CIFAR_STD",
    "NETWORKS",
    "cifar_inputs",
    "mini_resnet",
    "mlp",
    "read_state",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resolve",
]
