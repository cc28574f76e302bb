"""`nn.ConvTranspose2d`."""

from torch import nn

from spectrim.layers.types.transposed_convolution import TransposedConvolution


class ConvTranspose2d(TransposedConvolution):
    """`nn.ConvTranspose2d`."""

    name = "ConvTranspose2d"
    base = nn.ConvTranspose2d
    plain = nn.Conv2d
    dims = 2
