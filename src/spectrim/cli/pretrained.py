"""A network that comes from a folder of Hugging Face goes into one again: weights, settings and tokenizer."""

import filecmp
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.cli.outputs import OutputFiles
from spectrim.core.errors import FileError, ModelError
from spectrim.core.files import gguf_file
from spectrim.layers.replacement import compressed_layers, narrowed_layers
from spectrim.models.folders import CONFIG, is_factored, other_files
from spectrim.reporting.cards import CARD, is_own_card

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def why_not_dense(model: nn.Module, folder: Path | None) -> str | None:
    """What to say of a model that was compressed already; None for a dense one."""
    layers = compressed_layers(model)
    name = folder or type(model).__name__
    return f"{name} was compressed already: {len(layers)} of its layers are factored or narrowed" if layers else None


def require_dense(model: nn.Module, folder: Path | None) -> None:
    """Raise `ModelError` for the folder of a model that was compressed already."""
    if folder is not None and (reason := why_not_dense(model, folder)):
        merging = ", or make this one dense first: spectrim.merge(model).save_pretrained(..)"
        stays_narrow = bool(narrowed_layers(model))
        raise ModelError(f"{reason}; give the folder of the dense model{'' if stays_narrow else merging}")


def folder_files(source: Path, out: Path) -> OutputFiles:
    """What is written beside the weights, and which of it may be replaced.

    Raises:
        FileError: `out` is the folder that the network comes from.
    """
    if out.resolve() == source.resolve():
        raise FileError(f"--out {out} is the folder that the network comes from, which stays as it is; choose another")
    copied: dict[str, Any] = {
        str(path): (lambda there, path=path: filecmp.cmp(source / path, there, shallow=False), "")
        for path in other_files(source)
    }
    own = (CONFIG, *_TOKENIZER) if gguf_file(source) else (CONFIG,)
    beside = dict.fromkeys(own, (lambda path: is_factored(path.parent) or _is_copy(path, source), ""))
    return copied | beside | {CARD: (is_own_card, "the model card")}


def _is_copy(path: Path, folder: Path) -> bool:
    """Whether the same file lies in a folder: a network that was no faster is written as it was."""
    own = folder / path.name
    return own.is_file() and filecmp.cmp(own, path, shallow=False)
