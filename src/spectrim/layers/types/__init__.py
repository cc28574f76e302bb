"""Types of layers: how each kind holds a matrix. A new one is a file here and a line in `LAYER_TYPES`."""

from torch import nn

from spectrim.layers.types.base import Geometry, LayerType, OnnxGraph, Positions
from spectrim.layers.types.conv1d import Conv1d
from spectrim.layers.types.conv2d import Conv2d
from spectrim.layers.types.conv3d import Conv3d
from spectrim.layers.types.conv_transpose2d import ConvTranspose2d
from spectrim.layers.types.embedding import Embedding, EmbeddingBag
from spectrim.layers.types.interpolation import InterpolationType
from spectrim.layers.types.linear import Linear
from spectrim.layers.types.transposed_linear import TransposedLinear

__all__ = ["LAYER_TYPES", "Geometry", "LayerType", "OnnxGraph", "Positions", "find_layer_type", "layer_type_of"]

LAYER_TYPES: tuple[LayerType, ...] = (
    Linear(),
    TransposedLinear(),
    Conv1d(),
    Conv2d(),
    Conv3d(),
    ConvTranspose2d(),
    Embedding(),
    EmbeddingBag(),
    InterpolationType(),
)


def find_layer_type(layer: nn.Module) -> LayerType | None:
    """The type of a layer, also of one whose class overrides methods of the type's class; None for other modules."""
    return next((kind for kind in LAYER_TYPES if kind.base_of(type(layer)) is not None), None)


def layer_type_of(layer: nn.Module) -> LayerType:
    """The type of a layer that is known to have one."""
    kind = find_layer_type(layer)
    assert kind is not None, f"{type(layer).__name__} is of no known type"
    return kind
