"""A user's own samples: images in class folders, arrays in files, texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spectrim import errors
from spectrim.data.samples import Samples, load_arrays, load_folder, load_text


def paint(path: Path, value: int, *, size: tuple[int, int] = (8, 6), mode: str = "RGB") -> None:
    """An image of one grey value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), value, dtype=np.uint8)
    image = Image.fromarray(pixels)
    (image if mode == "RGB" else image.convert(mode)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images of each of two classes."""
    for label, name in enumerate(("cat", "dog")):
        for number in range(20):
            paint(tmp_path / "pets" / name / f"{number:02}.png", 100 * label + number)
    return tmp_path / "pets"


def pixels(samples: Samples) -> torch.Tensor:
    return samples.inputs[torch.arange(len(samples.inputs))]


def test_a_tenth_of_each_class_is_for_testing_and_always_the_same(folder: Path) -> None:
    train, test = (load_folder(folder, split=split) for split in ("train", "test"))
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels is not None
    assert test.labels is not None
    assert train.labels.bincount().tolist() == [18, 18]
    assert test.labels.bincount().tolist() == [2, 2]
    values = [set(pixels(samples)[:, 0, 0, 0].tolist()) for samples in (train, test)]
    assert values[0] | values[1] == {*range(20), *range(100, 120)}
    assert not values[0] & values[1]
    assert pixels(load_folder(folder, split="test")).equal(pixels(test))


@pytest.mark.parametrize("name", ["test", "val", "valid"])
def test_folders_of_both_splits_are_taken_as_they_are(folder: Path, name: str) -> None:
    folder.rename(folder.parent / "train")
    paint(folder.parent / name / "dog" / "a.jpg", 30)
    paint(folder.parent / name / "cat" / "b.bmp", 60, mode="L")
    train, test = (load_folder(folder.parent, split=split) for split in ("train", "test"))
    assert len(train.inputs) == 40
    assert test.labels is not None
    assert test.labels.tolist() == [0, 1]
    assert pixels(test).shape == (2, 3, 6, 8)
    assert pixels(test)[:, 0, 0, 0].tolist() == pytest.approx([60, 30], abs=2)


def test_other_files_and_hidden_folders_are_passed_over(folder: Path) -> None:
    (folder / "cat" / "Thumbs.db").write_text("x")
    paint(folder / ".ipynb_checkpoints" / "a.png", 0)
    assert load_folder(folder).classes == ("cat", "dog")


def test_images_are_scaled_and_cut_as_torchvision_does_it(tmp_path: Path) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (37, 53, 3), dtype=torch.uint8).numpy()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(noise).resize((530, 370)).save(tmp_path / name / f"{number}.png")
    own = pixels(load_folder(tmp_path, shape=(3, 24, 24), shorter=32))
    with Image.open(tmp_path / "a" / "0.png") as image:
        theirs = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(24), transforms.PILToTensor()])(image)
    assert (own[0].int() - theirs.int()).abs().max() <= 1


def test_images_of_the_size_that_is_cut_out_are_scaled_first_as_well(folder: Path) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    image = Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy())
    image.save(folder / "cat" / "00.png")
    own = load_folder(folder, shape=(3, 32, 32), shorter=40).inputs[torch.tensor([0])]
    theirs = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(32), transforms.PILToTensor()])(image)
    assert own[0].equal(theirs)


@pytest.mark.parametrize(("first", "second"), [("Training", "Testing"), ("TRAIN", "Test")])
def test_splits_are_no_classes_however_they_are_written(folder: Path, first: str, second: str) -> None:
    folder.rename(folder.parent / first)
    for name in ("cat", "dog"):
        paint(folder.parent / second / name / "a.png", 30)
    train, test = (load_folder(folder.parent, split=split) for split in ("train", "test"))
    assert train.classes == ("cat", "dog")
    assert (len(train.inputs), len(test.inputs)) == (40, 2)


def test_a_class_may_be_called_train(folder: Path) -> None:
    (folder / "dog").rename(folder / "train")
    assert load_folder(folder).classes == ("cat", "train")


def test_one_channel_is_grey(folder: Path) -> None:
    assert pixels(load_folder(folder, shape=(1, 6, 8))).shape == (36, 1, 6, 8)


def break_image(folder: Path) -> None:
    (folder / "cat" / "00.png").write_bytes(b"no image")
    paint(folder / "cat" / "01.png", 0)


def resize_image(folder: Path) -> None:
    for path in (folder / "dog").iterdir():
        paint(path, 5, size=(9, 6))


def deepen(folder: Path) -> None:
    for path in (folder / "dog").iterdir():
        Image.fromarray(np.full((6, 8), 3000, dtype=np.uint16)).save(path)


def enlarge(folder: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(folder / "cat" / "00.png")


def only_tests(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / name).rename(folder / f"moved-{name}")
        (folder / ("test" if name == "cat" else "val") / "cat").mkdir(parents=True)
        (folder / f"moved-{name}").rename(folder / ("test" if name == "cat" else "val") / "dog")


def no_classes(folder: Path) -> None:
    (folder / "cat").rename(folder / "train")
    (folder / "dog").rename(folder / "test")


def one_class(folder: Path) -> None:
    (folder / "dog").rename(folder.parent / "dog")


def empty_class(folder: Path) -> None:
    (folder / "empty").mkdir()


def other_classes(folder: Path) -> None:
    files = [*folder.iterdir()]
    (folder / "train").mkdir()
    for path in files:
        path.rename(folder / "train" / path.name)
    paint(folder / "test" / "cat" / "a.png", 1)
    paint(folder / "test" / "bird" / "a.png", 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_image, "00.png cannot be read as an image"),
        (resize_image, "--input 3,6,8"),
        (deepen, "16 bits"),
        (enlarge, "00.png cannot be read as an image: Image size .* exceeds limit"),
        (only_tests, "has test, val, which are no classes"),
        (no_classes, "has test, train, which are no classes"),
        (one_class, "has 1 class folders"),
        (empty_class, "has no images"),
        (other_classes, "have other class folders: bird, dog"),
    ],
)
def test_folders_that_are_refused(folder: Path, spoil: Any, message: str) -> None:
    spoil(folder)
    with pytest.raises(errors.DataError, match=message):
        _ = [pixels(load_folder(folder, split=split)) for split in ("train", "test")]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((40, 6, 8), (1, 6, 8)), ((40, 6, 8, 3), (3, 6, 8)), ((40, 3, 6, 8), (3, 6, 8)), ((40, 12), (12,))],
    ids=str,
)
def test_arrays_become_channels_first(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(40) % 4)
    train, test = (load_arrays(tmp_path / "a.npz", split=split) for split in ("train", "test"))
    assert pixels(train).shape == (36, *expected)
    assert pixels(test).shape == (4, *expected)
    assert train.classes == ("0", "1", "2", "3")
    assert test.labels is not None
    assert sorted(test.labels.tolist()) == [0, 1, 2, 3]


def test_arrays_of_both_splits(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(6, 5))
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(6)[:, None], x_test=x[:2] + 1, y_test=np.arange(2))
    test = load_arrays(tmp_path / "a.npz", split="test")
    assert isinstance(test.inputs, torch.Tensor)
    assert test.inputs.dtype == torch.float32
    np.testing.assert_allclose(test.inputs.numpy(), x[:2] + 1, rtol=1e-6)
    assert load_arrays(tmp_path / "a.npz").classes == tuple("012345")


def test_arrays_without_classes(tmp_path: Path) -> None:
    x = np.zeros((30, 5), dtype=np.float32)
    np.savez(tmp_path / "values.npz", x=x, y=np.linspace(0, 1, 30))
    np.savez(tmp_path / "none.npz", x)
    values, none = (load_arrays(tmp_path / f"{name}.npz") for name in ("values", "none"))
    assert values.classes == none.classes == ()
    assert none.labels is None
    assert values.labels is not None
    assert values.labels.dtype == torch.float32
    assert len(values.labels) == 27


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 3)), "y": np.zeros(3)}, "x has 4 samples, and y is"),
        ({"x": np.zeros((4, 3)), "y": np.array(["a", "b", "c", "d"])}, "numpy.unique"),
        ({"x": np.array([{}, {}], dtype=object)}, "Python objects"),
        ({"first": np.zeros((4, 3)), "second": np.zeros(4), "third": np.zeros(4)}, "name the arrays x_train"),
        ({}, "holds nothing; name the arrays"),
        (
            {"x_train": np.zeros((4, 3), np.uint8), "y_train": np.zeros(4), "x_test": np.zeros((4, 3))},
            "x_train is torch.uint8, and x_test torch.float32",
        ),
        ({"x": np.zeros(4)}, r"give samples \(N, ..\)"),
    ],
)
def test_arrays_that_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(errors.DataError, match=message):
        load_arrays(tmp_path / "a.npz")


def test_classes_are_those_of_both_splits_and_large_numbers_are_values(tmp_path: Path) -> None:
    x = np.zeros((30, 5), dtype=np.float32)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(30) % 3, x_test=x, y_test=np.arange(30) % 5)
    np.savez(tmp_path / "prices.npz", x=x, y=np.arange(30) * 10**8)
    assert load_arrays(tmp_path / "a.npz").classes == tuple("01234")
    assert load_arrays(tmp_path / "prices.npz").classes == ()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"text"])
def test_files_that_are_no_arrays(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(errors.DataError, match=r"a\.npz"):
        load_arrays(tmp_path / "a.npz")


def test_a_text_is_tokens_and_those_that_come_next(tmp_path: Path) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 20
    (tmp_path / "a.txt").write_text(text)
    train, test = (
        load_text(tmp_path / "a.txt", tokenizer="bytes", split=split, length=16) for split in ("train", "test")
    )
    numbers = torch.tensor(list(text.encode()))
    assert isinstance(train.inputs, torch.Tensor)
    assert isinstance(test.inputs, torch.Tensor)
    joined = torch.cat([train.inputs, test.inputs]).flatten()
    assert joined.equal(numbers[: len(joined)])
    assert train.labels is not None
    assert train.labels.flatten().equal(numbers[1 : train.inputs.numel() + 1])
    assert len(test.inputs) == (len(numbers) - 1) // 16 // 10


def test_a_tokenizer_of_a_folder_or_a_file(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "folder")
    (tmp_path / "a.txt").write_text("a b c " * 40)
    for name in ("tokenizer.json", "folder"):
        samples = load_text(tmp_path / "a.txt", tokenizer=tmp_path / name, length=3)
        assert isinstance(samples.inputs, torch.Tensor)
        assert samples.inputs[0].tolist() == [0, 1, 2]


def test_texts_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("few words")
    (tmp_path / "words.txt").write_text("some more words")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, tokenizer, message in (
        ("short.txt", "bytes", "too few for 10 samples of 128; give more text$"),
        ("words.txt", "bytes", "too few for 10 samples of 128; give more text, or --tokens 1$"),
        ("binary.txt", "bytes", "give a file in UTF-8"),
        ("none.txt", "bytes", "none.txt"),
        ("short.txt", "nowhere", "there is no tokenizer nowhere"),
        ("short.txt", tmp_path / "binary.txt", "cannot read the tokenizer"),
    ):
        with pytest.raises(errors.DataError, match=message):
            load_text(tmp_path / name, tokenizer=tokenizer)
