"""Spectrim's own networks: the fully connected one of SVD studies, a mini-ResNet, and the ResNets for CIFAR."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectrim.core.errors import DataError, ModelError

CIFAR_MEAN = (0.485, 0.456, 0.406)
"""Red, green and blue mean, of pixels in 0..1, that the published weights were trained with (those of ImageNet)."""

CIFAR_STD = (0.229, 0.224, 0.225)
"""Red, green and blue standard deviation that the published weights were trained with (those of ImageNet)."""


def mlp(inputs: int = 784, outputs: int = 10, *, width: int = 1024, hidden: int = 5) -> nn.Sequential:
    """Flatten, then `hidden` layers `fc1..` of `width` with ReLU, then `head`: (batch, ...) -> (batch, outputs)."""
    _require_positive({"inputs": inputs, "outputs": outputs, "width": width, "hidden": hidden})
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number in range(1, hidden + 1):
        layers[f"fc{number}"] = nn.Linear(inputs if number == 1 else width, width)
        layers[f"relu{number}"] = nn.ReLU()
    layers["head"] = nn.Linear(width, outputs)
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (batch, inputs, H, W) -> (batch, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, shortcut: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut()

    def forward(self, x: Tensor) -> Tensor:
        """One call."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


def _stage(inputs: int, outputs: int, *, blocks: int, stride: int, shortcut: Callable[[], nn.Module]) -> nn.Sequential:
    """`blocks` blocks; the first has the stride and the shortcut, the others keep the shape."""
    first = BasicBlock(inputs, outputs, stride=stride, shortcut=shortcut)
    others = (BasicBlock(outputs, outputs, stride=1, shortcut=nn.Identity) for _ in range(1, blocks))
    return nn.Sequential(first, *others)


class MiniResNet(nn.Module):
    """A 3x3 convolution, three stages of two blocks that each halve the image, and two dense layers.

    The layers are `conv1`, `bn1`, `layerN.M.conv1`, `.bn1`, `.conv2`, `.bn2`, in the first block of each stage also
    `.shortcut.conv` and `.shortcut.bn`, then `hidden` and `head`.
    """

    def __init__(self, *, outputs: int, channels: int, width: int, hidden: int) -> None:
        super().__init__()
        _require_positive({"outputs": outputs, "channels": channels, "width": width, "hidden": hidden})

        def stage(inputs: int, outputs: int) -> nn.Sequential:
            def projection() -> nn.Module:
                conv = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)
                return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))

            return _stage(inputs, outputs, blocks=2, stride=2, shortcut=projection)

        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(width, width)
        self.layer2 = stage(width, 2 * width)
        self.layer3 = stage(2 * width, 4 * width)
        self.hidden = nn.Linear(4 * width, hidden)
        self.head = nn.Linear(hidden, outputs)
        for weight in self.parameters():
            if weight.ndim == 4:
                nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """One call."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        scores: Tensor = self.head(functional.relu(self.hidden(x)))
        return scores


def mini_resnet(outputs: int = 10, channels: int = 1, *, width: int = 32, hidden: int = 512) -> MiniResNet:
    """A mini-ResNet for MNIST, EMNIST and Fashion-MNIST: (batch, channels, 28, 28) -> (batch, outputs).

    For studies of compression on a network that trains in minutes without a GPU and yet holds every kind of layer
    that low-rank factors apply to: strided and unstrided 3x3 convolutions, 1x1 projections, and dense layers.
    Residual blocks are those of He et al. (2016), arXiv:1512.03385, with projection shortcuts (option B).

    At its defaults it has 767,018 parameters (785,999 for the 47 classes of EMNIST Balanced) and takes 22.5 M MACs an
    image. Images pass the stages at 14x14, 7x7 and 4x4 pixels and are averaged before `hidden`, so other sizes work.

    Args:
        outputs: Classes.
        channels: Of the images.
        width: Channels of the first stage; the second has twice, the third four times as many.
        hidden: Outputs of the dense layer between the average and the head.

    Raises:
        ModelError: a size below one.
    """
    return MiniResNet(outputs=outputs, channels=channels, width=width, hidden=hidden)


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


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels with `blocks` blocks each: (batch, 3, 32, 32) -> (batch, outputs).

    The layers are `conv1`, `bn1`, `layerN.M.conv1`, `.bn1`, `.conv2`, `.bn2` and `linear`; the shortcuts have no state.
    """

    def __init__(self, *, blocks: int, outputs: int) -> None:
        super().__init__()
        _require_positive({"blocks": blocks, "outputs": outputs})
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks=blocks, stride=1, shortcut=nn.Identity)
        self.layer2 = _stage(16, 32, blocks=blocks, stride=2, shortcut=partial(PaddedShortcut, 32))
        self.layer3 = _stage(32, 64, blocks=blocks, stride=2, shortcut=partial(PaddedShortcut, 64))
        self.linear = nn.Linear(64, outputs)
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.kaiming_normal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """One call."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.linear(functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores


def resnet20(outputs: int = 10) -> CifarResNet:
    """ResNet-20 for CIFAR, 0.27 M parameters: (batch, 3, 32, 32) -> (batch, outputs).

    He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2, arXiv:1512.03385, as
    published with trained weights: option-A shortcuts, no projections. `cifar_inputs` normalises images for these
    weights. Untrained, as He et al. (2015) initialise; ModelError for fewer than one output.
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


def cifar_inputs(images: Tensor) -> Tensor:
    """Pixels, uint8 (batch, 3, H, W), as the published weights expect them: float32 of the same shape.

    Raises `DataError` for any other tensor; floats may be scaled or normalised already.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"images are {images.dtype} {list(images.shape)}; give uint8 pixels of shape (batch, 3, H, W)")
    mean, std = (torch.tensor(own, device=images.device).view(3, 1, 1) for own in (CIFAR_MEAN, CIFAR_STD))
    return (images / 255 - mean) / std


NETWORKS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {factory.__name__: factory for factory in (mlp, mini_resnet, resnet20, resnet32, resnet44, resnet56)}
)
"""Every network of `spectrim.models` by name; each has a size for every argument, so it can be called without any."""


def _require_positive(sizes: Mapping[str, object]) -> None:
    """ModelError unless every size is a whole number of at least 1; torch itself builds layers of size 0."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ModelError(f"{name} is {size!r}; give a whole number of at least 1")
