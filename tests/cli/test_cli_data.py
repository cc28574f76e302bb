"""`spectrim data list` and `spectrim data get`."""

import gzip
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from spectrim.cli.data import app
from spectrim.core.errors import DataError
from spectrim.data import access, catalogue


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 3 + 2 images in MNIST's format, and a catalogue whose mnist is that large."""
    monkeypatch.setenv("SPECTRIM_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    digits, mnist = catalogue.ENTRIES[:2]
    entries = (digits, replace(mnist, info=replace(mnist.info, sizes=(3, 2)), sources=(), checksums=None))
    for module in (catalogue, access):
        monkeypatch.setattr(module, "ENTRIES", entries)
    folder = tmp_path / "raw"
    folder.mkdir()
    for stem, size in (("train", 3), ("t10k", 2)):
        images, labels = np.zeros((size, 28, 28), np.uint8), np.arange(size, dtype=np.uint8)
        for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
            header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
            (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_list_says_what_is_embedded_cached_and_not_yet_there(small_mnist: Path, tmp_path: Path) -> None:
    before = {line.split()[0]: line for line in run("list").splitlines()}
    assert before["digits"].split()[-1] == "embedded"
    assert before["digits"].split()[-5:-1] == ["1,437", "360", "1x8x8", "10"]
    assert before["mnist"].rstrip().endswith("not yet")
    assert before["cache:"] == f"cache: {tmp_path / 'cache'}"
    run("get", "mnist", "--folder", small_mnist)
    after = {line.split()[0]: line for line in run("list").splitlines()}
    assert after["mnist"].split()[-1] == "cached"


def test_get_ends_with_counts_path_and_source(small_mnist: Path, tmp_path: Path) -> None:
    output = run("get", "mnist", "--folder", small_mnist, "--cache", tmp_path / "other")
    assert "mnist: 3 training and 2 test images" in output
    assert f"where:  {tmp_path / 'other' / 'mnist'}\n" in output
    assert f"source: folder {small_mnist}\n" in output
    assert "(was there already)" in run("get", "mnist", "--cache", tmp_path / "other")
    assert "not yet" in run("list")
    assert "embedded, nothing to download" in run("get", "digits")


def test_get_passes_the_library_s_errors_on(small_mnist: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'mnist'"):
        run("get", "mnits")
    with pytest.raises(DataError, match="spectrim data get mnist --folder DIR"):
        run("get", "mnist")
    with pytest.raises(DataError, match="no such folder"):
        run("get", "mnist", "--folder", tmp_path / "nowhere")
