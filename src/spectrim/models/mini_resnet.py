"""A small residual network for one-channel images of 28x28, with convolutions and dense layers worth factoring."""

from torch import Tensor, nn
from torch.nn import functional

from spectrim.models.sizes import require_positive


class Projection(nn.Module):
    """The shortcut of a block that changes the shape: a strided 1x1 convolution `conv` and its normalisation `bn`."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """One call."""
        y: Tensor = self.bn(self.conv(x))
        return y


class MiniBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (batch, inputs, H, W) -> (batch, outputs, H / stride, W / stride)."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else Projection(inputs, outputs, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """One call."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class MiniResNet(nn.Module):
    """A 3x3 convolution, three stages of two blocks that each halve the image, and two dense layers.

    The layers are `conv1`, `bn1`, `layerN.M.conv1`, `.bn1`, `.conv2`, `.bn2`, in the first block of each stage also
    `.shortcut.conv` and `.shortcut.bn`, then `hidden` and `head`.
    """

    def __init__(self, *, outputs: int, channels: int, width: int, hidden: int) -> None:
        super().__init__()
        require_positive({"outputs": outputs, "channels": channels, "width": width, "hidden": hidden})
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width)
        self.layer2 = _stage(width, 2 * width)
        self.layer3 = _stage(2 * width, 4 * width)
        self.hidden = nn.Linear(4 * width, hidden)
        self.head = nn.Linear(hidden, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

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


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(MiniBlock(inputs, outputs, stride=2), MiniBlock(outputs, outputs, stride=1))
