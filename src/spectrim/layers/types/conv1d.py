"""`nn.Conv1d`."""

from torch import nn

from spectrim.layers.types.convolution import Convolution


class Conv1d(Convolution):
    """`nn.Conv1d`."""

    name = "Conv1d"
    base = plain = nn.Conv1d
    dims = 1
