"""The weights of a folder of Hugging Face, read one by one under the names that they have in the model."""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spectrim.core.errors import FileError
from spectrim.core.files import read_text, write_atomically
from spectrim.core.state import distinct_state
from spectrim.models.folders import CONFIG, INDEX

_COMPUTED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LEGACY = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@dataclass(frozen=True)
class Shards:
    """Where each weight of a model is.

    Attributes:
        folder: The folder.
        files: By key, the name of its file.
        keys: By the name that a tensor has in the model, its key.
    """

    folder: Path
    files: Mapping[str, str]
    keys: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, folder: Path, model: Any) -> "Shards":
        """Those of a folder for a model without values.

        Raises:
            FileError: a file is damaged, or weights of the model are missing or of another size or type.
        """
        files = _files_by_key(folder)
        state, aliases = distinct_state(model)
        rename, body = renaming(model), f"{model.base_model_prefix}."
        keys: dict[str, str] = {}
        for key in files:
            name = rename(key)
            places = (name, body + name, name.removeprefix(body))
            place = next((place for place in places if place in state or place in aliases), None)
            if place is not None:
                keys.setdefault(aliases.get(place, place), key)
        if missing := [name for name in state if name not in keys]:
            raise FileError(
                f"{folder} lacks {len(missing)} of the weights of a {type(model).__name__}, first {missing[0]}; is the "
                "folder whole? Weights that transformers puts together from several are not read block by block: load "
                "it whole with transformers, and call st.compress"
            )
        shards, names = cls(folder, files, keys), {key: name for name, key in keys.items()}
        for key, tensor in shards.tensors(keys[name] for name in state):
            expected = state[names[key]]
            computed = tensor.dtype in _COMPUTED or not expected.is_floating_point()
            if tensor.shape != expected.shape or not computed:
                needed = f"{list(expected.shape)} by config.json; fetch both again" if computed else "bfloat16 or wider"
                raise FileError(f"{key} in {folder} is {tensor.dtype} {list(tensor.shape)}, and has to be {needed}")
        return shards

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by their names in the model; they look into the files."""
        by_key = {self.keys[name]: name for name in names}
        return {by_key[key]: tensor for key, tensor in self.tensors(by_key)}

    def tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by their keys, file by file.

        Raises:
            FileError: one is missing or cut off.
        """
        by_file: dict[str, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.files[key], []).append(key)
        for file, own in by_file.items():
            with open_shard(self.folder / file) as opened:
                for key in own:
                    yield key, opened.get_tensor(key)

    def dtype(self, name: str) -> torch.dtype:
        """The number type of a tensor in its file."""
        return next(iter(self.tensors([self.keys[name]])))[1].dtype

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum((self.folder / file).stat().st_size for file in set(self.files.values()))

    @property
    def outline(self) -> list[tuple[str, int, int]]:
        """Names, sizes and times of the files and of config.json, by which it is seen that they are others."""
        stats = ((file, (self.folder / file).stat()) for file in sorted({*self.files.values(), CONFIG}))
        return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]


@contextmanager
def open_shard(path: Path, *, hint: str = "fetch it again") -> Iterator[Any]:
    """A safetensors file; raises `FileError`, with what to do about it, where it is missing or cut off."""
    try:
        with path.open("rb"), safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is damaged or missing: {getattr(error, 'strerror', 0) or error}; {hint}") from error


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """One file of weights, wholly or not at all."""
    stored = {key: tensor.contiguous() for key, tensor in tensors.items()}
    return write_atomically(path, lambda part: save_file(stored, part, metadata={"format": "pt"}))


def groups_of(sizes: Mapping[str, int], *, most: int) -> list[list[str]]:
    """Keys in groups of at most so many bytes, each at least one key."""
    groups: list[list[str]] = []
    free = 0
    for key in sorted(sizes):
        if sizes[key] > free:
            groups.append([])
            free = most
        groups[-1].append(key)
        free -= sizes[key]
    return groups


def write_index(folder: Path, files: Sequence[tuple[str, Sequence[str]]], *, total: int) -> None:
    """The file that says which key is in which file, as transformers writes it."""
    weight_map = {key: file for file, keys in files for key in keys}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / INDEX, lambda part: part.write_text(text, encoding="utf-8"))


def _files_by_key(folder: Path) -> dict[str, str]:
    if (folder / INDEX).is_file():
        return dict(json.loads(read_text(folder / INDEX))["weight_map"])
    files: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_shard(path) as opened:
            files |= dict.fromkeys(opened.keys(), path.name)
    return files


def renaming(model: Any) -> Callable[[str], str]:
    """What turns keys in files into names of this version of transformers."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers 4
        return lambda key: functools.reduce(lambda name, pair: name.replace(*pair), _LEGACY, key)
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    return lambda key: rename_source_key(key, renamings, [])[0]
