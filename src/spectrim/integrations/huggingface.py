"""Hugging Face folders: `save_pretrained` and `from_pretrained` of transformers, for models with factored layers.

`import spectrim` imports this module as soon as transformers is imported, before or after it. Then every
`PreTrainedModel` with factored layers has an `hf_quantizer`, which transformers asks for whatever it saves: it puts the
structure into `config.json` as `quantization_config`, with the `quant_method` "spectrim", and next to the factors of
each layer one number under the name of the dense weight. A program that does not import spectrim stops at the wrong
size of that number, where it would only warn of weights that are missing, and make random ones.

Tested with transformers 4.57.6 (these tests, those of the command line, of token masks, attention, embeddings and
recipes), 5.17 and 5.24, accelerate 1.15, PEFT 0.21 and sentence-transformers 6.2, in one process. Folders of 4.57 are
read by 5.24, and the other way round.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import spectrim
from spectrim.core.errors import FileError, ModelError
from spectrim.core.files import parse
from spectrim.core.state import unique_tensors
from spectrim.integrations.shards import renaming
from spectrim.layers.factored import FactoredLayer, low_rank_layers
from spectrim.layers.replacement import compressed_layers, names_of
from spectrim.layers.structure import Structure, rebuild, structure_of

_METHOD, _GGUF = "spectrim", "gguf"
_MAJOR = int(transformers.__version__.partition(".")[0])
if _MAJOR >= 5:
    from transformers.core_model_loading import revert_weight_conversion
_ALIGNMENT = 64
"""Bytes; torch's allocator for the CPU."""
_WAY_OUT = "keep it with st.save(model, path), or make it dense: st.merge(model).save_pretrained(folder)"


@register_quantization_config(_METHOD)
class FactoredConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model with factored layers.

    Attributes:
        structure: A `Structure` as JSON.
        quant_method: `spectrim`.
    """

    def __init__(self, structure: dict[str, Any], quant_method: str = _METHOD) -> None:
        self.structure = structure
        self.quant_method: Any = quant_method


@register_quantizer(_METHOD)
class FactoredQuantizer(HfQuantizer):
    """Builds factored layers before weights are loaded, and describes those of a model that is saved.

    For transformers all that changes layers between a configuration and its weights is a quantizer; no bits are lost.
    """

    quantization_config: FactoredConfig
    requires_calibration = True  # refuses a FactoredConfig for a folder of dense weights
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        """Whether the model can be saved.

        Raises:
            ModelError: transformers is too old to be told what to write.
        """
        if not hasattr(HfQuantizer, "get_state_dict_and_metadata"):
            raise ModelError(f"this version of transformers cannot save factored layers, 4.57 can; or {_WAY_OUT}")
        return True

    def get_state_dict_and_metadata(
        self, model: Any, safe_serialization: Any = None
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` is to write; sets the model's `quantization_config`, or removes one that is not true.

        Raises:
            ModelError: factored layers that are tied to others, have adapters in them, or that transformers 5 splits
                in files.
        """
        own_state = _STATE_TO_SAVE.get()
        if getattr(model, "_hf_peft_config_loaded", False):  # of which only the adapter is saved
            return own_state, {}
        structure = structure_of(model)
        tied = _tied_factors(model)
        _require_untied(model, structure, tied)
        _require_own_biases(model, structure)
        stored = _names_in_file(model, structure.names)
        state: dict[str, Tensor] = model.state_dict() if own_state is None else own_state
        if structure.names and _MAJOR < 5 and any(tensor.is_meta for tensor in state.values()):
            raise ModelError("transformers 4 cannot save factored layers that are offloaded; load without device_map")
        for module in model.modules():
            if _is_described(module):
                del module.config.quantization_config
                vars(module.config).pop("_pre_quantization_dtype", None)  # transformers 4 fails to write it alone
        if not structure.names:
            return own_state, {}
        described = Structure(
            low_rank={stored[name]: layer for name, layer in structure.low_rank.items()},
            same_layer={},
            narrowed={stored[name]: layer for name, layer in structure.narrowed.items()},
        )
        model.config.quantization_config = FactoredConfig(described.model_dump(mode="json"))
        unread = (*structure.low_rank, *(name for name, layer in structure.narrowed.items() if layer.heads))
        markers = {f"{name}.weight": torch.full((1,), torch.nan) for name in unread}
        absent = {*tied, *(f"{name.rsplit('.', 2)[0]}.weight" for name in tied)}
        return {name: tensor for name, tensor in (state | markers).items() if name not in absent}, {}

    def update_missing_keys(self, model: Any, missing_keys: list[str], base_model_prefix: str) -> list[str]:
        """Of transformers 4, which does not show its files: refuses those that miss a factor.

        Before it reads a file, transformers 4 has some modules fill the weights of layers inside them with random
        numbers, as CLIP's embeddings do; those with factored layers, none of whose weights is missing, are left out.

        Raises:
            FileError: one is missing.
        """
        layers = compressed_layers(model)
        factors = tuple(f"{name}." for name in layers)
        if missing := [key for key in missing_keys if key.startswith(factors)]:
            raise _other_weights(missing[0], "not in", model)
        for parent in {name.rpartition(".")[0] for name in layers}:
            if not any(key.startswith(f"{parent}.".lstrip(".")) for key in missing_keys):
                model.get_submodule(parent)._is_hf_initialized = True
        return missing_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        origin = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
        if getattr(model.config, "distributed_config", None) is not None:
            raise ModelError(
                f"factored layers of {origin} are not split over devices by tp_plan or distributed_config; load it "
                "without, on one device or by device_map"
            )
        described = json.dumps(self.quantization_config.structure)
        saved = parse(Structure, described, origin=f"the quantization_config of {origin}")
        places = _places(model, saved.names)
        low_rank = {places[name]: layer for name, layer in saved.low_rank.items() if name in places}
        narrowed = {places[name]: layer for name, layer in saved.narrowed.items() if name in places}
        rebuild(model, Structure(low_rank=low_rank, same_layer={}, narrowed=narrowed), origin=origin)
        if _MAJOR >= 5:
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        whole = {name for name, layer in saved.narrowed.items() if not layer.heads} - saved.low_rank.keys()
        places = {name: place for name, place in places.items() if name not in whole}
        _require_factors(kwargs.get("checkpoint_files") or (), model, places)
        ignored = model._keys_to_ignore_on_load_unexpected
        kind = list if ignored is None else type(ignored)
        # in a file of the model's body alone, names begin after the prefix
        names = [place.removeprefix(f"{model.base_model_prefix}.") for place in places.values()]
        markers = [rf"(^|\.){re.escape(name)}\.weight$" for name in names]
        model._keys_to_ignore_on_load_unexpected = kind([*(ignored or ()), *markers])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.is_quantized = False  # its weights are ordinary ones: it may be cast, and trained
        _align(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        raise ModelError("factored layers are made dense in a copy of the model: st.merge(model)")


class _QuantizerOfFactored:
    """`model.hf_quantizer` of each model with factored layers, whoever put them there, or with a config that says so.

    One that `from_pretrained` has set on the model itself comes first.
    """

    def __get__(self, model: Any | None, owner: type[PreTrainedModel]) -> FactoredQuantizer:
        if model is None or not (compressed_layers(model) or _is_described(model)):
            raise AttributeError("hf_quantizer")
        return FactoredQuantizer(FactoredConfig({}))


_STATE_TO_SAVE: ContextVar[dict[str, Tensor] | None] = ContextVar("state_to_save", default=None)
"""The `state_dict` that `save_pretrained` was given, which it forgets once there is a quantizer."""


def _with_state_and_card(save: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        _forget_unpacked(bound.arguments["self"])
        token = _STATE_TO_SAVE.set(bound.arguments["state_dict"])
        try:
            result = save(*args, **kwargs)
        finally:
            _STATE_TO_SAVE.reset(token)
        if bound.arguments["is_main_process"]:
            _write_card(bound.arguments["self"], bound.arguments["save_directory"])
        return result

    return save_pretrained


def _forget_unpacked(model: Any) -> None:
    """Let go of what has read a model from GGUF, if its weights are ordinary ones since; it refuses to save them."""
    if getattr(model, "quantization_method", None) == _GGUF and not model.hf_quantizer.packed_modules:
        model.hf_quantizer.remove_quantization_config(model)


def _with_card(upload: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(upload)
    def upload_modified_files(model: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        _write_card(model, working_dir)  # in the place of the general one that is made for the repository
        return upload(model, working_dir, *args, **kwargs)

    return upload_modified_files


def _with_tied_factors(expand: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    @functools.wraps(expand)
    def get_expanded_tied_weights_keys(model: Any, all_submodels: bool = False) -> dict[str, str]:  # noqa: FBT001, FBT002
        """By the weight that is tied the one that it is tied to: of factored layers those of their factors."""
        layers, keys = {} if all_submodels else _factored_by_name(model), model._tied_weights_keys or {}
        if not layers or {name.rpartition(".")[0] for name in (*keys, *keys.values())}.isdisjoint(layers):
            return expand(model, all_submodels=all_submodels)
        named = {name: _factor_names(name, layers) for name in (*keys, *keys.values())}
        pairs = [pair for pair in keys.items() if named[pair[0]] + named[pair[1]] != [*pair]]
        try:  # it looks for the weights of all others
            vars(model)["_tied_weights_keys"] = dict(pair for pair in keys.items() if pair not in pairs)
            tied = expand(model)
        finally:
            del vars(model)["_tied_weights_keys"]
        for target, source in pairs if getattr(model.config, "tie_word_embeddings", False) else ():
            if len(named[target]) == len(named[source]):
                tied |= dict(zip(named[target], named[source], strict=True))
        return tied

    return get_expanded_tied_weights_keys


def _factor_names(name: str, layers: Mapping[str, FactoredLayer]) -> list[str]:
    """What holds a weight or bias of the model: itself, or the factors of its layer, an embedding's first one first."""
    owner, _, kind = name.rpartition(".")
    if owner not in layers:
        return [name]
    names = [f"{owner}.{part}.{kind}" for part, _ in layers[owner].named_children()]
    if kind == "bias":
        return names[-1:]
    return names[::-1] if layers[owner].is_tied_output else names


def _factored_by_name(model: nn.Module) -> dict[str, FactoredLayer]:
    """By all of their names."""
    names = {layer: names_of(model, layer) for layer in low_rank_layers(model).values()}
    return {name: layer for layer, own in names.items() for name in own}


def _tied_factors(model: Any) -> set[str]:
    """Names of factors that transformers ties to others when it loads the model."""
    if _MAJOR < 5:
        return set()
    prefixes = tuple(f"{name}." for name in low_rank_layers(model))
    keys: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    state = model.state_dict(keep_vars=True)
    factors = {target: source for target, source in keys.items() if target.startswith(prefixes) and target in state}
    return {target for target, source in factors.items() if state[target] is state.get(source)}


def _write_card(model: Any, folder: Any) -> None:
    if Path(folder).is_dir() and not getattr(model, "_hf_peft_config_loaded", False):
        spectrim.write_model_card(model, Path(folder))


PreTrainedModel.save_pretrained = _with_state_and_card(PreTrainedModel.save_pretrained)  # type: ignore[method-assign, unused-ignore]
PreTrainedModel._upload_modified_files = _with_card(PreTrainedModel._upload_modified_files)  # type: ignore[method-assign, unused-ignore]
if _MAJOR >= 5:
    PreTrainedModel.get_expanded_tied_weights_keys = _with_tied_factors(PreTrainedModel.get_expanded_tied_weights_keys)  # type: ignore[method-assign, unused-ignore]
PreTrainedModel.hf_quantizer = _QuantizerOfFactored()  # type: ignore[attr-defined, unused-ignore]


def _align(model: nn.Module) -> None:
    """Move weights that were read to where torch would put them.

    They are views of a file's bytes, and how a product with a single row is rounded depends on their addresses.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def _is_described(module: nn.Module) -> bool:
    """Whether its configuration speaks of factored layers."""
    described = getattr(getattr(module, "config", None), "quantization_config", None)
    method = described.get("quant_method") if isinstance(described, dict) else getattr(described, "quant_method", None)
    return bool(method == _METHOD)


def _require_factors(files: Iterable[str], model: PreTrainedModel, places: Mapping[str, str]) -> None:
    """Raise `FileError` where files have a dense weight, which would be passed over as a marker, or miss a factor."""
    shapes: dict[str, list[int]] = {}
    for file in (file for file in files if str(file).endswith(".safetensors")):
        with safe_open(file, framework="pt") as opened:
            shapes |= {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    for name, place in places.items():
        if shape := shapes.get(f"{name}.weight"):
            missing = {f"{name}.{part}" for part in model.get_submodule(place).state_dict()} - set(shapes)
            if missing or shape != [1]:
                raise _other_weights(min(missing, default=name), "not in" if missing else "dense in", model)


def _other_weights(key: str, state: str, model: PreTrainedModel) -> FileError:
    return FileError(
        f"{key} is {state} the weights of {model.config.name_or_path}, and its config.json says that this layer is "
        "factored; save the model again, or if its weights are dense, delete quantization_config from config.json"
    )


def _require_untied(model: nn.Module, structure: Structure, tied_factors: Collection[str]) -> None:
    factored = tuple(f"{name}." for name in structure.low_rank)
    _, aliases = unique_tensors(model) if factored else ({}, {})
    tied = [(name, first) for name, first in aliases.items() if name.startswith(factored) or first.startswith(factored)]
    tied = [names for names in tied if not set(names) & set(tied_factors)]
    tied += list(structure.same_layer.items())
    if tied:
        both = f"{tied[0][0]} and {tied[0][1]} are one"
        raise ModelError(f"{both}, and save_pretrained cannot say so of factored layers; {_WAY_OUT}")


def _require_own_biases(model: nn.Module, structure: Structure) -> None:
    """Raise `ModelError` for a merged layer with a bias that a program without Spectrim would leave out unsaid."""
    for name, layer in structure.narrowed.items():
        weight = None if name in structure.low_rank else model.get_submodule(name).weight
        if isinstance(weight, Tensor) and tuple(weight.shape) == layer.shape:
            raise ModelError(
                f"{name} has got a bias, as its mean is corrected on data, and {type(model).__name__} has none there: "
                "an ordinary folder would lose it. Save the model before it is merged, which loads after import "
                "spectrim, or keep it with st.save(model, path)"
            )


def _names_in_file(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """The names that layers get in a file: transformers 5 writes those of older versions where it has renamed some."""
    if _MAJOR < 5:
        return dict(zip(names, names, strict=True))
    numbers = {f"{name}.weight": torch.tensor([number]) for number, name in enumerate(names)}
    try:
        reverted = {names[int(number)]: key for key, number in revert_weight_conversion(model, numbers).items()}
    except Exception as error:  # an operation on whole weights
        raise ModelError(f"{type(model).__name__} has weights that transformers splits in files; {_WAY_OUT}") from error
    return {name: key.removesuffix(".weight") for name, key in reverted.items()}


def _places(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """By the names of layers in a file, theirs in `model`, which may be the saved model's body, or hold it.

    As with dense weights, a head that `model` does not have is left out.
    """
    body, rename, places = f"{model.base_model_prefix}.", renaming(model), {}
    for name in names:
        new = rename(f"{name}.weight").removesuffix(".weight")
        possible = [new, new.removeprefix(body), body + new, name]
        place = next((place for place in possible if _has_module(model, place)), None)
        parents = {place.partition(".")[0] for place in possible}
        if place or name.startswith(body) or any(_has_module(model.base_model, parent) for parent in parents):
            places[name] = place or new
    return places


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
