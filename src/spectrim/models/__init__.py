"""Small reference networks for studies and tests, and `resolve`, which makes a network from its name."""

from spectrim.models.cifar_resnet import CIFAR_MEAN, CIFAR_STD, cifar_inputs, resnet20, resnet32, resnet44, resnet56
from spectrim.models.mini_resnet import mini_resnet
from spectrim.models.mlp import mlp
from spectrim.models.networks import NETWORKS
from spectrim.models.resolve import resolve

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
