"""The state of a model: its tensors by name, those that have several names once."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from spectrim.core.errors import ModelError


def fill_state(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True, assign: bool = False) -> Any:
    """As `model.load_state_dict`, for a state that is of the model's own version: some networks convert older ones."""
    versioned = OrderedDict(state)
    versioned._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]
    return model.load_state_dict(versioned, strict=strict, assign=assign)


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state of `model` with each shared tensor once, and for every other name the one that holds its tensor.

    Returns:
        tensors by name, and aliases from name to the name in the first mapping.

    Raises:
        ModelError: a state that is not a tensor, as quantised layers have, or one without a shape, as lazy layers have.
    """
    state, aliases = distinct_state(model)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the model's state {name!r} is a {type(value).__name__}, not a tensor, and cannot be saved; "
                "if the layer is quantised, compress the model first and quantise it afterwards"
            )
        if isinstance(value, UninitializedParameter | UninitializedBuffer):
            raise ModelError(f"the model's state {name!r} has no shape yet; run the model once")
    return {name: value.detach() for name, value in state.items()}, aliases


def distinct_state(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """As `unique_tensors`, with whatever else the state holds."""
    state = model.state_dict(keep_vars=True)
    first = {id(value): name for name, value in reversed(state.items())}
    aliases = {name: first[id(value)] for name, value in state.items() if first[id(value)] != name}
    return {name: value for name, value in state.items() if name not in aliases}, aliases
