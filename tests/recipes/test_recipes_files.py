"""Recipes as files: read, checked with one message, written, and the folder that a run belongs to."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from spectrim import errors, recipes
from spectrim.recipes import MlpStudy, Phase, Study, parse_recipe, read_recipe, recipe_text
from spectrim.recipes.files import _models
from spectrim.recipes.run import RunFolder, images_of
from spectrim.recipes.seed import SeedRun
from spectrim.recipes.study import ProgressReporter

SMALL = """
kind = "mlp"
name = "mine"
title = "mine"
dataset = "digits"
width = 16
hidden = 1
ranks = [4]
held_out = 237
calibration_images = 100
dense = { epochs = 1, lr = 1e-2, batch = 64 }

[[tunings]]
metric = "plain"
phase = { epochs = 1, lr = 1e-2, batch = 64 }
"""
DYNAMIC = """
kind = "dynamic"
name = "mine"
title = "mine"
dataset = "digits"
held_out = 237
rank = 4
dense = { epochs = 1, lr = 1e-2, batch = 64 }

[[ways]]
name = "moving"
shrink = 0.1
keep = "last"
start = 0.5
every = 5
settled = 0.5
phase = { epochs = 1, lr = 1e-2, batch = 64 }
"""


@pytest.mark.parametrize("study", recipes.STUDIES, ids=lambda study: study.name)
def test_a_recipe_written_and_read_is_the_same(study: Study) -> None:
    again = parse_recipe(recipe_text(study), origin="test")
    assert again.model_copy(update={"command": study.command}) == study
    assert again.identity == study.identity
    quick = study.quick()
    assert parse_recipe(recipe_text(quick), origin="test").identity == quick.identity != study.identity


@pytest.mark.parametrize("name", recipes.NAMES)
def test_every_file_is_of_its_name_and_says_what_it_is(name: str) -> None:
    text = recipes.recipe_file(name)
    assert text.startswith("# ")
    settings = tomllib.loads(text)
    assert settings["name"] == name
    assert recipes.find_study(name).command == ("spectrim demo" if name == "demo" else f"spectrim recipe {name}")


def test_a_file_is_read_with_the_command_that_repeats_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SMALL)
    study = read_recipe(path)
    assert isinstance(study, MlpStudy)
    assert study.ranks == (4,)
    assert study.dense == Phase(epochs=1, lr=1e-2, batch=64)
    assert study.command == f"spectrim recipe run {path}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "mlp"', "", r"has no kind; begin it with kind = .mlp., or another of mlp, dynamic"),
        ('kind = "mlp"', 'kind = "mpl"', r"kind = .mpl. is unknown; did you mean 'mlp'\? there are mlp, dynamic"),
        ('kind = "mlp"', "kind = 3", r"kind = 3 is unknown; there are mlp"),
        ("width = 16", "widht = 16", r"widht is no key here; did you mean 'width'\? allowed are kind, name"),
        (
            "epochs = 1, lr = 1e-2, batch = 64 }\n\n",
            "epoch = 1, lr = 1e-2, batch = 64 }\n\n",
            r"dense\.epoch is no key",
        ),
        ("width = 16", "width = 0", r"width = 0 is not allowed: .*greater than or equal to 1"),
        ("width = 16", 'width = "16"', r'width = "16" is not allowed: .*valid integer'),
        ("width = 16", "", None),
        ("held_out = 237", "", r"held_out is missing; needed here are name, title"),
        ("ranks = [4]", "ranks = [4, 0]", r"ranks\[1\] = 0 is not allowed"),
        ("ranks = [4]", "ranks = []", r"ranks is not allowed: .*at least 1 item"),
        ('metric = "plain"', 'metric = "plane"', r'tunings\[0\]\.metric = "plane" is not allowed: .*plain'),
        ('metric = "plain"', 'metrik = "plain"', r"tunings\[0\]\.metrik is no key here; did you mean 'metric'\?"),
        ("lr = 1e-2", "lr = inf", r"dense\.lr = Infinity is not allowed"),
        ('name = "mine"', 'name = "../mine"', r'name = "../mine" is not allowed'),
        ("width = 16", "width = ", r"is not TOML: .*line 6"),
        ("width = 16", "width = 1979-05-27", r'width = "1979-05-27" is not allowed'),
        ("width = 16", 'runtimes = ["torhc"]', r'runtimes\[0\] = "torhc" is not allowed'),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_a_mistake_in_a_file_is_one_message(old: str, new: str, message: str | None, tmp_path: Path) -> None:
    assert old in SMALL
    path = tmp_path / "mine.toml"
    path.write_text(SMALL.replace(old, new, 1))
    if message is None:
        assert read_recipe(path).model_dump()["width"] == 1024
        return
    with pytest.raises(errors.FileError, match=message) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_an_alternative_names_its_own_keys() -> None:
    assert parse_recipe(DYNAMIC, origin="test").model_dump()["ways"][0]["every"] == 5
    with pytest.raises(errors.FileError, match=r"ways\[0\]\.evrey is no key here; did you mean 'every'\?") as caught:
        parse_recipe(DYNAMIC.replace("every", "evrey"), origin="test")
    assert "ways[0].every is missing" in str(caught.value)


def test_many_mistakes_are_counted() -> None:
    bad = SMALL.replace("width", "a").replace("hidden", "b").replace("held_out", "c").replace("ranks", "d")
    with pytest.raises(errors.FileError, match=r"\(and 3 more faults\)"):
        parse_recipe(bad, origin="test")


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "binary"])
def test_a_file_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(errors.FileError, match=r"mine\.toml"):
        read_recipe(path)


def test_a_folder_belongs_to_one_recipe(tmp_path: Path) -> None:
    study = parse_recipe(SMALL, origin="test")
    folder = RunFolder(tmp_path)
    folder.claim(study)
    # a recipe that the user put there is not written over
    with pytest.raises(errors.FileError, match=r"settings \(held_out\); .* or delete this one$"):
        folder.claim(study.model_copy(update={"held_out": 200}))
    # that of a run of which nothing has come yet is
    (tmp_path / "parts").mkdir()
    folder.claim(study.model_copy(update={"held_out": 200}))
    folder.claim(study)
    (tmp_path / "parts" / "dense.unfinished.safetensors").touch()
    written = (tmp_path / "recipe.toml").read_bytes()
    # other seeds and words are the same recipe
    folder.claim(study.model_copy(update={"seeds": (0, 1), "title": "other words"}))
    with pytest.raises(errors.FileError, match=r"run of another recipe, mine; give another folder with --out, or del"):
        folder.claim(study.model_copy(update={"name": "other"}))
    with pytest.raises(errors.FileError, match=r"run of mine with other settings \(held_out\); give another folder"):
        folder.claim(study.model_copy(update={"held_out": 200}))
    with pytest.raises(errors.FileError, match=r"\(held_out, limit\).* not trained again if you copy its parts"):
        folder.claim(study.model_copy(update={"held_out": 1200}).quick())
    assert (tmp_path / "recipe.toml").read_bytes() == written
    (tmp_path / "recipe.toml").write_text("nonsense = ")
    with pytest.raises(errors.FileError, match="cannot tell whose run"):
        folder.claim(study)


def test_keys_of_parts_know_the_data_and_every_setting_that_matters() -> None:
    study = parse_recipe(SMALL, origin="test")
    images = images_of(study)

    def key(study: Study = study, *, seed: int = 0, **changed: object) -> str:
        changed_images = type(images)(**{**vars(images), **changed})
        return SeedRun(study, seed, changed_images, Path(), ProgressReporter()).key()

    assert key() == key(study.model_copy(update={"title": "x", "ranks": (2,), "seeds": (0, 1)}))
    others = [
        key(seed=1),
        key(checksums=("other", images.checksums[1])),
        key(checksums=(images.checksums[0], "other")),
        *(
            key(study.model_copy(update=setting))
            for setting in ({"width": 8}, {"hidden": 2}, {"held_out": 200}, {"limit": 9})
        ),
        key(study.model_copy(update={"dense": Phase(epochs=2, lr=1e-2, batch=64)})),
    ]
    assert len({key(), *others}) == len(others) + 1


def test_published_figures_keep_the_dense_network_apart() -> None:
    (figures,) = recipes.find_study("mnist-mlp").published
    assert figures.for_report().accuracy == (
        (None, 0.97),
        (200, 0.968),
        (100, 0.955),
        (50, 0.941),
        (20, 0.911),
        (10, 0.875),
    )
    assert json.loads(figures.model_dump_json())["ranks"]["200"] == 0.968


def models_in(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """A kind of recipe and the values that its keys hold."""
    models = {kind}
    for field in kind.model_fields.values():
        for inner in _models(field.annotation):
            models |= models_in(inner)
    return models


@pytest.mark.parametrize("kind", recipes.KINDS)
def test_every_key_is_documented(kind: str) -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    if not page.exists():
        pytest.skip("the documentation is not installed")
    named = set(re.findall(r"[A-Za-z_]+", " ".join(re.findall(r"`[^`\n]+`", page.read_text(encoding="utf-8")))))
    inside = models_in(recipes.KINDS[kind])
    assert len(inside) > 1
    for model in inside:
        names = {field.alias or name for name, field in model.model_fields.items()}
        assert names <= named, model.__name__
