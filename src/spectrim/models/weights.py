"""A plain state into a network: from a safetensors file, one that torch saved, or ImageNet's from torchvision."""

import importlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from spectrim.core.errors import DependencyError, FileError, ModelError, warn
from spectrim.core.file_kinds import SAVE_STATE, STATES, why_no_weights
from spectrim.core.state import fill_state

_AROUND = (*STATES, "ema", "model_ema", "checkpoint")
_NOT_SAVED = "_non_persistent_buffers_set"


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a network by name, from a safetensors file or one that torch saved (`.pt`, `.pth`, ..).

    What torch saved is read with `weights_only=True`, which runs none of the file's code. It may be a whole module, or
    a checkpoint that holds the state in an entry such as "state_dict" or "model", or in an entry of one. Other objects
    in it, such as the arguments of a script, are passed over without their classes.

    Raises `FileError` for a file that is missing, damaged, of another kind, or could be read only by running its code.
    """
    if reason := why_no_weights(path):
        raise FileError(f"cannot read {path}: it is {reason}")
    path = Path(path)
    try:
        with path.open("rb") as opened:
            start = opened.read(9)
        if start[4:] == b"\0\0\0\0{":  # the rest of the header's length, and the header
            return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FileError(f"cannot read {path}: {error}; it is cut short, damaged, or no file") from error
    if start[:2] != b"PK" and start[:1] != b"\x80":
        raise FileError(f"cannot read {path}: it is empty, cut short, or holds no weights; save them: {SAVE_STATE}")
    return _state_in(_with_states(_read_torch_file(path)), path)


class _Unread:
    """In the place of an object in a file whose class is not looked up, so that no code of it runs."""

    attributes: Mapping[str, Any] = MappingProxyType({})

    def __new__(cls, *args: object, **kwargs: object) -> "_Unread":
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        """As little as possible: a class may be called, or only made and given its attributes."""

    def __setstate__(self, state: object) -> None:
        self.attributes = state if isinstance(state, Mapping) else {}


def _read_torch_file(path: Path) -> object:
    classes: list[str] = []
    try:
        # torch goes by the name of a path; it warns of pickles by other programs
        with warnings.catch_warnings(action="ignore"), path.open("rb") as opened:
            if zipfile.is_zipfile(opened):
                opened.seek(0)
                classes = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(opened))
            opened.seek(0)
            unread: list[Any] = [(_Unread, name) for name in classes]
            with torch.serialization.safe_globals(unread):
                return torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        kind = f" ({classes[0]})" if classes else ""
        raise FileError(
            f"cannot read {path} without running code that it may hold, never done{kind}. In the program that wrote "
            f"it, save the state alone: {SAVE_STATE}"
        ) from error
    except Exception as error:  # whatever a damaged file leads to
        kind = type(error).__name__
        raise FileError(f"cannot read {path}: it is damaged, cut short, or no file of torch.save ({kind})") from error


def _with_states(value: object) -> object:
    """The same, with its state in the place of each whole module."""
    if isinstance(value, Mapping):
        return {name: _with_states(entry) for name, entry in value.items()}
    is_module = isinstance(value, _Unread) and isinstance(value.attributes.get("_modules"), Mapping)
    return _state_of(value) if is_module else value


def _state_of(module: Any) -> dict[str, Tensor]:
    parts = module.attributes
    buffers = {name: tensor for name, tensor in parts["_buffers"].items() if name not in parts[_NOT_SAVED]}
    own = {name: tensor.detach() for name, tensor in (parts["_parameters"] | buffers).items() if tensor is not None}
    children = {name: child for name, child in parts["_modules"].items() if isinstance(child, _Unread)}
    return own | {f"{at}.{name}": tensor for at, child in children.items() for name, tensor in _state_of(child).items()}


def _state_in(value: object, path: Path) -> dict[str, Tensor]:
    """The network's state, or the entry of a checkpoint that is one."""
    for _ in range(4):
        entries = value if isinstance(value, Mapping) else {}
        tensors = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
        others = [repr(name) for name in entries if name not in tensors]
        if len(others) < len(tensors) and _is_state(tensors) and not any(_is_state(entries.get(n)) for n in _AROUND):
            if others:
                warn(f"{path}: {', '.join(others[:3])} beside the weights are left out")
            return tensors
        states = [name for name, entry in entries.items() if _is_state(entry)]
        known = [name for name in _AROUND if name in states or (not states and isinstance(entries.get(name), Mapping))]
        name = next(iter(known or states), None)
        if name is None or (len(states) > 1 and not known):
            break
        if len(states) > 1:
            rest = ", ".join(repr(state) for state in states if state != name)
            warn(f"{path}: the weights are those of its entry {name!r}; it also has {rest}")
        value = entries[name]
    listed = f"entries {', '.join(map(repr, list(entries)[:5]))}" if entries else "no entries"
    advice = f"torch.save(torch.load({str(path)!r}, weights_only=True)[{name!r}], 'weights.pt')" if name else SAVE_STATE
    raise FileError(f"{path} holds a {type(value).__name__} with {listed}, not one state; save it alone: {advice}")


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
    missing. A tensor that the model has under several names needs only one of them. What stands in front of all names,
    such as `module.`, is left out with a warning. After an error the model is not to
    be used.

    Raises `FileError`, with at most three names of each fault, for a file of another network, and `ModelError` for a
    network that has no memory to load into.
    """
    expected = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    if any(tensor.is_meta for tensor in expected.values()):
        raise ModelError(f"the network is on the meta device and cannot take the weights of {origin}; make it on a CPU")
    state = _renamed(state, expected, origin=origin)
    _require_none(_misfits(state, expected), origin=origin)
    # a safetensors file holds a tied weight under one of its names
    stored = {id(expected[name]): tensor for name, tensor in state.items() if name in expected}
    tied = {name: stored[id(tensor)] for name, tensor in expected.items() if id(tensor) in stored}
    differing = [name for name in tied if name in state and not _same(state[name], tied[name])]
    if differing:
        raise FileError(f"{origin} has two different weights for one of the network: {', '.join(differing[:3])}")
    try:
        keys = _load({**tied, **state}, model)
    except RuntimeError as error:
        raise FileError(f"{origin} is for another network: {error}") from error
    _require_none({"missing": keys.missing_keys, "not in the network": keys.unexpected_keys}, origin=origin)


def _same(first: Tensor, second: Tensor) -> bool:
    return first is second or torch.allclose(first.double(), second.double(), rtol=0, atol=0, equal_nan=True)


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


def _renamed(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, origin: Path) -> dict[str, Tensor]:
    """The state with names as the network's, if something stands in front of all of them, as wrappers put there."""
    needed = [name for name in expected if not name.endswith("num_batches_tracked")]
    fronts = {stored.removesuffix(name): 0 for name in needed for stored in state if stored.endswith(f".{name}")}

    def fits(front: str) -> bool:  # of a tied weight one name is enough
        covered = {id(expected[name]) for name in needed if front + name in state}
        return all(id(expected[name]) in covered for name in needed)

    fitting = list(filter(fits, ("", *fronts)))
    if fitting == [""] or len(fitting) != 1:
        return dict(state)
    (front,) = fitting
    others = [repr(name) for name in state if not name.startswith(front)]
    omitted = f"; so are others without it, such as {others[0]}" if others else ""
    warn(f"{origin} was saved from a wrapper: {front!r} is left out of all names{omitted}")
    return {name.removeprefix(front): tensor for name, tensor in state.items() if name.startswith(front)}


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
    some = [(kind, names) for kind, names in faults.items() if names]
    if not some:
        return
    texts = [f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" for kind, names in some]
    advice = "Names and shapes must be those of the network's state_dict(); do its options, such as outputs, fit?"
    if is_saved(origin):
        advice = "spectrim.save wrote it: make the network without weights, then spectrim.load(file, network)"
    elif any(name.endswith((".down.weight", ".up.weight")) for names in faults.values() for name in names):
        advice = (
            "It may hold the factors of a compressed network without its structure: keep one with st.save(model, "
            "'small.safetensors'), or make it again by its plan, st.compress(network, plan, example_inputs=..), before "
            "load_state_dict"
        )
    elif (origin.parent / "config.json").is_file():
        advice = f"It lies in {why_no_weights(origin.parent)}"
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
