"""The reference networks, the published weights that belong to them, and making a network from its name."""

import argparse
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cases import WordModel, same_state, state
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

import spectrim as st
from spectrim import data, models
from spectrim.core.errors import DataError, FileError, ModelError, SpectrimError
from spectrim.models import NETWORKS, resolve
from spectrim.models.networks import PaddedShortcut
from spectrim.models.weights import fill_, read_state


class Settings:
    """An object of one's own in a checkpoint."""


PUBLISHED = Path(__file__).parents[1] / "files"

NETS = """
import torch
from torch import nn
from spectrim.core.errors import ModelError

ready = nn.Linear(3, 2)
number = 3
weight_names = ("weight", "bias")


class Net(nn.Linear):
    def __init__(self, inputs=3, *, outputs=2):
        super().__init__(inputs, outputs)

    @classmethod
    def wide(cls):
        return cls(outputs=20)


def make(outputs=2):
    return nn.Linear(3, outputs)

def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    return net

def lazy():
    return nn.LazyLinear(2)

def meta():
    return nn.Linear(3, 2, device="meta")

def picky():
    net = nn.Linear(3, 2)
    net.register_load_state_dict_pre_hook(lambda *args: args[-1].append("made by version 1"))
    return net

def needs(width):
    return nn.Linear(width, 2)

def breaks():
    raise KeyError("no such layer")

def ends():
    raise SystemExit(2)

def knows():
    raise ModelError("the depth is 7; give an even one")

def pair():
    return nn.Linear(3, 2), "adam"

def later():
    import models_test_beside
    return models_test_beside.net()
"""


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def published(name: str) -> Path:
    path = PUBLISHED / f"cifar_{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the published weights are not here: {path}")
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of factories, one that it imports late, and some that cannot be imported."""
    (tmp_path / "models_test_nets.py").write_text(NETS)
    (tmp_path / "models_test_beside.py").write_text("from torch import nn\nnet = nn.Identity\n")
    (tmp_path / "models_test_typo.py").write_text("def make(:\n")
    (tmp_path / "models_test_exits.py").write_text("import sys\nsys.exit('usage: train FILE')\n")
    (tmp_path / "models_test_needy.py").write_text("import no_such_library_at_all\n")
    (tmp_path / "models_test_vague.py").write_text("raise ModuleNotFoundError('something is missing')\n")
    (tmp_path / "models_test_moody.py").write_text("def __getattr__(name):\n    raise RuntimeError('half installed')\n")
    package = tmp_path / "models_test_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "zoo.py").write_text("from torch import nn\n\ndef make():\n    return nn.Identity()\n")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith("models_test_")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


def error_of(call: Callable[[], object], *, kind: type[SpectrimError] = ModelError) -> str:
    """The message of the error, which has exactly this kind."""
    with pytest.raises(SpectrimError) as caught:
        call()
    assert type(caught.value) is kind
    return str(caught.value)


class TestCifarResNets:
    @pytest.mark.parametrize(
        ("name", "count", "layers"),
        [("resnet20", 269_722, 20), ("resnet32", 464_154, 32), ("resnet44", 658_586, 44), ("resnet56", 853_018, 56)],
    )
    def test_counts_are_the_published_ones(self, name: str, count: int, layers: int) -> None:
        model = NETWORKS[name]()
        assert parameters(model) == count
        assert sum(isinstance(module, (nn.Conv2d, nn.Linear)) for module in model.modules()) == layers
        stated = {"resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85}[name]
        assert round(count / 1e6, 2) == stated
        assert f"{stated} M parameters" in str(NETWORKS[name].__doc__)

    def test_names(self) -> None:
        names = set(models.resnet20().state_dict())
        normal = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        blocks = [f"layer{stage}.{block}." for stage in (1, 2, 3) for block in range(3)]
        expected = {"conv1.weight", "linear.weight", "linear.bias"} | {f"bn1.{part}" for part in normal}
        for block in blocks:
            expected |= {f"{block}conv{i}.weight" for i in (1, 2)}
            expected |= {f"{block}bn{i}.{part}" for i in (1, 2) for part in normal}
        assert names == expected

    def test_shapes(self) -> None:
        model = models.resnet20(outputs=7).eval()
        x = torch.randn(2, 3, 32, 32)
        assert model(x).shape == (2, 7)
        x = model.layer1(model.conv1(x))
        assert x.shape == (2, 16, 32, 32)
        x = model.layer2(x)
        assert x.shape == (2, 32, 16, 16)
        assert model.layer3(x).shape == (2, 64, 8, 8)

    def test_the_shortcut_takes_every_other_pixel_between_channels_of_zeros(self) -> None:
        x = torch.arange(2 * 4 * 6 * 6.0).view(2, 4, 6, 6)
        y = PaddedShortcut(8)(x)
        assert y.shape == (2, 8, 3, 3)
        assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
        assert not y[:, :2].any()
        assert not y[:, 6:].any()
        assert "PaddedShortcut(padding=8)" in repr(models.resnet20())

    def test_inputs_are_normalised_by_channel(self) -> None:
        pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
        normalised = models.cifar_inputs(pixels)
        assert normalised.dtype == torch.float32
        assert normalised.shape == pixels.shape
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(normalised[:, :, 0, 0], torch.stack([-mean / std, (1 - mean) / std]))

    @pytest.mark.parametrize(
        "wrong", [torch.rand(2, 3, 4, 4), torch.zeros(2, 1, 4, 4).byte(), torch.zeros(3, 4).byte()]
    )
    def test_other_images_are_refused(self, wrong: Tensor) -> None:
        message = error_of(lambda: models.cifar_inputs(wrong), kind=DataError)
        assert str(list(wrong.shape)) in message
        assert "uint8" in message

    @pytest.mark.parametrize("name", ["resnet20", "resnet32"])
    def test_the_published_weights_load_strictly(self, name: str) -> None:
        tensors = load_file(published(name))
        model = NETWORKS[name]()
        model.load_state_dict(tensors, strict=True)
        again = resolve(f"spectrim:{name}", weights=published(name))
        assert same_state(again, state(model))
        assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in tensors.items())

    def test_the_published_resnet20_recognises_images(self) -> None:
        weights = published("resnet20")
        if data.locate("cifar10") is None:
            pytest.skip("CIFAR-10 is not in the cache: spectrim data get cifar10")
        test = data.load("cifar10", split="test")
        model = resolve("spectrim:resnet20", weights=weights).eval()
        with torch.inference_mode():
            guesses = torch.cat([model(models.cifar_inputs(part)).argmax(1) for part in test.images[:500].split(100)])
        assert (guesses == test.labels[:500]).float().mean() > 0.9


class TestMiniResNet:
    def test_size_is_as_stated(self) -> None:
        stated = str(models.mini_resnet.__doc__)
        x = torch.zeros(1, 1, 28, 28)
        for outputs in (10, 47):
            model = models.mini_resnet(outputs)
            assert f"{parameters(model):,}" in stated
            assert 0.5e6 < parameters(model) < 1.5e6
            assert model.eval()(x).shape == (1, outputs)
        assert f"{st.measure(models.mini_resnet(), x).macs / 1e6:.1f} M MACs" in stated

    def test_names(self) -> None:
        layers = [name for name, m in models.mini_resnet().named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        expected = ["conv1"]
        for stage in (1, 2, 3):
            expected += [f"layer{stage}.0.{part}" for part in ("conv1", "conv2", "shortcut.conv")]
            expected += [f"layer{stage}.1.{part}" for part in ("conv1", "conv2")]
        assert layers == [*expected, "hidden", "head"]

    def test_arguments(self) -> None:
        model = models.mini_resnet(3, 2, width=8, hidden=24).eval()
        assert [tuple(layer.weight.shape) for layer in (model.hidden, model.head)] == [(24, 32), (3, 24)]
        assert model(torch.zeros(4, 2, 28, 28)).shape == (4, 3)
        assert model(torch.zeros(4, 2, 8, 8)).shape == (4, 3)

    def test_it_learns(self) -> None:
        torch.manual_seed(0)
        model = models.mini_resnet(2, width=8, hidden=16)
        # bright above or bright below
        labels = torch.arange(32) % 2
        images = torch.rand(32, 1, 28, 28)
        images[labels == 0, :, :14] += 1
        images[labels == 1, :, 14:] += 1
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(15):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert torch.equal(model(images).argmax(1), labels)


class TestEveryNetwork:
    def test_the_list(self) -> None:
        assert list(NETWORKS) == ["mlp", "mini_resnet", "resnet20", "resnet32", "resnet44", "resnet56"]
        assert all(getattr(models, name) is factory and factory.__doc__ for name, factory in NETWORKS.items())
        with pytest.raises(TypeError):
            NETWORKS["mine"] = nn.Identity  # type: ignore[index]

    @pytest.mark.parametrize("name", NETWORKS)
    def test_sizes_are_checked(self, name: str) -> None:
        for wrong in (0, -1, 2.0, True, "10"):
            message = error_of(lambda wrong=wrong: NETWORKS[name](outputs=wrong))
            assert message == f"outputs is {wrong!r}; give a whole number of at least 1"

    @pytest.mark.parametrize(("name", "shape"), [("resnet20", (3, 32, 32)), ("mini_resnet", (1, 28, 28))])
    def test_it_exports_with_any_batch(self, name: str, shape: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        model = NETWORKS[name]().eval()
        batch = torch.export.Dim("batch", min=1, max=64)
        exported = torch.export.export(model, (torch.randn(2, *shape),), dynamic_shapes=({0: batch},)).module()
        for size in (1, 5):
            x = torch.randn(size, *shape)
            torch.testing.assert_close(exported(x), model(x))

    @pytest.mark.parametrize("name", NETWORKS)
    def test_the_seed_decides_the_weights_and_only_the_seed(self, name: str) -> None:
        torch.manual_seed(3)
        first = NETWORKS[name]()
        torch.manual_seed(3)
        assert same_state(NETWORKS[name](), state(first))


class TestOwn:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_by_name(self, name: str) -> None:
        assert type(resolve(f"spectrim:{name}")) is type(NETWORKS[name]())

    def test_options(self) -> None:
        assert resolve("spectrim:resnet20", options={"outputs": 3}).linear.out_features == 3

    def test_an_unknown_name_lists_all_and_the_near_ones(self) -> None:
        message = error_of(lambda: resolve("spectrim:resnet-20"))
        assert "did you mean 'resnet20'" in message
        assert message.endswith(f"it has {', '.join(NETWORKS)}")
        assert "did you mean" not in error_of(lambda: resolve("spectrim:xyz"))

    def test_an_option_it_does_not_take(self) -> None:
        message = error_of(lambda: resolve("spectrim:resnet20", options={"classes": 3}))
        assert (
            "spectrim:resnet20 cannot be called with classes: got an unexpected keyword argument 'classes'" in message
        )
        assert "it takes (outputs: int = 10)" in message

    def test_a_size_it_refuses_is_said_as_the_network_says_it(self) -> None:
        message = error_of(lambda: resolve("spectrim:mlp", options={"hidden": 0}))
        assert message == "hidden is 0; give a whole number of at least 1"


class TestReference:
    @pytest.mark.parametrize("reference", ["", ":", "a:", ":b", "not a module:f", "a..b:f", ".a:f", "9x:f", "a-b:f"])
    def test_what_is_none(self, reference: str) -> None:
        message = error_of(lambda: resolve(reference))
        assert repr(reference) in message
        assert "spectrim:NAME, pkg.module:factory, torchvision:NAME, timm:NAME or hf:DIR" in message

    @pytest.mark.parametrize(
        ("reference", "advice"),
        [
            ("resnet20", "write spectrim:resnet20"),
            ("nets.py:make", "write nets:make"),
            ("lib/nets.py:make", "write lib.nets:make"),
            ("./nets.py:make", "write nets:make"),
            (__file__, "its weights go to --weights"),
        ],
    )
    def test_what_is_nearly_one(self, reference: str, advice: str) -> None:
        assert advice in error_of(lambda: resolve(reference))


class TestModule:
    def test_a_function_in_the_current_folder(self, here: Path) -> None:
        before = list(sys.path)
        assert resolve("models_test_nets:make").out_features == 2
        assert resolve("models_test_nets:make", options={"outputs": 5}).out_features == 5
        assert sys.path == before
        assert Path(sys.modules["models_test_nets"].__file__) == here / "models_test_nets.py"

    def test_a_class_and_a_method_of_it(self, here: Path) -> None:
        assert type(resolve("models_test_nets:Net", options={"inputs": 4})).__name__ == "Net"
        assert resolve("models_test_nets:Net.wide").out_features == 20

    def test_a_module_of_a_package(self, here: Path) -> None:
        assert isinstance(resolve("models_test_pkg.zoo:make"), nn.Identity)

    def test_an_installed_module(self) -> None:
        assert resolve("torch.nn:Linear", options={"in_features": 3, "out_features": 4}).weight.shape == (4, 3)

    def test_the_factory_may_import_from_the_current_folder(self, here: Path) -> None:
        assert isinstance(resolve("models_test_nets:later"), nn.Identity)

    def test_the_model_comes_as_the_factory_made_it(self, here: Path) -> None:
        model = resolve("models_test_nets:make")
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_the_path_is_restored_after_an_error(self, here: Path) -> None:
        before = list(sys.path)
        for reference in ("models_test_typo:make", "models_test_nets:breaks", "models_test_nets:nothing"):
            error_of(lambda reference=reference: resolve(reference))
            assert sys.path == before

    def test_what_the_module_adds_to_the_path_stays(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = list(sys.path)
        monkeypatch.setattr(sys, "path", list(before))
        (here / "models_test_path.py").write_text(
            "import sys\nfrom torch import nn\nsys.path.append('/models-test')\nsys.path.remove(sys.path[0])\n"
            "make = nn.Identity\n"
        )
        resolve("models_test_path:make")
        assert sys.path == [*before, "/models-test"]

    @pytest.mark.parametrize(
        ("reference", "expected"),
        [
            ("models_test_net:make", "there is no module 'models_test_net'; did you mean 'models_test_nets'"),
            ("models_test_pkg.zo:make", "there is no module 'models_test_pkg.zo'; did you mean 'models_test_pkg.zoo'?"),
            ("models_test_pkgs.zoo:make", "there is no module 'models_test_pkgs'; did you mean 'models_test_pkg'"),
            ("models_test_nets.a.b:make", "there is no module 'models_test_nets.a'; install it"),
            ("qqqqqq:make", "there is no module 'qqqqqq'; install it, or run this in the folder that holds it"),
            ("models_test_needy:make", "models_test_needy needs the module 'no_such_library_at_all'"),
            ("models_test_vague:make", "cannot be imported: ModuleNotFoundError: something is missing"),
            ("models_test_typo:make", "models_test_typo cannot be imported: SyntaxError: "),
            ("models_test_exits:make", "models_test_exits cannot be imported: SystemExit: usage: train FILE"),
            ("models_test_moody:make", "models_test_moody:make cannot be imported: RuntimeError: half installed"),
            ("models_test_nets:mak", "there is no 'mak'; did you mean 'make'"),
            ("models_test_nets:make()", "there is no 'make()'; did you mean 'make'"),
            ("models_test_nets:Net.wider", "there is no 'wider'; did you mean 'wide'"),
            ("models_test_nets:ready", "is a Linear, not a function"),
            ("models_test_nets:number", "is a int, not a function"),
            ("models_test_nets:needs", "cannot be called with no options: missing a required argument: 'width'"),
            ("models_test_nets:breaks", "models_test_nets:breaks failed to make a network: KeyError: 'no such layer'"),
            ("models_test_nets:ends", "models_test_nets:ends failed to make a network: SystemExit: 2"),
            ("models_test_nets:pair", "returned a tuple, not a torch.nn.Module"),
        ],
    )
    def test_errors(self, here: Path, reference: str, expected: str) -> None:
        assert expected in error_of(lambda: resolve(reference))

    def test_the_cause_is_kept(self, here: Path) -> None:
        with pytest.raises(ModelError) as caught:
            resolve("models_test_nets:breaks")
        assert isinstance(caught.value.__cause__, KeyError)

    def test_the_error_of_a_factory_is_passed_on(self, here: Path) -> None:
        assert error_of(lambda: resolve("models_test_nets:knows")) == "the depth is 7; give an even one"

    def test_a_callable_without_a_signature_is_called(self, here: Path) -> None:
        assert "returned a dict" in error_of(lambda: resolve("builtins:dict"))


class TestTorchvision:
    @pytest.fixture
    def torchvision_models(self) -> ModuleType:
        return pytest.importorskip("torchvision.models", reason="the networks are torchvision's")

    @pytest.fixture
    def offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No cached weights, and a refusal to fetch any."""

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("something was to be downloaded")

        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.setattr(torch.hub, "urlopen", refuse)

    def test_a_network(self, torchvision_models: ModuleType, offline: None) -> None:
        model = resolve("torchvision:resnet18", options={"num_classes": 5})
        assert isinstance(model, torchvision_models.ResNet)
        assert model.fc.out_features == 5

    def test_backbones_are_not_downloaded_either(self, torchvision_models: ModuleType, offline: None) -> None:
        name = "lraspp_mobilenet_v3_large"
        with pytest.raises(AssertionError, match="downloaded"):
            torchvision_models.get_model(name, weights=None)
        assert "backbone" in dict(resolve(f"torchvision:{name}").named_children())

    @pytest.mark.parametrize("option", ["weights", "weights_backbone", "pretrained", "pretrained_backbone"])
    def test_options_that_would_fetch_weights(self, torchvision_models: ModuleType, option: str) -> None:
        message = error_of(lambda: resolve("torchvision:resnet18", options={option: "DEFAULT"}))
        assert f"the option {option!r} would fetch weights" in message

    def test_unknown_names(self, torchvision_models: ModuleType) -> None:
        assert "did you mean 'resnet1" in error_of(lambda: resolve("torchvision:resnet19"))
        message = error_of(lambda: resolve("torchvision:qqqq"))
        assert message == "torchvision has no network 'qqqq'; torchvision.models.list_models() names all"

    def test_an_option_it_does_not_take(self, torchvision_models: ModuleType) -> None:
        message = error_of(lambda: resolve("torchvision:resnet18", options={"outputs": 3}))
        assert "torchvision:resnet18 failed to make a network: TypeError: " in message
        assert "'outputs'" in message

    def test_weights(self, torchvision_models: ModuleType, tmp_path: Path) -> None:
        torch.manual_seed(0)
        options = {"num_classes": 3}
        model = torchvision_models.squeezenet1_1(weights=None, **options)
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        again = resolve("torchvision:squeezenet1_1", weights=tmp_path / "w.safetensors", options=options)
        assert same_state(again, state(model))

    def test_where_it_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchvision.models", None)
        message = error_of(lambda: resolve("torchvision:resnet18"))
        assert message == 'torchvision is not installed; run: pip install "spectrim[vision]"'


class TestTimm:
    def test_a_network(self) -> None:
        pytest.importorskip("timm", reason="the networks are timm's")
        model = resolve("timm:resnet18", options={"num_classes": 5})
        assert model.fc.out_features == 5
        assert "did you mean 'resnet1" in error_of(lambda: resolve("timm:resnet19"))
        assert error_of(lambda: resolve("timm:qqqq")) == "timm has no network 'qqqq'; timm.list_models() names all"

    @pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "local-dir:/tmp", "timm/resnet18"])
    def test_hubs_and_folders_are_refused(self, name: str) -> None:
        pytest.importorskip("timm", reason="the networks are timm's")
        assert "timm would read a hub or a folder" in error_of(lambda: resolve(f"timm:{name}"))

    @pytest.mark.parametrize("option", ["pretrained", "pretrained_cfg", "checkpoint_path"])
    def test_options_that_would_fetch_weights(self, option: str) -> None:
        pytest.importorskip("timm", reason="the networks are timm's")
        message = error_of(lambda: resolve("timm:resnet18", options={option: "x"}))
        assert f"the option {option!r} would fetch weights" in message

    def test_where_it_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        assert error_of(lambda: resolve("timm:resnet18")) == "timm is not installed; run: pip install timm"

    def test_where_it_is_broken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "timm.py").write_text("raise RuntimeError('built for another torch')\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "timm", raising=False)
        message = error_of(lambda: resolve("timm:resnet18"))
        assert "timm is installed, but cannot be imported (RuntimeError: built for another torch)" in message


class TestWeights:
    def write(self, path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
        save_file(tensors, path, metadata=metadata or None)
        return path

    def test_they_are_loaded(self, here: Path) -> None:
        tensors = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
        path = self.write(here / "w.SAFETENSORS", tensors)
        assert same_state(resolve("models_test_nets:make", weights=path), tensors)
        assert same_state(resolve("models_test_nets:make", weights=Path("w.SAFETENSORS")), tensors)

    def test_number_types_are_those_of_the_network(self, here: Path) -> None:
        path = self.write(here / "w.safetensors", {"weight": torch.ones(2, 3).half(), "bias": torch.zeros(2).double()})
        model = resolve("models_test_nets:make", weights=path)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}

    def test_a_lazy_layer_takes_its_size_from_them(self, here: Path) -> None:
        path = self.write(here / "w.safetensors", {"weight": torch.ones(2, 7), "bias": torch.zeros(2)})
        assert resolve("models_test_nets:lazy", weights=path).weight.shape == (2, 7)

    def test_a_tied_weight_is_stored_once(self, here: Path) -> None:
        tied = resolve("models_test_nets:tied")
        save_model(tied, str(here / "w.safetensors"))
        assert len(load_file(here / "w.safetensors")) < len(tied.state_dict())
        again = resolve("models_test_nets:tied", weights=here / "w.safetensors")
        assert same_state(again, state(tied))
        assert again[0].weight is again[2].weight

    @pytest.mark.parametrize("factory", [lambda: models.mlp(4, 2, width=8), WordModel])
    def test_dense_networks_saved_by_spectrim_load_too(self, tmp_path: Path, factory: Callable[[], nn.Module]) -> None:
        module = ModuleType("models_test_made")
        module.make = factory  # type: ignore[attr-defined]
        model = factory()
        path = st.save(model, tmp_path / "w.safetensors")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "models_test_made", module)
            assert same_state(resolve("models_test_made:make", weights=path), state(model))

    def test_factored_networks_are_sent_to_spectrim_load(self, tmp_path: Path) -> None:
        model, x = models.mlp(4, 2, width=8), torch.randn(3, 4)
        small = st.compress(model, st.Rank(2), example_inputs=x, include="fc2").model
        path = st.save(small, tmp_path / "w.safetensors")
        options = {"inputs": 4, "outputs": 2, "width": 8}
        message = error_of(lambda: resolve("spectrim:mlp", weights=path, options=options), kind=FileError)
        assert "spectrim.load" in message
        assert "missing: fc2.weight" in message

    def test_a_network_with_other_names(self, here: Path) -> None:
        tensors = {f"backbone_{name}": tensor for name, tensor in models.resnet20().state_dict().items()}
        path = self.write(here / "w.safetensors", tensors)
        message = error_of(lambda: resolve("spectrim:resnet20", weights=path), kind=FileError)
        assert str(path) in message
        # torch forgives the batch counters that may be missing, and nothing else
        assert "missing: conv1.weight, bn1.weight, bn1.bias, ...; " in message
        assert f"{len(tensors)} not in the network: backbone_" in message
        assert len(re.findall("backbone_", message)) == 3

    def test_a_network_with_other_shapes(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "w.safetensors", models.mlp(4, 3, width=8).state_dict())
        options = {"inputs": 5, "outputs": 7, "width": 9}
        message = error_of(lambda: resolve("spectrim:mlp", weights=path, options=options), kind=FileError)
        assert "12 of another shape: fc1.weight [8, 4], the network's is [9, 5], fc1.bias [8]" in message
        assert message.count("the network's is") == 3
        assert "outputs" in message

    def test_whole_numbers_are_not_taken_for_weights(self, here: Path) -> None:
        path = self.write(here / "w.safetensors", {"weight": torch.ones(2, 3).char(), "bias": torch.zeros(2)})
        message = error_of(lambda: resolve("models_test_nets:make", weights=path), kind=FileError)
        assert "1 of another type: weight torch.int8, the network's is torch.float32" in message

    def test_a_network_that_refuses_by_itself(self, here: Path) -> None:
        path = self.write(here / "w.safetensors", {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        message = error_of(lambda: resolve("models_test_nets:picky", weights=path), kind=FileError)
        assert "is for another network: " in message
        assert "made by version 1" in message

    def test_a_network_without_memory(self, here: Path) -> None:
        path = self.write(here / "w.safetensors", {"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
        assert "meta device" in error_of(lambda: resolve("models_test_nets:meta", weights=path))
        assert resolve("models_test_nets:meta").weight.is_meta

    @pytest.mark.parametrize("name", ["w.pt", "w.pth", "pytorch_model.bin", "it's w.ckpt", "W.PT"])
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {"epoch": 3, "model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
            lambda state: {"weights_of_the_best_epoch": state, "loss": 0.5},
        ],
        ids=["state", "state_dict", "model", "other name"],
    )
    def test_what_torch_saved_is_read(self, here: Path, name: str, wrap: Callable[[Any], Any]) -> None:
        tied = resolve("models_test_nets:tied")
        torch.save(wrap(tied.state_dict()), here / name)
        assert same_state(resolve("models_test_nets:tied", weights=here / name), state(tied))

    def test_which_of_two_states_is_taken_is_said(self, here: Path) -> None:
        tied = resolve("models_test_nets:tied")
        torch.save({"ema": {"weight": torch.ones(3)}, "model": tied.state_dict()}, here / "w.pt")
        with pytest.warns(UserWarning, match="its entry 'model'; it also has 'ema'"):
            loaded = resolve("models_test_nets:tied", weights=here / "w.pt")
        assert same_state(loaded, state(tied))

    @pytest.mark.parametrize(
        "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.net.", "backbone."]
    )
    def test_prefixes_of_wrappers_are_left_out_and_named(self, here: Path, prefix: str) -> None:
        tied = resolve("models_test_nets:tied")
        torch.save({prefix + name: tensor for name, tensor in tied.state_dict().items()}, here / "w.pt")
        with pytest.warns(UserWarning, match=rf"'{prefix}' is left out of all names"):
            loaded = resolve("models_test_nets:tied", weights=here / "w.pt")
        assert same_state(loaded, state(tied))

    @pytest.mark.parametrize("name", ["model", "net", "module"])
    def test_a_tensor_named_as_a_wrapper_is_an_error(self, here: Path, name: str) -> None:
        torch.save({name: torch.zeros(3)}, here / "w.pt")
        message = error_of(lambda: resolve("models_test_nets:tied", weights=here / "w.pt"), kind=FileError)
        assert f"not in the network: {name}" in message

    def test_values_that_the_network_cannot_hold(self, here: Path) -> None:
        torch.save({"weight": torch.full((2, 3), 1e6), "bias": torch.zeros(2)}, here / "w.pt")
        message = error_of(
            lambda: fill_(nn.Linear(3, 2).half(), read_state(here / "w.pt"), origin=here / "w.pt"), kind=FileError
        )
        assert "of another type: weight torch.float32, the network's is torch.float16" in message

    def test_what_lies_beside_the_network_is_left_out_and_named(self, here: Path) -> None:
        tied = resolve("models_test_nets:tied")
        inner = {f"model.{name}": tensor for name, tensor in tied.state_dict().items()}
        torch.save({"state_dict": {**inner, "criterion.weight": torch.ones(3)}}, here / "w.ckpt")
        with pytest.warns(UserWarning, match=r"'model\.' is left out .* such as 'criterion\.weight'"):
            assert same_state(resolve("models_test_nets:tied", weights=here / "w.ckpt"), state(tied))

    def test_a_checkpoint_in_a_checkpoint(self, here: Path) -> None:
        tied = resolve("models_test_nets:tied")
        torch.save({"ema": {"module": tied.state_dict(), "decay": 0.9}, "optimizer": {"state": {}}}, here / "w.pt")
        assert same_state(resolve("models_test_nets:tied", weights=here / "w.pt"), state(tied))

    def test_what_is_no_tensor_is_left_out_and_named(self, here: Path) -> None:
        tied = resolve("models_test_nets:tied")
        torch.save({**tied.state_dict(), "epoch": 3}, here / "w.pt")
        with pytest.warns(UserWarning, match="'epoch' beside the weights"):
            assert same_state(resolve("models_test_nets:tied", weights=here / "w.pt"), state(tied))

    def test_numbers_beside_the_state_are_no_state(self, here: Path) -> None:
        tied = resolve("models_test_nets:tied")
        torch.save({"model": tied.state_dict(), "lr": torch.tensor(0.1), "step": torch.tensor(3)}, here / "w.pt")
        assert same_state(resolve("models_test_nets:tied", weights=here / "w.pt"), state(tied))

    def test_a_header_of_any_length_is_read(self, here: Path) -> None:
        tied = resolve("models_test_nets:tied")
        st.save(tied, here / "w.safetensors")
        content = (here / "w.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        padded = (1 << 16).to_bytes(8, "little") + content[8 : 8 + length].ljust(1 << 16) + content[8 + length :]
        (here / "w.safetensors").write_bytes(padded)
        assert same_state(st.load(here / "w.safetensors", tied), state(tied))
        assert read_state(here / "w.safetensors")

    @pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pkl"])
    def test_code_in_a_file_is_never_run(self, here: Path, suffix: str) -> None:
        class Hostile:
            def __reduce__(self) -> Any:
                return Path.touch, (here / "was run",)

        path = here / f"w{suffix}"
        torch.save({"state_dict": {"weight": torch.ones(2)}, "callback": Hostile()}, path)
        message = error_of(lambda: resolve("spectrim:mlp", weights=path), kind=FileError)
        assert "without running code that it may hold" in message
        assert "\n" not in message
        path.write_bytes(pickle.dumps(Hostile()))
        error_of(lambda: resolve("spectrim:mlp", weights=path), kind=FileError)
        assert not (here / "was run").exists()

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda model: {"state_dict": model.state_dict(), "hyper_parameters": {"settings": Settings()}},
            lambda model: {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1), "best": np.float64(1.0)},
            lambda model: {"epoch": 3, "model": model, "optimizer": None},
            lambda model: model,
        ],
        ids=["object", "arguments", "module in a checkpoint", "module"],
    )
    def test_objects_are_passed_over(self, here: Path, wrap: Callable[[Any], Any]) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 2)))
        model.register_buffer("scratch", torch.ones(2), persistent=False)
        torch.save(wrap(model), here / "w.pt")
        expected = model.state_dict()
        stored = read_state(here / "w.pt")
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())

    def test_two_weights_for_one_are_refused(self, here: Path) -> None:
        tied = resolve("models_test_nets:tied")
        wrong = tied.state_dict() | {"2.weight": torch.zeros(3, 3)}
        torch.save(wrong, here / "w.pt")
        message = error_of(lambda: resolve("models_test_nets:tied", weights=here / "w.pt"), kind=FileError)
        assert "two different weights for one of the network" in message

    @pytest.mark.parametrize("value", [torch.ones(2), [1, 2], {"epoch": 1}, {}, {"a": {}}], ids=str)
    def test_a_file_without_a_state(self, tmp_path: Path, value: object) -> None:
        torch.save(value, tmp_path / "w.pt")
        message = error_of(lambda: resolve("spectrim:mlp", weights=tmp_path / "w.pt"), kind=FileError)
        assert "torch.save(model.state_dict(), 'weights.pt')" in message

    def test_other_files(self, tmp_path: Path) -> None:
        def message(path: Path) -> str:
            return error_of(lambda: resolve("spectrim:mlp", weights=path), kind=FileError)

        assert message(tmp_path).endswith("is a folder without weights")
        (tmp_path / "w.txt").write_text("no weights")
        assert "or holds no weights" in message(tmp_path / "w.txt")
        assert "is missing; " in message(tmp_path / "none.pt")
        (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 cut")
        assert "cannot read" in message(tmp_path / "cut.pt")
        assert "is missing; " in message(tmp_path / "none.safetensors")
        (tmp_path / "w.safetensors").write_bytes(b"PK\x03\x04 a pickle in disguise")
        assert "no file of torch.save" in message(tmp_path / "w.safetensors")
        (tmp_path / "folder.safetensors").mkdir()
        assert "is a folder" in message(tmp_path / "folder.safetensors")
        (tmp_path / "w.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
        assert "git lfs pull" in message(tmp_path / "w.bin")

    def test_they_are_read_before_any_code_runs(self, here: Path) -> None:
        message = error_of(
            lambda: resolve("models_test_nets:breaks", weights=here / "none.safetensors"), kind=FileError
        )
        assert "none.safetensors" in message
        assert "models_test_nets" not in sys.modules


def test_factors_without_their_structure_are_known(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(32, 32))
    small = st.compress(network, st.Rank(4), example_inputs=torch.randn(1, 32)).model
    torch.save(small.state_dict(), tmp_path / "small.pt")
    with pytest.raises(FileError, match="factors of a compressed network without its structure"):
        st.load(tmp_path / "small.pt", nn.Sequential(nn.Linear(32, 32)))


def test_a_reference_too_long_for_a_file_is_refused_as_others_are() -> None:
    with pytest.raises(ModelError, match="does not name a network"):
        resolve("x" * 5000)
