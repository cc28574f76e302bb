"""Networks and data that many tests share."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.core.execution import as_inputs
from spectrim.layers.factored import FactoredLayer
from spectrim.layers.forms import form_named, forms_of
from spectrim.layers.selection import LayerSelection
from spectrim.layers.tracing import Trace, trace
from spectrim.layers.types import layer_type_of
from spectrim.layers.units import SingleWeight, find_units


class Double(nn.Module):
    """Calls one layer twice, and adds a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.again = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        y = torch.relu(self.again(y))
        return self.last(torch.relu(self.again(y)) + y)


class Tied(nn.Module):
    """Two layers of one weight with biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


class SharedModule(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.other = self.one
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.other(torch.relu(self.one(x)))))


class WordModel(nn.Module):
    """An embedding tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(self.embed(tokens))))


def small_mlp(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """12-16-16-4, seeded."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16, bias=bias),
        nn.ReLU(),
        nn.Linear(16, 16, bias=bias),
        nn.ReLU(),
        nn.Linear(16, 4, bias=bias),
    ).to(dtype)


def small_cnn(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Five convolutions of three kinds and a linear layer on (n, 3, 12, 12), seeded."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(24, 24, (1, 3), groups=2, bias=bias),
        nn.ReLU(),
        nn.ConvTranspose2d(24, 16, 4, stride=2, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1, bias=bias),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10, bias=bias),
    ).to(dtype)


class Residual(nn.Module):
    """Two residual blocks with batch norm on (n, 3, 10, 10), seeded, with statistics of random data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.one = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm_one = nn.BatchNorm2d(12)
        self.two = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.norm_two = nn.BatchNorm2d(12)
        self.three = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)
        self.train()
        with torch.no_grad():
            self(inputs(64, 3, 10, 10, dtype=torch.float32))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(y + self.norm_two(self.two(torch.relu(self.norm_one(self.one(y))))))
        y = torch.relu(y + self.three(y))
        return self.head(y.mean(dim=(2, 3)))


def inputs(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers with correlated, shifted features."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(shape[-1], shape[-1], generator=generator, dtype=torch.float64)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) @ mix + torch.arange(shape[-1]) / shape[-1]
    return x.to(dtype)


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether every tensor is bit-identical."""
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def batches(x: Tensor, *, size: int = 16) -> Iterator[Tensor]:
    """`x` in batches, once."""
    yield from x.split(size)


def unit_of(layer: nn.Module, x: Tensor | None = None) -> SingleWeight:
    """A layer's weight as a unit; with the positions of one pass over `x`, if given."""
    model = nn.Sequential(layer)
    seen = Trace({}, {"0": 1}) if x is None else trace(model, as_inputs(x))
    (unit,) = find_units(model, seen, LayerSelection())
    assert isinstance(unit, SingleWeight)
    return unit


def form_names(layer: nn.Module) -> tuple[str, ...]:
    """The forms that a layer can take."""
    return tuple(form.name for form in forms_of(unit_of(layer)))


def full_ranks(layer: nn.Module, form: str) -> tuple[int, ...]:
    """Its largest ranks in a form."""
    return form_named(form).full_ranks(unit_of(layer))


def build(layer: nn.Module, *, form: str, ranks: tuple[int, ...], bias: bool) -> FactoredLayer:
    """An unset replacement."""
    return form_named(form).build(layer, layer_type=layer_type_of(layer), ranks=ranks, bias=bias)


IMAGE_FORMS = form_names(nn.Conv2d(4, 4, 3))
"""The forms of an ordinary convolution of images."""


def taken_at_their_word(calibration: st.Calibration) -> st.Calibration:
    """The statistics as if the samples were all there are: nothing of them is exchanged for the plain metric."""
    moments = {
        name: replace(seen, shrinkage=0.0, output_grad_shrinkage=0.0) for name, seen in calibration.moments.items()
    }
    return replace(calibration, moments=moments)


def files(folder: Path) -> dict[str, bytes | None]:
    """What lies in a folder, by path."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
