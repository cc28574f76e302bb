"""A plain state into a network: from a safetensors file, one that torch saved, or ImageNet's from torchvision."""

import importlib
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spectrim.core.errors import DependencyError, FileError, ModelError
from spectrim.core.execution import fill_state

_TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl", ".pickle")
_ENTRIES = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
"""Where a checkpoint keeps the network's state beside other things, the most explicit name first."""

_WRAPPERS = ("module", "_orig_mod", "model", "net", "network")
"""What `DataParallel`, `torch.compile` and training frameworks put in front of all names."""


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a network by name, from a `.safetensors` file or one that torch saved (`.pt`, `.pth`, ..).

    What torch saved is read with `weights_only=True`, which runs none of the file's code. It may be a checkpoint that
    holds the state in an entry such as "state_dict" or "model".

    Raises `FileError` for a file that is missing, damaged, of another kind, or could be read only by running its code.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in _TORCH_FILES:
        return _state_in(_read_torch_file(path), path)
    if suffix != ".safetensors":
        raise FileError(f"{path} is neither a .safetensors file nor one that torch saved ({', '.join(_TORCH_FILES)})")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FileError(f"cannot read {path}: {error}; it is missing, cut short, or not a safetensors file") from error


def _read_torch_file(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileError(f"cannot read {path}: {error}; it is missing, or no file") from error
    except pickle.UnpicklingError as error:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
        raise FileError(
            f"cannot read {path} without running code that it may hold, never done ({reason[0][:99]}). If you "
            "trust it, load it where it was made and save the state alone: torch.save(model.state_dict(), 'weights.pt')"
        ) from error
    except Exception as error:  # whatever a damaged file leads to
        kind = type(error).__name__
        raise FileError(f"cannot read {path}: it is damaged, cut short, or no file of torch.save ({kind})") from error


def _state_in(value: object, path: Path) -> dict[str, Tensor]:
    """The network's state, or the entry of a checkpoint that is one."""
    if _is_state(value):
        return dict(value)  # type: ignore[call-overload,no-any-return]
    entries = {name: entry for name, entry in value.items() if _is_state(entry)} if isinstance(value, Mapping) else {}
    names = [name for name in _ENTRIES if name in entries] or (list(entries) if len(entries) == 1 else [])
    if not names:
        entries_of = f"entries {', '.join(map(repr, list(value)[:5]))}" if isinstance(value, Mapping) else "no entries"
        raise FileError(
            f"{path} holds a {type(value).__name__} with {entries_of}, of which none is a network's state; save that "
            "alone: torch.save(model.state_dict(), 'weights.pt')"
        )
    if len(entries) > 1:
        others = ", ".join(repr(name) for name in entries if name != names[0])
        warnings.warn(f"{path}: the weights are those of its entry {names[0]!r}; it also has {others}", stacklevel=4)
    return dict(entries[names[0]])


def _is_state(value: object) -> bool:
    entries = value.items() if isinstance(value, Mapping) else ()
    return bool(entries) and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in entries)


def is_saved(path: Path) -> bool:
    """Whether `spectrim.save` wrote a file; not if it cannot be read, which says itself why."""
    try:
        with safe_open(path, framework="pt") as opened:
            return "spectrim" in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def fill_(model: nn.Module, state: Mapping[str, Tensor], *, origin: Path) -> None:
    """Load `state`, from the file `origin`, into `model`, strictly: every tensor of the network, and no other.

    As in `load_state_dict`, number types are those of the model, and the batch counters of normalisation layers may be
    missing. A tensor that the model has under several names needs only one of them. Prefixes that wrappers give to all
    names, such as `module.`, are left out with a warning if no name fits with them. After an error the model is not to
    be used.

    Raises `FileError`, with at most three names of each fault, for a file of another network, and `ModelError` for a
    network that has no memory to load into.
    """
    expected = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    if any(tensor.is_meta for tensor in expected.values()):
        raise ModelError(f"the network is on the meta device and cannot take the weights of {origin}; make it on a CPU")
    state = _without_wrappers(state, expected, origin=origin)
    _require_none(_misfits(state, expected), origin=origin)
    # a safetensors file holds a tied weight under one of its names
    stored = {id(expected[name]): tensor for name, tensor in state.items() if name in expected}
    tied = {name: stored[id(tensor)] for name, tensor in expected.items() if id(tensor) in stored}
    try:
        keys = _load({**tied, **state}, model)
    except RuntimeError as error:
        raise FileError(f"{origin} is for another network: {error}") from error
    _require_none({"missing": keys.missing_keys, "not in the network": keys.unexpected_keys}, origin=origin)


def fill_imagenet_(model: nn.Module, reference: str, *, head: str) -> None:
    """Load torchvision's default ImageNet weights into `model`, all but those of its last layer, the `head`.

    torchvision fetches and checks the file, and keeps it in torch's cache; `reference` names the network, such as
    `torchvision:resnet18`. The model is changed only when everything fits.

    Raises `DependencyError` where torchvision is not installed, and `ModelError` for a network that is not
    torchvision's, or weights that cannot be fetched or do not fit.
    """
    source, _, name = reference.partition(":")
    if source != "torchvision":
        raise ModelError(
            f"{reference}: only networks of torchvision have ImageNet weights here, such as torchvision:resnet18"
        )
    fetched = {key: value for key, value in _fetch_imagenet(name).items() if not key.startswith(f"{head}.")}
    expected = {key: value for key, value in model.state_dict().items() if not key.startswith(f"{head}.")}
    differing = expected.keys() ^ fetched.keys()
    differing |= {key for key in expected.keys() & fetched.keys() if expected[key].shape != fetched[key].shape}
    if differing:
        names = ", ".join(sorted(differing)[:3])
        raise ModelError(f"torchvision's weights of {name} do not fit this network: {names} differ")
    model.load_state_dict(fetched, strict=False)


def _without_wrappers(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, origin: Path
) -> dict[str, Tensor]:
    """The state with names as the network's, if it was saved from inside of wrappers."""
    wrappers = ""
    names = {name: name for name in state}
    while names and not expected.keys() & set(names.values()):
        first = {name.rpartition(".")[0].partition(".")[0] for name in names.values()}
        if len(first) != 1 or not first <= set(_WRAPPERS):
            return dict(state)
        wrappers += f"{first.pop()}."
        names = {name: name.removeprefix(wrappers) for name in state}
    if wrappers:
        warnings.warn(f"{origin} was saved from a wrapper: {wrappers!r} is left out of all names", stacklevel=4)
    return {inner: state[name] for name, inner in names.items()}


def _misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Mismatches that torch would report at length, or cast silently."""
    shapes, types = [], []
    for name, tensor in expected.items():
        if name not in state or is_lazy(tensor):
            continue
        stored = state[name]
        if stored.is_nested or stored.shape != tensor.shape:
            sizes = "nested" if stored.is_nested else list(stored.shape)
            shapes.append(f"{name} {sizes}, the network's is {list(tensor.shape)}")
        elif stored.is_floating_point() != tensor.is_floating_point() or _overflows(stored, tensor.dtype):
            types.append(f"{name} {stored.dtype}, the network's is {tensor.dtype}")
    return {"of another shape": shapes, "of another type": types}


def _load(state: Mapping[str, Tensor], model: nn.Module) -> Any:
    """As `load_state_dict` without `strict`; the state has no version, which some networks want to know."""
    try:
        return model.load_state_dict(state, strict=False)
    except ValueError:
        return fill_state(model, state, strict=False)


def _overflows(stored: Tensor, dtype: torch.dtype) -> bool:
    """Whether finite values become infinite in a number type."""
    if not stored.is_floating_point() or torch.finfo(stored.dtype).max <= torch.finfo(dtype).max:
        return False
    return bool((stored.to(dtype).isinf() & ~stored.isinf()).any())


def _require_none(faults: Mapping[str, list[str]], *, origin: Path) -> None:
    """FileError that lists at most three names of each fault, if there is one."""
    if not any(faults.values()):
        return
    texts = [
        f"{len(names)} {fault}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for fault, names in faults.items()
        if names
    ]
    advice = (
        "spectrim.save wrote it: make the network without weights, then spectrim.load(file, network)"
        if is_saved(origin)
        else "Names and shapes must be those of the network's state_dict(); do its options, such as outputs, fit?"
    )
    raise FileError(f"{origin} is for another network: {'; '.join(texts)}. {advice}")


def _fetch_imagenet(name: str) -> dict[str, Any]:
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
