"""From a reference such as `torchvision:resnet18` to a network."""

import contextlib
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from spectrim.core.errors import ModelError, SpectrimError, did_you_mean
from spectrim.models.folders import load_pretrained
from spectrim.models.networks import NETWORKS
from spectrim.models.weights import fill_, read_state

_KINDS = "spectrim:NAME, pkg.module:factory, torchvision:NAME, timm:NAME or hf:DIR"
_WEIGHT_OPTIONS = ("weights", "pretrained", "checkpoint")

_Options = Mapping[str, object]


def resolve(reference: str, *, weights: str | Path | None = None, options: _Options | None = None) -> nn.Module:
    """The network that `reference` names, with the weights of a file if one is given.

    - `spectrim:resnet20`: one of `spectrim.models.NETWORKS`.
    - `torchvision:resnet18`, `timm:resnet18`: from an installed torchvision or timm, untrained. Nothing is downloaded.
    - `hf:DIR`: a folder that `save_pretrained` of transformers wrote, with its weights; see `load_pretrained`.
    - `pkg.module:factory`: imports the module and calls the function or class. THIS RUNS THE CODE OF THAT MODULE, with
      all that it imports: name only code that you trust. Modules in the current folder can be named too, and win over
      installed ones; the folder is on the import path only until the factory has returned.

    Args:
        reference: One of the above.
        weights: A file of the network's whole `state_dict()`: `.safetensors`, or `.pt` and the like from `torch.save`,
            which are read without running any code of theirs, and may be checkpoints with other entries.
        options: Keyword arguments of the factory, such as `{"outputs": 47}`.

    Returns:
        The module as the factory made it: its training flag, device and number types are not touched. That of a folder
        is in evaluation mode.

    Raises:
        ModelError: an unknown or malformed reference, a missing optional dependency, options that the factory does not
            take, a factory that fails or returns something else than an `nn.Module`.
        FileError: weights that are missing, damaged, unreadable without running code, or for another network.
    """
    source, _, name = reference.partition(":")
    if not (source and name):
        raise ModelError(_malformed(reference))
    # before the network, which may take long to make or may run code
    state = read_state(weights) if weights is not None else None
    model = _LOADERS.get(source, _from_module)(reference, name, options or {})
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise ModelError(f"{reference} returned a {kind}, not a torch.nn.Module; return the network itself")
    if state is not None and weights is not None:
        fill_(model, state, origin=Path(weights))
    return model


def _from_spectrim(reference: str, name: str, options: _Options) -> object:
    if name not in NETWORKS:
        near = did_you_mean(name, NETWORKS)
        raise ModelError(f"spectrim has no network {name!r}; {near}it has {', '.join(NETWORKS)}")
    return _call(reference, NETWORKS[name], options)


def _from_torchvision(reference: str, name: str, options: _Options) -> object:
    models = _optional("torchvision.models", install='"spectrim[vision]"')
    names = models.list_models()
    if name not in names:
        near = did_you_mean(name, names)
        raise ModelError(f"torchvision has no network {name!r}; {near}torchvision.models.list_models() names all")
    _refuse_weights(reference, options)
    # the backbones of detection and segmentation networks would be downloaded even for weights=None
    parameters = inspect.signature(models.get_model_builder(name)).parameters
    none = {parameter: None for parameter in parameters if parameter.startswith("weights")}
    return _call(reference, functools.partial(models.get_model, name, **none), options)


def _from_timm(reference: str, name: str, options: _Options) -> object:
    timm = _optional("timm", install="timm")
    if ":" in name or "/" in name:
        raise ModelError(f"{reference}: timm would read a hub or a folder for it; name one of timm.list_models()")
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        raise ModelError(f"timm has no network {name!r}; {near}timm.list_models() names all")
    _refuse_weights(reference, options)
    return _call(reference, functools.partial(timm.create_model, name, pretrained=False), options)


def _from_folder(reference: str, name: str, options: _Options) -> nn.Module:
    if options:
        raise ModelError(f"{reference} takes no options: its config.json says what the model is like")
    return load_pretrained(name)


def _from_module(reference: str, name: str, options: _Options) -> object:
    module = reference.partition(":")[0]
    if module.endswith(".py") or not all(part.isidentifier() for part in module.split(".")):
        raise ModelError(_malformed(reference))
    return call_factory(reference, options, what="a network")


def call_factory(reference: str, options: _Options, *, what: str) -> object:
    """What `pkg.module:factory` returns. THIS RUNS THE CODE OF THAT MODULE; `what` says what it makes, for messages.

    Raises:
        ModelError: there is no such module or function, it does not take the options, or it fails.
    """
    with _current_folder_importable():
        return _call(reference, _function(reference, what), options, what=what)


def load_function(reference: str, *, what: str) -> Callable[..., Any]:
    """The function that `pkg.module:function` names. THIS RUNS THE CODE OF THAT MODULE; raises as `call_factory`."""
    with _current_folder_importable():
        return _function(reference, what)


def _function(reference: str, what: str) -> Callable[..., Any]:
    module, _, name = reference.partition(":")
    function = _attribute(reference, _imported(module), name)
    if isinstance(function, nn.Module) or not callable(function):
        kind = type(function).__name__
        raise ModelError(f"{reference} is a {kind}, not a function; name a function that makes {what}")
    return function


_LOADERS: Mapping[str, Callable[[str, str, _Options], object]] = {
    "spectrim": _from_spectrim,
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "hf": _from_folder,
}


def _call(reference: str, factory: Callable[..., object], options: _Options, *, what: str = "a network") -> object:
    """What the factory returns, once it is known to take the options."""
    signature: inspect.Signature | None = None
    with contextlib.suppress(TypeError, ValueError):  # of the few callables written in C that have none
        signature = inspect.signature(factory)
    if signature is not None:
        try:
            signature.bind(**options)
        except TypeError as error:
            names = ", ".join(map(str, options)) or "no options"
            raise ModelError(f"{reference} cannot be called with {names}: {error}; it takes {signature}") from error
    try:
        return factory(**options)
    except SpectrimError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{reference} failed to make {what}: {_text(error)}") from error


def _attribute(reference: str, module: ModuleType, path: str) -> object:
    value: object = module
    for name in path.split("."):
        try:
            value = getattr(value, name)
        except AttributeError as error:
            near = did_you_mean(name, (known for known in dir(value) if not known.startswith("_")))
            advice = f"{near}name a function of {module.__name__}"
            raise ModelError(f"{reference}: there is no {name!r}; {advice}") from error
        except Exception as error:  # modules may compute their names
            raise ModelError(f"{reference} cannot be imported: {_text(error)}") from error
    return value


def _imported(name: str) -> ModuleType:
    importlib.invalidate_caches()  # the module may have been written a moment ago
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None:
            message = f"{name} cannot be imported: {_text(error)}"
        elif missing == name or name.startswith(f"{missing}."):
            near = did_you_mean(missing, _siblings(missing))
            message = f"there is no module {missing!r}; {near}install it, or run this in the folder that holds it"
        else:
            message = f"{name} needs the module {missing!r}, which is not installed; install it"
        raise ModelError(message) from error


def _siblings(name: str) -> list[str]:
    """Modules beside `name`: in its package, or in the current folder."""
    parent = name.rpartition(".")[0]
    folders = getattr(sys.modules.get(parent), "__path__", []) if parent else [str(Path.cwd())]
    return [f"{parent}.{module.name}".lstrip(".") for module in pkgutil.iter_modules(folders)]


@contextlib.contextmanager
def _current_folder_importable() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        # what the module itself added to the path stays
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _optional(name: str, *, install: str) -> ModuleType:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name in (name, package)
        why = "is not installed" if absent else f"is installed, but cannot be imported ({_text(error)})"
        raise ModelError(f"{package} {why}; run: pip install {install}") from error


def _refuse_weights(reference: str, options: _Options) -> None:
    for option in options:
        if str(option).startswith(_WEIGHT_OPTIONS):
            raise ModelError(
                f"{reference}: the option {option!r} would fetch weights; give them as a .safetensors file"
            )


def _malformed(reference: str) -> str:
    if reference in NETWORKS:
        return f"{reference!r} names no source; write spectrim:{reference}"
    module, _, name = reference.partition(":")
    dotted = module.removesuffix(".py").replace("\\", "/").replace("/", ".").strip(".")
    example = f"; write {dotted}:{name}" if module != dotted and dotted and name else ""
    with contextlib.suppress(OSError):  # of what is longer than names of files are
        if reference and Path(reference).exists():
            example = "; its weights go to --weights (--against-weights), or write hf: before a folder of Hugging Face"
    return f"{reference!r} does not name a network{example}. Supported are {_KINDS}"


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
