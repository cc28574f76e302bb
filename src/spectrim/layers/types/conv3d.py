"""`nn.Conv3d`."""

from torch import nn

from spectrim.layers.types.convolution import Convolution


class Conv3d(Convolution):
    """`nn.Conv3d`."""

    name = "Conv3d"
    base = plain = nn.Conv3d
    dims = 3
