"""Folders of Hugging Face: checked before they are loaded, and none of their code is run."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.core.errors import DataError, DependencyError, FileError, ModelError
from spectrim.core.files import gguf_file, read_text

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
OWN_METHOD = "spectrim"


def load_pretrained(folder: str | Path) -> nn.Module:
    """The model of a folder that `save_pretrained` wrote, of the class that its config.json names, in its number type.

    A folder with one .gguf file and no config.json is a model that writes text; its weights are unpacked.

    Raises:
        FileError: no such folder, or one that lacks weights or part of them.
        ModelError: a model that needs code of its own, or whose weights have been quantised.
        DependencyError: transformers is not installed.
    """
    folder = Path(folder).expanduser()
    gguf, model_class = gguf_file(folder), model_class_of(folder)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    options |= {"use_safetensors": True} if gguf is None else {"gguf_file": gguf.name}
    if gguf is not None:
        configuration = getattr(importlib.import_module("transformers"), "GgufConfig", None)
        if configuration is not None:  # version 5 may leave weights packed
            options["quantization_config"] = configuration(dequantize=True)
    try:
        model, report = model_class.from_pretrained(str(folder), output_loading_info=True, dtype="auto", **options)
    except (FileError, ModelError):
        raise
    except Exception as error:  # whatever a damaged or foreign folder leads to
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError(f"{folder} cannot be loaded as a {model_class.__name__}: {reason}") from error
    if missing := sorted(report["missing_keys"]):
        raise FileError(
            f"{folder} lacks {len(missing)} of the weights of a {model_class.__name__}, which would be random, first "
            f"{missing[0]}; is the folder whole, and the architecture in its config.json that of its weights?"
        )
    network: nn.Module = model.eval()
    return network


def model_class_of(folder: Path) -> Any:
    """The class of transformers that a folder's config.json names, once it is known that all its files are there.

    Raises as `load_pretrained`.
    """
    gguf = gguf_file(folder)
    config = {"architectures": ["AutoModelForCausalLM"]} if gguf else read_config(folder)
    if (method := _quant_method(config)) not in (None, OWN_METHOD):
        raise ModelError(
            f"the weights in {folder} are quantised: the quant_method in its {CONFIG} is {method!r}; give the folder "
            "of the model as it was before, and quantise the compressed one"
        )
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise DependencyError('a folder of Hugging Face needs transformers; run: pip install "spectrim[hf]"') from error
    name = next(iter(config.get("architectures") or ()), "")
    model_class = getattr(transformers, name, None) if name.isidentifier() else None
    if model_class is None or not hasattr(model_class, "from_pretrained"):
        raise ModelError(_why_unknown(folder, config, name, version=transformers.__version__))
    if gguf is None:
        _require_all_files(folder)
    return model_class


def read_config(folder: Path) -> Mapping[str, Any]:
    """What the folder's config.json says.

    Raises:
        FileError: there is no such folder, or its config.json is missing or damaged.
    """
    if not folder.is_dir():
        raise FileError(f"there is no folder {folder}; hf:DIR is a folder on this machine, nothing is downloaded")
    if not (folder / CONFIG).is_file():
        advice = "give a folder that model.save_pretrained wrote, or one with a single .gguf file"
        if (inner := folder / "0_Transformer" / CONFIG).is_file():
            advice = f"give {inner.parent}, and put what is written in its place in a copy of {folder}"
        raise FileError(f"{folder} has no {CONFIG}; {advice}")
    try:
        config = json.loads(read_text(folder / CONFIG))
    except json.JSONDecodeError as error:
        raise FileError(f"{folder / CONFIG} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise FileError(f"{folder / CONFIG} holds a {type(config).__name__}, not the entries of a configuration")
    return config


def require_length(model: nn.Module, tokens: int, *, option: str) -> None:
    """Raise `DataError` for texts of more tokens than a model of transformers has positions for."""
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < tokens:
        raise DataError(
            f"{option} {tokens} is longer than the texts that the model takes: {most} tokens "
            f"(max_position_embeddings in its {CONFIG}); give {option} {most} or less"
        )


def is_factored(folder: Path) -> bool:
    """Whether the folder's config.json speaks of factored layers; raises as `read_config`."""
    return _quant_method(read_config(folder)) == OWN_METHOD


def other_files(folder: Path) -> list[Path]:
    """What is in a folder beside the model: tokenizer, settings of text generation and the like, relative to it.

    Hidden files, code and weights are none of them, nor are README.md and config.json, which are written anew.
    """
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path
        for path in paths
        if path not in (Path("README.md"), Path(CONFIG))
        and not path.name.endswith((*_WEIGHTS, ".py", ".pyc"))
        and not any(part.startswith(".") for part in path.parts)
    ]


def _quant_method(config: Mapping[str, Any]) -> str | None:
    described = config.get("quantization_config")
    return None if described is None else str(dict(described).get("quant_method"))


def _why_unknown(folder: Path, config: Mapping[str, Any], name: str, *, version: str) -> str:
    code = config.get("auto_map")
    if code:
        listed = ", ".join(f"{key} = {value}" for key, value in sorted(dict(code).items()))
        return (
            f"{folder} brings code of its own, which loading would run ({listed}), and Spectrim does not; if you trust "
            "it, name a function of yours that loads the model with trust_remote_code=True: --model pkg.module:factory"
        )
    what = f"{name!r}, which transformers {version} does not have" if name else "none"
    return f"the class of the model in {folder} is not known: its {CONFIG} names {what}"


def _require_all_files(folder: Path) -> None:
    """Raise `FileError` where a shard is missing, or there are no safetensors."""
    index = folder / INDEX
    if not index.is_file():
        if not any(folder.glob("*.safetensors")):
            raise FileError(
                f"{folder} has no .safetensors file, and others are not read; save the model as safetensors"
            )
        return
    try:
        names = set(json.loads(read_text(index))["weight_map"].values())
        missing = sorted(name for name in names if not (folder / name).is_file())
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{index} is damaged ({type(error).__name__}); download or save it again") from error
    if missing:
        listed = ", ".join([*missing[:3], ".."][: len(missing)])
        raise FileError(f"{folder} lacks {len(missing)} of its {len(names)} files of weights: {listed}; fetch them")
