"""torchvision's own weights of a network, fetched by torchvision."""

import importlib
from typing import Any

from torch import nn

from spectrim.core.errors import DependencyError, ModelError


def fill_(model: nn.Module, reference: str, *, head: str) -> None:
    """Load torchvision's default ImageNet weights into `model`, all but those of the layer `head`.

    torchvision fetches and checks the file, and keeps it in torch's cache; the network has to be torchvision's.

    Args:
        model: Made by torchvision, with any number of outputs; changed only when everything fits.
        reference: Such as `torchvision:resnet18`.
        head: The last layer, whose outputs are other classes.

    Raises:
        DependencyError: torchvision is not installed.
        ModelError: a network that is not torchvision's, or weights that cannot be fetched or do not fit.
    """
    source, _, name = reference.partition(":")
    if source != "torchvision":
        raise ModelError(
            f"{reference}: only networks of torchvision have ImageNet weights here, such as torchvision:resnet18"
        )
    fetched = {key: value for key, value in _fetch(name).items() if not key.startswith(f"{head}.")}
    expected = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{head}.")}
    differing = expected.keys() ^ fetched.keys()
    differing |= {key for key in expected.keys() & fetched.keys() if expected[key].shape != fetched[key].shape}
    if differing:
        names = ", ".join(sorted(differing)[:3])
        raise ModelError(f"torchvision's weights of {name} do not fit this network: {names} differ")
    model.load_state_dict(fetched, strict=False)


def _fetch(name: str) -> dict[str, Any]:
    try:
        models = importlib.import_module("torchvision.models")
    except ImportError as error:
        raise DependencyError(
            f'ImageNet weights need torchvision ({error}); run: pip install "spectrim[vision]"'
        ) from error
    try:
        weights = models.get_model_weights(name).DEFAULT
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except Exception as error:
        raise ModelError(
            f"torchvision could not fetch its ImageNet weights of {name} ({type(error).__name__}: {error}); give a "
            "file with --weights FILE.safetensors, or leave the option out to train from scratch"
        ) from error
