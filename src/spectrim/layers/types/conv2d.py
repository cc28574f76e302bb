"""`nn.Conv2d`."""

from torch import nn

from spectrim.layers.types.convolution import Convolution


class Conv2d(Convolution):
    """`nn.Conv2d`."""

    name = "Conv2d"
    base = plain = nn.Conv2d
    dims = 2
