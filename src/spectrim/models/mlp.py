"""The fully connected network of the classic SVD-compression studies."""

from collections import OrderedDict

from torch import nn

from spectrim.models.sizes import require_positive


def mlp(inputs: int = 784, outputs: int = 10, *, width: int = 1024, hidden: int = 5) -> nn.Sequential:
    """Flatten, then `hidden` layers `fc1..` of `width` with ReLU, then `head`: (batch, ...) -> (batch, outputs)."""
    require_positive({"inputs": inputs, "outputs": outputs, "width": width, "hidden": hidden})
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number in range(1, hidden + 1):
        layers[f"fc{number}"] = nn.Linear(inputs if number == 1 else width, width)
        layers[f"relu{number}"] = nn.ReLU()
    layers["head"] = nn.Linear(width, outputs)
    return nn.Sequential(layers)
