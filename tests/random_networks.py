"""Random small networks as users write them: what a module may do besides multiplying, in any order.

A `Network` is a value: its `repr` makes it again, and `build` gives the module, the same one each time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as draw
from torch import Tensor, nn
from torch.nn import functional

LENGTH = 6
"""Positions along each axis of a sequence or an image."""

Make = Callable[..., nn.Module]
"""Gives a layer from its numbers of inputs and outputs."""


class Block(nn.Module):
    """Features in, features out; with `skips`, those of the blocks before, where `takes_skips`."""

    takes_skips = False
    keeps_width = False
    """Whether it gives as many features as it takes."""
    is_affine = True
    """Whether its layers may be convolutions."""

    def __init__(self, make: Make, into: int, out: int) -> None:
        super().__init__()
        self.dim = 1
        self.set_up(make, into, out)

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc = make(into, out)


class Plain(Block):
    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.fc(x))


class Inplace(Block):
    """ReLU in place on the layer's output."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu_()


class Normed(Block):
    def set_up(self, make: Make, into: int, out: int) -> None:
        self.layers = nn.Sequential(make(into, out), BatchNorm(out), nn.ReLU(inplace=True), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class LayerNormed(Block):
    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc, self.norm = make(into, out), nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.fc(x)).transpose(self.dim, -1)).transpose(self.dim, -1)


class Residual(Block):
    keeps_width = True

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.body = nn.Sequential(make(into, 2 * out), nn.ReLU(), make(2 * out, out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class ResidualInplace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y += x
        return y.relu_()


class Concatenated(Block):
    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc, self.join = make(into, out), make(into + out, out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.join(torch.cat([x, torch.relu(self.fc(x))], dim=self.dim)))


class Gated(Block):
    """Two branches, multiplied."""

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc, self.gate = make(into, out), make(into, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * torch.sigmoid(self.gate(x))


class Twice(Block):
    """One layer called twice."""

    keeps_width = True

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fc(x)))


class Tied(Block):
    """Two layers of one weight."""

    keeps_width = True

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc, self.other = make(into, out), make(into, out)
        self.other.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.relu(self.fc(x)))


class TwoNames(Block):
    """One layer under two names, and in a python list besides."""

    keeps_width = True

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc = make(into, out)
        self.same = self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.same(torch.relu(self.fc(x)))


class InList(Block):
    """Runs its layer from a python list."""

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc = make(into, out)
        self.others = [self.fc]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.others:
            x = torch.relu(layer(x))
        return x


class WritesInput(Block):
    """Overwrites what it was given, after use."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        x.mul_(0.5)
        return torch.relu(y)


class ClipsInput(Block):
    """Overwrites what it was given, before use."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.clamp_(min=-1.0))


class WritesSkip(Block):
    """Overwrites the output of the block before."""

    takes_skips = True

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        y = torch.relu(self.fc(x))
        skips[-1].add_(1.0)
        return y


class AddsSkip(Block):
    """Adds the first output that fits."""

    takes_skips = True

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        y = self.fc(x)
        return torch.relu(y + next((skip for skip in skips if skip.shape == y.shape), 0.0))


class AppendsSkip(Block):
    """Leaves a tensor to those after, which is no output of its own."""

    takes_skips = True

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        y = torch.relu(self.fc(x))
        skips.insert(0, y * 2)
        return y


class KeepsFeatures(Block):
    """An attribute kept on self, which the network's output has."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.fc(x)
        return torch.relu(self.features)


class Remembers(Block):
    """A list that grows, of which nothing is read."""

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc = make(into, out)
        self.history: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.fc(x))
        if not torch.compiler.is_compiling():
            self.history.append(len(self.history))
        return y


class CountsCalls(Block):
    """Buffers are written, and one of them is read."""

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc = make(into, out)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.fc(x))
        self.calls += 1
        self.mean.copy_(y.detach().mean())
        return y - self.mean


class ReadsSizes(Block):
    """What a layer says of itself."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.fc is not None
        size = getattr(self.fc, "in_features", None) or self.fc.in_channels
        y = self.fc(x) * size**-0.5
        return torch.relu(y) if getattr(self.fc, "groups", 1) == 1 and self.fc.bias is not None else y


class ReadsDtype(Block):
    """Reads of the weight what costs nothing."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        return torch.relu(self.fc(x.to(weight.dtype).to(weight.device)) / weight.shape[0] ** 0.5)


class AsksClass(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.fc(x))
        return 2 * y if isinstance(self.fc, nn.Linear | nn.Conv1d | nn.Conv2d) else y


class AsksType(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) if type(self.fc) in (nn.Linear, nn.Conv1d, nn.Conv2d) else -self.fc(x)


class Transposed(Block):
    """Goes back by the transposed weight (a tied autoencoder)."""

    is_affine = False
    keeps_width = True

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc = make(into, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) @ self.fc.weight.T.T


class Functional(Block):
    """Multiplies by a layer's weight without calling it."""

    is_affine = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(functional.linear(x, self.fc.weight, self.fc.bias))


class FunctionalBesides(Block):
    """Calls a layer and multiplies by its weight as well."""

    is_affine = False

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) + functional.linear(x, self.fc.weight)


class Regularised(Block):
    """Gives a penalty of the weight to the network's outputs."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.fc.weight.abs().sum()
        return torch.relu(self.fc(x))


class WritesWeight(Block):
    """Clamps its weight in every pass, as a spectral or unitary layer does."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc.weight.clamp_(-0.3, 0.3)
        return torch.relu(self.fc(x))


class Branches(Block):
    """Which layer runs depends on the data."""

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc, self.other = make(into, out), make(into, out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) if float(x.detach().sum()) > 0 else self.other(x)


class Views(Block):
    """Views and transposes around the layer; what comes out is not contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.flip(0)).flip(0)
        return torch.relu(y).transpose(0, -1).contiguous().transpose(0, -1)


class ByKeyword(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(input=x))


class Detached(Block):
    """No gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x.detach()))


class NoGrad(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.relu(self.fc(x))


class Frozen(Block):
    """Parameters that are not trained."""

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc = make(into, out).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class Nested(Block):
    """A container in a container, whose inner one is called past the outer one."""

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.layers = nn.ModuleDict(
            {"a": nn.Sequential(make(into, out), nn.ReLU()), "b": nn.Sequential(make(out, out))}
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers["a"](x)
        return self.layers["b"][0](y) + self.layers["b"](y)


class Unused(Block):
    """A layer that is never called."""

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc, self.spare = make(into, out), make(into, out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class ReturnsItsInput(Block):
    """Gives its input back, changed in place."""

    keeps_width = True

    def forward(self, x: Tensor) -> Tensor:
        x += torch.tanh(self.fc(x))
        return x


class CallsForward(Block):
    """Runs its layer past its hooks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc.forward(x))


class CallsClass(Block):
    """Runs the function of the layer's class."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(type(self.fc).forward(self.fc, x))


class CallsWithParameters(Block):
    """A functional call, as ensembles and meta-learning do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.func.functional_call(self.fc, dict(self.fc.named_parameters()), (x,)))


class CountsLayers(Block):
    """Looks for layers of a class at run time."""

    def forward(self, x: Tensor) -> Tensor:
        number = sum(isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) for module in self.modules())
        return torch.relu(self.fc(x)) / (1 + number)


class CountsParameters(Block):
    """Looks at how many parameters it has."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) / len(list(self.parameters()))


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: torch.relu(self.fc(x)), x, use_reentrant=False)


class WeightNormed(Block):
    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc = nn.utils.parametrizations.weight_norm(make(into, out))
        self.other = make(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.relu(self.fc(x)))


class OwnLinear(nn.Linear):
    """A subclass with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias) * 2


class Subclassed(Block):
    is_affine = False

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc, self.other = OwnLinear(into, out), make(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.relu(self.fc(x)))


class Sliced(Block):
    """A supernet: calls its layer for some inputs, and uses a part of its weight for others."""

    is_affine = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        half = functional.linear(x[..., :4], self.fc.weight[:, :4])
        return torch.relu(y + half)


class Attention(Block):
    """Self-attention among the samples."""

    is_affine = False
    keeps_width = True

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.attention, self.fc = nn.MultiheadAttention(into, 4, batch_first=True), make(into, out)

    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.ndim == 3 else x.unsqueeze(1)
        y, _ = self.attention(rows, rows, rows, need_weights=False)
        return torch.relu(self.fc(x + y.reshape(x.shape)))


class Encoder(Block):
    """Torch's own encoder layer, which has a fused path."""

    is_affine = False
    keeps_width = True

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.layer = nn.TransformerEncoderLayer(into, 4, 2 * into, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if x.ndim == 3 else x.unsqueeze(1)).reshape(x.shape)


class Recurrent(Block):
    is_affine = False

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc, self.cell = make(into, out), nn.LSTM(out, out, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.cell(y if y.ndim == 3 else y.unsqueeze(1))[0].reshape(y.shape)


class Stored(Block):
    """A hook on a container keeps its output for later, as U-Nets on foreign backbones do."""

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.body, self.after = nn.Sequential(make(into, out), nn.ReLU()), nn.Sequential(make(out, out), nn.ReLU())
        self.body.register_forward_hook(storing)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(x)) + self.body.stored


class Rewired(Block):
    """Holds a function that was bound to the layer."""

    def set_up(self, make: Make, into: int, out: int) -> None:
        self.fc = make(into, out)

    def forward(self, x: Tensor) -> Tensor:
        run = getattr(self, "run", None) or self.fc
        self.__dict__["run"] = self.fc
        return torch.relu(run(x))


class Spread(Block):
    """One layer on several tensors of other sizes (a feature pyramid's head)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x)) + self.fc(x[:1] / 2) + self.fc(x.mean(dim=0, keepdim=True))


class Iterated(Block):
    """How often its layer runs depends on the data (a fixed point)."""

    keeps_width = True

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            change = torch.tanh(self.fc(x)) / 4
            x = x + change
            if float(change.detach().abs().mean()) < 0.1:
                break
        return x


class Masked(Block):
    """Runs its layer on the rows that the data choose (a mixture of experts); maybe on none."""

    is_affine = False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        chosen = rows[:, 0] > 0
        y = rows.new_zeros(len(rows), self.fc.out_features)
        y[chosen] = torch.relu(self.fc(rows[chosen]))
        return y.reshape(*x.shape[:-1], -1)


class BatchNorm(nn.Module):
    """Batch norm of the features, wherever they are."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)
        self.dim = 1

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(self.dim, -1)
        return self.norm(y.reshape(-1, y.shape[-1])).reshape(y.shape).transpose(self.dim, -1)


BLOCKS: dict[str, type[Block]] = {
    block.__name__: block for block in list(globals().values()) if isinstance(block, type) and issubclass(block, Block)
}
del BLOCKS["Block"]

WEIGHT_READERS = ("ReadsDtype", "Transposed", "FunctionalBesides", "Regularised", "WritesWeight", "Sliced")
"""Blocks that use a weight outside of its layer's call."""

KNOWN = frozenset({"CountsParameters"})  # nothing tells that a forward pass looks at how many there are
"""Blocks, hooks and outputs that are known to fail, and are not drawn."""


def storing(module: nn.Module, _: Any, output: Tensor) -> None:
    """Keeps the output on the module."""
    module.__dict__["stored"] = output


def observing(module: nn.Module, args: Any, output: Any) -> None:
    """A user's hook that looks on."""
    module.__dict__["seen"] = output.shape if isinstance(output, Tensor) else None


def doubling(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """A user's hook that changes the output."""
    return output * 2


def shifting(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A user's hook that changes the input."""
    return args[0] + 0.25, *args[1:]


HOOKS = {
    f"{hook.__name__} {place}": (hook, place)
    for hook in (observing, doubling, shifting)
    for place in ("layer", "block", "container", "network")
    if (hook, place) not in ((doubling, "network"),)
}


class Pair(NamedTuple):
    """Outputs by name and place."""

    first: Tensor
    second: Any


@dataclass
class Record:
    """Outputs by name."""

    first: Tensor
    second: Any = None


OUTPUTS: dict[str, Callable[[Tensor, Any], Any]] = {
    "tensor": lambda y, _: y,
    "tuple": lambda y, more: (y, more),
    "list": lambda y, more: [y, *more],
    "dict": lambda y, more: {"logits": y, "features": more},
    "named tuple": Pair,
    "dataclass": Record,
    "nested": lambda y, more: {"head": (y, {"more": more}), "none": None},
}


def layers_of(kind: str) -> dict[str, Make]:
    """Layers by name that a network of this kind may have."""
    if kind == "vector" or kind == "tokens":
        return {"linear": nn.Linear}
    conv = nn.Conv1d if kind == "sequence" else nn.Conv2d
    layers: dict[str, Make] = {
        "conv": lambda into, out: conv(into, out, 3, padding=1),
        "no bias": lambda into, out: conv(into, out, 3, padding="same", bias=False),
        "pointwise": lambda into, out: conv(into, out, 1),
        "grouped": lambda into, out: conv(into, out, 3, padding=1, groups=4),
        "dilated": lambda into, out: conv(into, out, 3, padding=2, dilation=2, padding_mode="circular"),
        "depthwise": lambda into, out: nn.Sequential(conv(into, into, 3, padding=1, groups=into), conv(into, out, 1)),
    }
    if kind == "image":
        layers["transposed"] = lambda into, out: nn.ConvTranspose2d(into, out, 3, padding=1)
    return layers


@dataclass(frozen=True)
class Step:
    """One block: its name, its layer's name, and how many features it gives if it may choose."""

    block: str
    layer: str
    width: int


@dataclass(frozen=True)
class Network:
    """What a network is built from.

    Attributes:
        kind: Inputs (n, features): `vector`; (n, positions, features): `tokens`; (n, channels, positions): `sequence`;
            (n, channels, height, width): `image`.
        steps: Its blocks.
        output: The structure of its outputs.
        hooks: The users' hooks, by name; each is on the first block, its first layer, or the whole.
        layout: Of the inputs: `contiguous`, `transposed` or `strided`.
        low_rank: Whether the weights are nearly of low rank.
        double: float64 or float32.
        seed: Of the weights.
    """

    kind: str
    steps: tuple[Step, ...]
    output: str = "tensor"
    hooks: tuple[str, ...] = ()
    layout: str = "contiguous"
    low_rank: bool = False
    double: bool = True
    seed: int = 0

    def build(self) -> "RandomNetwork":
        """The module, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = RandomNetwork(self)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.7 * max(1, parameter[0].numel()) ** -0.5)
                if self.low_rank and parameter.ndim >= 2:
                    _flatten_spectrum(parameter)
        for hook, place in (HOOKS[name] for name in self.hooks):
            module = model.place(place)
            if hook is shifting:
                module.register_forward_pre_hook(hook)
            else:
                module.register_forward_hook(hook)
        return model.to(torch.float64 if self.double else torch.float32).eval()

    def inputs(self, samples: int, *, seed: int = 1) -> Tensor:
        """Inputs with correlated features."""
        generator = torch.Generator().manual_seed(seed)
        axes = {"vector": 0, "tokens": 1, "sequence": 1, "image": 2}[self.kind]
        shape = (samples, *[LENGTH] * axes)
        mix = torch.randn(16, 16, generator=generator) / 4
        x = (torch.randn(*shape, 16, generator=generator) @ mix + 0.1).to(
            torch.float64 if self.double else torch.float32
        )
        if self.kind in ("sequence", "image"):
            x = x.movedim(-1, 1) if self.layout == "transposed" else x.movedim(-1, 1).contiguous()
        elif self.layout == "transposed":
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        return x.repeat_interleave(2, dim=0)[::2] if self.layout == "strided" else x

    def simpler(self) -> Iterator["Network"]:
        """Networks with one thing less."""
        for at in range(len(self.steps)):
            if len(self.steps) > 1:
                yield replace(self, steps=self.steps[:at] + self.steps[at + 1 :])
        for at, step in enumerate(self.steps):
            first = next(iter(layers_of(self.kind)))
            for other in (replace(step, layer=first), replace(step, width=16), replace(step, block="Plain")):
                if other != step:
                    yield replace(self, steps=(*self.steps[:at], other, *self.steps[at + 1 :]))
        for at in range(len(self.hooks)):
            yield replace(self, hooks=self.hooks[:at] + self.hooks[at + 1 :])
        plain = Network(self.kind, self.steps)
        for name in ("output", "layout", "low_rank", "double", "seed"):
            if getattr(self, name) != getattr(plain, name):
                yield replace(self, **{name: getattr(plain, name)})


class RandomNetwork(nn.Module):
    """Blocks one after the other, then a head on their mean over positions."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.output = network.output
        self.dim = -1 if network.kind in ("vector", "tokens") else 1
        layers, width = layers_of(network.kind), 16
        self.blocks = nn.ModuleList()
        for step in network.steps:
            kind = BLOCKS[step.block]
            out = width if kind.keeps_width else step.width
            self.blocks.append(kind(layers[step.layer], width, out))
            width = out
        for module in self.modules():
            if isinstance(module, Block | BatchNorm):
                module.dim = self.dim
        self.head = nn.Sequential(nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Any:
        skips = [x]
        for block in self.blocks:
            x = block(x, skips) if block.takes_skips else block(x)
            skips.append(x)
        more = [block.features for block in self.blocks if isinstance(block, KeepsFeatures | Regularised)]
        positions = [axis for axis in range(1, x.ndim) if axis != self.dim % x.ndim]
        y = self.head(x.mean(dim=positions) if positions else x)
        return OUTPUTS[self.output](y, [x.abs().mean(), *more])

    def place(self, name: str) -> nn.Module:
        """Where a hook of a user goes."""
        if name == "network":
            return self
        if name == "container":
            return self.head
        inner = [module for module in self.blocks[0].modules() if module is not self.blocks[0]]
        layers = [module for module in inner if module._parameters.get("weight") is not None]
        return layers[0] if name == "layer" else self.blocks[0]


def _flatten_spectrum(parameter: nn.Parameter) -> None:
    """Leave three singular values as they are, and nearly nothing of the others."""
    with torch.no_grad():
        left, values, right = torch.linalg.svd(parameter.flatten(1), full_matrices=False)
        values[3:] *= 1e-3
        parameter.copy_((left * values @ right).reshape(parameter.shape))


def _steps(kind: str) -> draw.SearchStrategy[Step]:
    convolutional = kind in ("sequence", "image")
    names = [name for name, block in BLOCKS.items() if name not in KNOWN and (block.is_affine or not convolutional)]
    plain = [name for name in names if name not in ("Tied", "TwoNames", "Twice")]
    layers = list(layers_of(kind))
    simple = [layer for layer in layers if layer != "depthwise"]  # it has two layers, and no attributes of its own
    single = draw.builds(Step, draw.sampled_from(names), draw.sampled_from(simple), draw.sampled_from([8, 16, 24]))
    if "depthwise" not in layers:
        return single
    chained = [name for name in plain if name in ("Plain", "Normed", "Residual", "Gated", "Nested", "AddsSkip")]
    return single | draw.builds(Step, draw.sampled_from(chained), draw.just("depthwise"), draw.sampled_from([16, 24]))


@draw.composite
def networks(choose: draw.DrawFn) -> Network:
    """Any network."""
    kind = choose(draw.sampled_from(["vector", "tokens", "sequence", "image"]))
    hooks = draw.lists(draw.sampled_from([name for name in HOOKS if name not in KNOWN]), max_size=2, unique=True)
    return Network(
        kind,
        tuple(choose(draw.lists(_steps(kind), min_size=1, max_size=4))),
        output=choose(draw.sampled_from([name for name in OUTPUTS if name not in KNOWN])),
        hooks=tuple(choose(draw.just(()) | hooks.map(tuple))),
        layout=choose(draw.sampled_from(["contiguous", "transposed", "strided"])),
        low_rank=choose(draw.booleans()),
        double=choose(draw.booleans()),
        seed=choose(draw.integers(0, 999)),
    )
