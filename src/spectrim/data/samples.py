"""A user's own samples as a data set: images in class folders, arrays in an `.npz` file, or a text.

Where files say nothing of a test split, a tenth is set aside for it, always the same: of each class, or the end of a
text.
"""

import hashlib
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spectrim.core.errors import DataError, DependencyError
from spectrim.core.files import gguf_file
from spectrim.data.access import Split

Part = Literal["train", "test", "whole"]
"""Of a text also the whole."""

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those of torchvision's `ImageFolder`."""

_SPLIT_FOLDERS = (("train", "training"), ("test", "testing", "val", "valid", "validation"))
_TRAIN_NAMES = (("x_train", "y_train"), ("train_images", "train_labels"), ("images_train", "labels_train"))
_TEST_NAMES = (
    ("x_test", "y_test"),
    ("test_images", "test_labels"),
    ("images_test", "labels_test"),
    ("x_val", "y_val"),
    ("val_images", "val_labels"),
)
_WHOLE_NAMES = (("x", "y"), ("images", "labels"), ("data", "labels"), ("data", "targets"), ("inputs", "labels"))
_CHANNELS = (1, 3, 4)
_GREY, _DEEP = ("1", "L", "LA"), ("I", "I;16", "I;16B", "F")
"""Kinds of images, as Pillow names them."""

_TESTED_OF, _MOST_CLASSES = 10, 1_000_000


@dataclass(frozen=True, eq=False)
class Samples:
    """One split of a user's data.

    Attributes:
        name: What it is called in messages.
        inputs: Tensor (N, ..), or images that are decoded when they are asked for.
        labels: Class indices or other whole numbers, int64 (N, ..), or values, float32; None where there are none.
        classes: Their names; none where labels are no class indices.
        checksum: SHA-256 in hex over the files' names, sizes and times of change.
    """

    name: str
    inputs: "Tensor | ImageFiles"
    labels: Tensor | None
    classes: tuple[str, ...]
    checksum: str


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images that are decoded when they are asked for: `images[indices]` is uint8 (len(indices), C, H, W).

    Attributes:
        paths: Where they lie.
        shape: (C, H, W) of each: grey for one channel, RGB for three; the shorter side becomes `shorter`, and the
            centre is cut out, as torchvision's `Resize` and `CenterCrop` do.
        shorter: By default as large as the part that is cut out; None for images that must have this size as they are.
    """

    paths: tuple[Path, ...]
    shape: tuple[int, int, int]
    shorter: int | None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The images at these places.

        Raises:
            DataError: a file that is no image, or of another size than the first.
        """
        images = [torch.from_numpy(self._decode(self.paths[index])) for index in indices.tolist()]
        return torch.stack(images) if images else torch.zeros(0, *self.shape, dtype=torch.uint8)

    def _decode(self, path: Path) -> np.ndarray[Any, Any]:
        """(C, H, W), uint8."""
        channels, height, width = self.shape
        with _opened(path) as image:
            if image.mode in _DEEP:
                raise DataError(f"{path} has pixels of 16 bits or more ({image.mode}); convert the images to 8 bits")
            pixels = image.convert("L" if channels == 1 else "RGB")
        if self.shorter is None and pixels.size != (width, height):
            raise DataError(
                f"{path} is {pixels.width} x {pixels.height}, and the first image {width} x {height}; give the size "
                f"that the network takes, to which all are scaled and cut: --input {channels},{height},{width}"
            )
        if self.shorter is not None:
            pairs, least = list(zip(pixels.size, (width, height), strict=True)), min(pixels.size)
            shorter = max(self.shorter, *(math.ceil(part * least / side) for side, part in pairs))
            size = [max(int(shorter * side / least), part) for side, part in pairs]
            x, y = (round((side - part) / 2) for side, part in zip(size, (width, height), strict=True))
            pixels = pixels.resize(size, _pillow().Resampling.BILINEAR).crop((x, y, x + width, y + height))
        return np.array(pixels).reshape(height, width, channels).transpose(2, 0, 1)


def load_folder(
    folder: Path | str, *, split: Split = "train", shape: tuple[int, ...] | None = None, shorter: int | None = None
) -> Samples:
    """Images in class folders, by torchvision's conventions: `folder/train/CLASS/..` and `folder/test/CLASS/..`.

    The splits may also be called `training`, and `testing`, `val`, `valid` or `validation`, in capitals or not; without
    both, the class folders are those in `folder` itself. Classes are numbered in the order of their names.

    Args:
        folder: Where they lie.
        split: "train" or "test".
        shape: (C, H, W) that the network takes; by default that of the first image, which all others must have then.
        shorter: What the shorter side is scaled to before H x W is cut out of the middle; by default just enough.

    Raises:
        DataError: there is no such folder, or no images in class folders in it, or the splits have other classes.
        DependencyError: Pillow is not installed.
    """
    folder = Path(folder).expanduser()
    _pillow()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    children = {child.name.lower(): child for child in folder.iterdir() if any(map(Path.is_dir, child.glob("*")))}
    train, test = (next((children[name] for name in names if name in children), None) for names in _SPLIT_FOLDERS)
    files = _class_files(train or folder)
    if {name.lower() for name in files} <= {*_SPLIT_FOLDERS[0], *_SPLIT_FOLDERS[1]}:
        raise DataError(f"{folder} has {', '.join(files)}, which are no classes; put class folders into train")
    size = shape or _image_shape(next(iter(files.values()))[0])
    test = test if train else None
    if test:
        tested = _class_files(test)
        if files.keys() != tested.keys():
            names = ", ".join(sorted(files.keys() ^ tested.keys())[:3])
            raise DataError(f"{train} and {test} have other class folders: {names}")
        files = files if split == "train" else tested
    classes = tuple(files)
    paths = tuple(path for name in classes for path in files[name])
    labels = torch.tensor([label for label, name in enumerate(classes) for _ in files[name]])
    if not test:
        places = _places(labels, split)
        paths, labels = tuple(paths[place] for place in places.tolist()), labels[places]
    if len(size) != 3 or size[0] not in (1, 3):
        raise DataError(f"images have the shape 1,H,W (grey) or 3,H,W (RGB), and --input is {','.join(map(str, size))}")
    scaled = None if shape is None else max(shorter or 0, min(size[1:]))
    images = ImageFiles(paths, (size[0], size[1], size[2]), scaled)
    return Samples(f"folder:{folder}", images, labels, classes, _digest_of_files(paths))


def load_arrays(path: Path | str, *, split: Split = "train") -> Samples:
    """Arrays in an `.npz` file: `x_train`, `y_train`, `x_test` and `y_test`, or `x` and `y`, and other usual names.

    Samples are uint8 images, (N, H, W), (N, C, H, W) or (N, H, W, C), or arrays as the network takes them. Labels are
    class indices (N,), or values; they may be missing. Files with Python objects in them are not read.

    Raises:
        DataError: the file is missing, damaged or of another kind, or its arrays do not fit together.
    """
    path = Path(path).expanduser()
    arrays = _read_arrays(path)
    names = {name.lower(): name for name in arrays}
    train, test = _named(names, _TRAIN_NAMES), _named(names, _TEST_NAMES)
    whole = train or _named(names, _WHOLE_NAMES)
    if whole is None and 0 < len(arrays) <= 2:
        whole = next(iter(arrays)), (*arrays, "")[1]
    if whole is None:
        raise DataError(
            f"{path} holds {', '.join(map(repr, arrays)) or 'nothing'}; name the arrays x_train, y_train, x_test and "
            "y_test, or x and y: numpy.savez('data.npz', x_train=.., y_train=.., x_test=.., y_test=..)"
        )
    inputs, labels = _samples(arrays, whole, path)
    tested, test_labels = _samples(arrays, test or whole, path)
    if tested.dtype != inputs.dtype:
        raise DataError(f"{path}: {whole[0]} is {inputs.dtype}, and {(test or whole)[0]} {tested.dtype}; give one type")
    numbers = [own for own in (labels, test_labels) if own is not None]
    classes = range(max(int(own.max()) + 1 for own in numbers)) if numbers and all(map(_are_classes, numbers)) else ()
    if split == "test" and test is not None:
        inputs, labels = tested, test_labels
    elif test is None:
        places = _places(labels if labels is not None and classes else torch.zeros(len(inputs)), split)
        inputs, labels = inputs[places], None if labels is None else labels[places]
    return Samples(str(path), inputs, labels, tuple(map(str, classes)), _digest_of_files([path]))


def load_text(path: Path | str, *, tokenizer: Path | str, split: Part = "train", length: int = 128) -> Samples:
    """A text as token numbers, int64 (N, length), whose labels are the tokens that come next; the end is for testing.

    Args:
        path: The file, in UTF-8.
        tokenizer: A folder with a Hugging Face tokenizer, its `tokenizer.json`, or "bytes".
        split: "train", "test" or "whole".
        length: Tokens of one sample.

    Raises:
        DataError: files that are missing or of another kind, or a text that is too short.
        DependencyError: the tokenizer needs a package that is not installed.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as text: {error}; give a file in UTF-8") from error
    numbers = torch.tensor(_encoder(tokenizer)(text), dtype=torch.int64)
    count, least = (len(numbers) - 1) // length, 1 if split == "whole" else _TESTED_OF
    if count < least:
        shorter = f", or --tokens {number}" if (number := (len(numbers) - 1) // least) > 0 else ""
        count_of = f"{len(numbers):,} tokens, too few for {least} samples of {length}"
        raise DataError(f"{path} has {count_of}; give more text{shorter}")
    inputs = numbers[: count * length].view(count, length)
    following = numbers[1 : count * length + 1].view(count, length)
    tested = count - count // _TESTED_OF
    part = {"train": slice(tested), "test": slice(tested, None), "whole": slice(None)}[split]
    return Samples(f"text:{path}", inputs[part], following[part], (), _digest_of_files([path]))


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The images by class, both in the order of their names."""
    classes = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith((".", "__MACOSX")):
            files = sorted(path for path in child.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                suffixes = " ".join(IMAGE_SUFFIXES)
                raise DataError(f"the class folder {child} has no images ({suffixes}); fill it or move it away")
            classes[child.name] = files
    if len(classes) < 2:
        raise DataError(
            f"{folder} has {len(classes)} class folders; give a folder that holds one folder of images for each class, "
            "or one that holds such a train and test folder"
        )
    return classes


def _places(labels: Tensor, split: Split) -> Tensor:
    """Of samples that are in no split: every tenth of a class-sorted shuffle is for testing, the others for training.

    The numbers of a legacy RandomState never change, so the split is the same everywhere and for good.
    """
    order = np.random.RandomState(0).permutation(len(labels))
    by_class = order[np.argsort(labels.numpy()[order], kind="stable")]
    tests = np.zeros(len(order), dtype=bool)
    tests[by_class[_TESTED_OF // 2 :: _TESTED_OF]] = True
    return torch.from_numpy(np.flatnonzero(tests if split == "test" else ~tests))


def _read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise DataError(f"cannot read {path}: {error}; it is missing, damaged, or no .npz file") from error
    except ValueError as error:
        raise DataError(
            f"{path} holds Python objects, or is no .npz file ({error}); save arrays of numbers: "
            "numpy.savez('data.npz', x=.., y=..)"
        ) from error


def _named(names: Mapping[str, str], pairs: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The first pair of which the samples are there; no name for labels that are not."""
    return next(((names[x], names.get(y, "")) for x, y in pairs if x in names), None)


def _samples(
    arrays: Mapping[str, np.ndarray[Any, Any]], names: tuple[str, str], path: Path
) -> tuple[Tensor, Tensor | None]:
    """Samples (N, ..) and labels (N, ..), if there are some."""
    first, second = names
    inputs = arrays[first]
    if inputs.dtype.kind not in "fiub" or inputs.ndim < 2 or not len(inputs):
        raise DataError(f"{path}: {first} is {inputs.dtype} {list(inputs.shape)}; give samples (N, ..) of numbers")
    if inputs.ndim == 3 and inputs.dtype == np.uint8:
        inputs = inputs[:, None]
    elif inputs.ndim == 4 and inputs.shape[-1] in _CHANNELS and inputs.shape[1] not in _CHANNELS:
        inputs = inputs.transpose(0, 3, 1, 2)
    if inputs.dtype != np.uint8:
        inputs = inputs.astype(np.float32 if inputs.dtype.kind == "f" else np.int64)
    samples = torch.from_numpy(np.ascontiguousarray(inputs))
    if not second:
        return samples, None
    labels = arrays[second]
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if len(labels) != len(inputs) or labels.dtype.kind not in "fiub":
        raise DataError(
            f"{path}: {first} has {len(inputs)} samples, and {second} is {labels.dtype} {list(labels.shape)}; give a "
            f"number for each sample (one-hot labels: {second}.argmax(1); names: numpy.unique({second}, "
            "return_inverse=True)[1])"
        )
    kind = np.float32 if labels.dtype.kind == "f" else np.int64
    return samples, torch.from_numpy(labels.astype(kind))


def _are_classes(labels: Tensor) -> bool:
    plain = labels.ndim == 1 and labels.dtype == torch.int64 and bool(len(labels))
    return plain and int(labels.min()) >= 0 and int(labels.max()) < _MOST_CLASSES


def _encoder(tokenizer: Path | str) -> Callable[[str], list[int]]:
    """From a text to its token numbers, without special tokens."""
    if str(tokenizer) == "bytes":
        return lambda text: list(text.encode("utf-8"))
    path = Path(tokenizer).expanduser()
    if not path.exists():
        raise DataError(f"there is no tokenizer {path}; give a folder with one, its tokenizer.json, or bytes")
    try:
        if path.is_file():
            from tokenizers import Tokenizer

            fast = Tokenizer.from_file(str(path))
            return lambda text: list(fast.encode(text, add_special_tokens=False).ids)
    except Exception as error:
        raise _unreadable(path, error) from error
    own = load_tokenizer(path)
    return lambda text: list(own.encode(text, add_special_tokens=False, verbose=False))


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of transformers in a folder, or in its one .gguf file; none of the folder's code is run.

    Raises:
        DataError: there is none, or it cannot be read.
        DependencyError: transformers is not installed.
    """
    gguf = gguf_file(folder)
    try:
        from transformers import AutoTokenizer

        options = {} if gguf is None else {"gguf_file": gguf.name}
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: Path, error: Exception) -> DataError | DependencyError:
    """Of a package that is not installed, or of whatever a damaged or foreign file leads to."""
    if isinstance(error, ImportError):
        return DependencyError(f'a tokenizer needs {error.name}; run: pip install "spectrim[hf]"')
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DataError(f"cannot read the tokenizer {path}: {reason.rstrip(': ')}; give the model's own, a folder or file")


def _digest_of_files(paths: Sequence[Path]) -> str:
    """SHA-256 in hex over names, sizes and times of change; large files are not read for it."""
    sha = hashlib.sha256()
    for path in paths:
        status = path.stat()
        sha.update(f"{path}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return sha.hexdigest()


def _image_shape(path: Path) -> tuple[int, int, int]:
    """(C, H, W): one channel for grey images, three for others."""
    with _opened(path) as image:
        return (1 if image.mode in _GREY else 3), image.height, image.width


def _opened(path: Path) -> Any:
    try:
        image = _pillow().open(path)
        image.load()
    except Exception as error:  # whatever a damaged or too large file leads to
        raise DataError(f"{path} cannot be read as an image: {error}; repair it or move it away") from error
    return image


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DependencyError('images need Pillow; run: pip install "spectrim[vision]"') from error
    return Image
