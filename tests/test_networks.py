"""Whole networks of many kinds through the one-call path, with and without reconstruction."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import same_state, state
from torch import Tensor, nn

import spectrim as st
from spectrim.layers.forms import selected_forms

FORM_NAMES = set(selected_forms(None))


def block(into: int, out: int, kernel: int | tuple[int, int] = 3, **options: Any) -> nn.Sequential:
    """Convolution, norm, activation in place."""
    conv = nn.Conv2d(into, out, kernel, padding="same" if "stride" not in options else 1, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class Plain(nn.Sequential):
    """Ten convolutions one after the other."""

    def __init__(self) -> None:
        widths = [3, 16, 16, 24, 24, 32, 32, 32, 48, 48, 48]
        blocks: list[nn.Module] = [
            block(into, out, 3, **({"stride": 2} if number in (3, 6) else {}))
            for number, (into, out) in enumerate(pairwise(widths), start=1)
        ]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


class DenseNet(nn.Module):
    """Every layer sees what all before it made (after Huang 2017)."""

    def __init__(self, growth: int = 12, layers: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.layers = nn.ModuleList(self._layer(24 + growth * number, growth) for number in range(layers))
        self.squeeze = nn.Conv2d(24 + growth * layers, 32, 1)
        self.head = nn.Linear(32, 10)

    @staticmethod
    def _layer(width: int, growth: int) -> nn.Sequential:
        return nn.Sequential(
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4 * growth, 1, bias=False)),
            *(nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return self.head(torch.relu(self.squeeze(torch.cat(features, dim=1))).mean(dim=(2, 3)))


class Inverted(nn.Module):
    """Wide, depthwise, narrow, added to what came (after Sandler 2018)."""

    def __init__(self, into: int, out: int, *, stride: int = 1) -> None:
        super().__init__()
        wide = 4 * into
        self.expand = nn.Sequential(nn.Conv2d(into, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
        )
        self.project = nn.Sequential(nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out))
        self.adds = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class Mobile(nn.Sequential):
    """Inverted residual blocks between two ordinary convolutions."""

    def __init__(self) -> None:
        super().__init__(
            block(3, 16, 3, stride=2),
            Inverted(16, 16),
            Inverted(16, 24, stride=2),
            Inverted(24, 24),
            Inverted(24, 32),
            block(32, 64, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64, 10),
        )


class UNet(nn.Module):
    """Down and up again, with transposed convolutions and skip connections (after Ronneberger 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, 16), block(16, 32), block(32, 48)
        self.up2, self.up1 = nn.ConvTranspose2d(48, 32, 2, stride=2), nn.ConvTranspose2d(32, 16, 3, 2, 1, 1)
        self.join2, self.join1 = block(64, 32), block(32, 16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(nn.functional.max_pool2d(fine, 2))
        y = self.up2(self.bottom(nn.functional.max_pool2d(coarse, 2)))
        y = self.up1(self.join2(torch.cat([y, coarse], dim=1)))
        return self.head(self.join1(torch.cat([y, fine], dim=1)))


class Branches(nn.Module):
    """1x1, 1x7 then 7x1, 5x5 and pooling side by side (after Szegedy 2016)."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.one = block(into, out, 1)
        self.long = nn.Sequential(block(into, out, 1), block(out, out, (1, 7)), block(out, out, (7, 1)))
        self.five = nn.Sequential(block(into, out, 1), block(out, out, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), block(into, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.long(x), self.five(x), self.pool(x)], dim=1)


class Inception(nn.Sequential):
    """Two groups of branches."""

    def __init__(self) -> None:
        super().__init__(
            block(3, 24, 3, stride=2),
            Branches(24, 16),
            Branches(64, 16),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


class Wave(nn.Sequential):
    """Conv1d, strided and dilated."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv1d(4, 32, 9, stride=2, padding=4), nn.BatchNorm1d(32), nn.ReLU(inplace=True)),
            *(nn.Conv1d(32, 48, 5, padding=4, dilation=2), nn.BatchNorm1d(48), nn.ReLU(inplace=True)),
            *(nn.Conv1d(48, 48, 3, padding="same", padding_mode="circular"), nn.GELU()),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(48, 6)),
        )


class Words(nn.Module):
    """An embedding, an encoder, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)))


class Pair(nn.Module):
    """Two inputs of different kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(block(3, 16), block(16, 32, 3, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.table = nn.Sequential(nn.Linear(12, 64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.ReLU(inplace=True))
        self.head = nn.Linear(128 + 64, 10)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.cat([self.image(image), self.table(table)], dim=1))


class ManyOutputs(nn.Module):
    """Outputs in a dictionary of a tensor, a tuple and None."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 24), block(24, 32, 3, stride=2), block(32, 32))
        self.mask, self.head = nn.Conv2d(32, 8, 3, padding=1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.body(x)
        pooled = y.mean(dim=(2, 3))
        return {"logits": self.head(pooled), "more": (self.mask(y), pooled), "loss": None}


def with_falling_spectra(model: nn.Module) -> nn.Module:
    """Every second weight gets falling singular values, as training gives; norms get statistics of their own."""
    matrices = [module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    with torch.no_grad():
        for module in matrices[::2]:
            flat = module.weight.flatten(1)
            U, values, Vh = torch.linalg.svd(flat, full_matrices=False)
            values = values[0] * 0.8 ** torch.arange(len(values))
            module.weight.copy_((U * values @ Vh * (flat.norm() / values.norm())).reshape(module.weight.shape))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def leaves(value: Any) -> list[Tensor]:
    """The tensors in an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for item in value or () for leaf in leaves(item)] if isinstance(value, Sequence | None) else []


def outputs_of(model: nn.Module, x: Any) -> list[Tensor]:
    """The outputs in evaluation mode, the mode put back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        outputs = leaves(model(*x) if isinstance(x, tuple) else model(x))
    for module, flag in flags.items():
        module.training = flag
    return outputs


@dataclass(frozen=True)
class Case:
    """A network and the shapes of its inputs; `refused` holds reasons that its plan must give."""

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    refused: tuple[str, ...] = ()
    tokens: int = 0

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return with_falling_spectra(self.build())

    def inputs(self, seed: int, number: int) -> Any:
        """One batch, a tuple where there are several inputs."""
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(self.tokens, (number, *self.shapes[0]), generator=generator)
        batch = tuple(torch.randn(number, *shape, generator=generator) for shape in self.shapes)
        return batch if len(batch) > 1 else batch[0]


CASES = {
    "plain cnn": Case(Plain, ((3, 16, 16),)),
    "densenet": Case(DenseNet, ((3, 12, 12),)),
    "mobilenet": Case(Mobile, ((3, 16, 16),), ("a depthwise convolution",)),
    "u-net": Case(UNet, ((3, 16, 16),)),
    "inception": Case(Inception, ((3, 16, 16),)),
    "conv1d": Case(Wave, ((4, 48),)),
    "transformer": Case(Words, ((9,),), ("its rows are looked up",), tokens=50),
    "two inputs": Case(Pair, ((3, 12, 12), (12,))),
    "many outputs": Case(ManyOutputs, ((3, 12, 12),)),
}


def require_plan(compressed: st.Compressed, refused: Sequence[str]) -> None:
    assert compressed.plan.factored
    assert {layer.form for layer in compressed.plan} <= FORM_NAMES | {"dense"}
    assert all(layer.reason.strip() for layer in compressed.plan)
    for part in refused:
        assert any(part in layer.reason and layer.form == "dense" for layer in compressed.plan)
    assert 0.55 < compressed.measurement.macs_ratio <= 0.6


@pytest.mark.parametrize("reconstruct", [False, True], ids=["as planned", "reconstructed"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_network_goes_all_the_way(case: Case, reconstruct: bool, tmp_path: Path) -> None:
    model, x = case.model().train(), case.inputs(1, 4)
    data = [case.inputs(seed, 16) for seed in (2, 3)]
    next(model.children()).eval()
    before, flags = state(model), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    compressed = st.compress(model, st.Budget(macs=0.6), example_inputs=x, data=data, reconstruct=reconstruct)
    assert same_state(model, before)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    require_plan(compressed, case.refused)
    whole, plan = st.measure(model, x, latency=False), compressed.plan
    assert whole.params - compressed.measurement.params == plan.dense_cost.params - plan.kept_cost.params
    assert whole.macs - compressed.measurement.macs == plan.dense_cost.macs - plan.kept_cost.macs
    dense, small = outputs_of(model, x), outputs_of(compressed.model, x)
    assert [leaf.shape for leaf in small] == [leaf.shape for leaf in dense]
    assert all(leaf.isfinite().all() for leaf in small)
    again = st.load(st.save(compressed.model, tmp_path / "small.safetensors"), case.build())
    assert all(map(torch.equal, outputs_of(again, x), small))
    for merged, leaf in zip(outputs_of(st.merge(compressed.model), x), small, strict=True):
        torch.testing.assert_close(merged, leaf, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_reconstruction_does_no_harm(case: Case) -> None:
    """It is greedy, layer by layer, so the whole may come out a little worse; mostly it is several times better."""
    model, data = case.model().eval(), [case.inputs(seed, 16) for seed in (2, 3)]

    def error(reconstruct: bool) -> float:
        compressed = st.compress(
            model, st.Budget(macs=0.6), example_inputs=case.inputs(1, 4), data=data, reconstruct=reconstruct
        )
        pairs = [pair for x in data for pair in zip(outputs_of(compressed.model, x), outputs_of(model, x), strict=True)]
        return float(
            sum(((small - dense) ** 2).sum() / (dense - dense.mean(dim=0)).square().sum() for small, dense in pairs)
        )

    assert error(True) < error(False) * 1.25


@pytest.mark.parametrize(("name", "exclude"), [("resnet18", "layer4.*"), ("mobilenet_v2", ())])
def test_networks_of_torchvision(name: str, exclude: str | tuple[str, ...]) -> None:
    """Without the widest stage of ResNet-18, whose decompositions take most of the time."""
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model, x = models.get_model(name, weights=None, num_classes=10).train(), torch.randn(2, 3, 64, 64)
    before = state(model)
    compressed = st.compress(model, st.Budget(macs=0.6), example_inputs=x, forms=["channel"], exclude=exclude)
    require_plan(compressed, ["a depthwise convolution"] if name == "mobilenet_v2" else [])
    assert same_state(model, before)
    assert compressed.model.training
    (small,) = outputs_of(compressed.model, x)
    assert small.shape == (2, 10)
    assert small.isfinite().all()
