"""The CIFAR ResNets of He et al. (2016), as published with trained weights: option-A shortcuts, no projections."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.core.errors import DataError
from spectrim.models.sizes import require_positive

CIFAR_MEAN = (0.485, 0.456, 0.406)
"""Red, green and blue mean, of pixels in 0..1, that the published weights were trained with (those of ImageNet)."""

CIFAR_STD = (0.229, 0.224, 0.225)
"""Red, green and blue standard deviation that the published weights were trained with (those of ImageNet)."""


def cifar_inputs(images: Tensor) -> Tensor:
    """Pixels, uint8 (batch, 3, H, W), as the published weights expect them: float32 of the same shape.

    Raises:
        DataError: other images than uint8 (batch, 3, H, W); floats may be scaled or normalised already.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"images are {images.dtype} {list(images.shape)}; give uint8 pixels of shape (batch, 3, H, W)")
    mean = torch.tensor(CIFAR_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(CIFAR_STD, device=images.device).view(3, 1, 1)
    return (images / 255 - mean) / std


class PaddedShortcut(nn.Module):
    """Option A: every other row and column, and a quarter of `outputs` channels of zeros on either side.

    (batch, outputs / 2, H, W) -> (batch, outputs, H / 2, W / 2), without a weight.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.padding = outputs // 4

    def forward(self, x: Tensor) -> Tensor:
        """One call."""
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"padding={self.padding}"


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (batch, inputs, H, W) -> (batch, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else PaddedShortcut(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """One call."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels with `blocks` blocks each: (batch, 3, 32, 32) -> (batch, outputs).

    The layers are `conv1`, `bn1`, `layerN.M.conv1`, `.bn1`, `.conv2`, `.bn2` and `linear`; the shortcuts have no state.
    """

    def __init__(self, *, blocks: int, outputs: int) -> None:
        super().__init__()
        require_positive({"blocks": blocks, "outputs": outputs})
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks=blocks)
        self.layer2 = _stage(16, 32, blocks=blocks)
        self.layer3 = _stage(32, 64, blocks=blocks)
        self.linear = nn.Linear(64, outputs)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """One call."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores


def resnet20(outputs: int = 10) -> CifarResNet:
    """ResNet-20 for CIFAR, 0.27 M parameters: (batch, 3, 32, 32) -> (batch, outputs).

    He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, arXiv:1512.03385.
    `cifar_inputs` normalises images for the published weights. Untrained, as He et al. (2015) initialise; ModelError
    for fewer than one output.
    """
    return CifarResNet(blocks=3, outputs=outputs)


def resnet32(outputs: int = 10) -> CifarResNet:
    """ResNet-32 for CIFAR, 0.46 M parameters; otherwise as `resnet20`."""
    return CifarResNet(blocks=5, outputs=outputs)


def resnet44(outputs: int = 10) -> CifarResNet:
    """ResNet-44 for CIFAR, 0.66 M parameters; otherwise as `resnet20`."""
    return CifarResNet(blocks=7, outputs=outputs)


def resnet56(outputs: int = 10) -> CifarResNet:
    """ResNet-56 for CIFAR, 0.85 M parameters; otherwise as `resnet20`."""
    return CifarResNet(blocks=9, outputs=outputs)


def _stage(inputs: int, outputs: int, *, blocks: int) -> nn.Sequential:
    """`blocks` blocks, the first of which halves the image where the channels double."""
    first = CifarBlock(inputs, outputs, stride=outputs // inputs)
    return nn.Sequential(first, *(CifarBlock(outputs, outputs, stride=1) for _ in range(1, blocks)))
