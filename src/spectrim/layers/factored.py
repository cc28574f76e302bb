"""The layers that take a dense layer's place: ordinary modules made of ordinary modules."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Generic, Self, TypeVar, cast, final

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.core.plans import FormName

_Whole = TypeVar("_Whole", nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


class _LowRank(nn.Module, Generic[_Whole], ABC):
    """A chain of layers whose product is one layer's weight; only the last one has a bias."""

    @property
    @abstractmethod
    def form(self) -> FormName:
        """The form's name."""

    @property
    def chain(self) -> tuple[nn.Module, ...]:
        """The layers in the order in which they are applied."""
        return tuple(self.children())

    @property
    def ranks(self) -> tuple[int, ...]:
        """Singular values kept (in each group): (rank,), or (rank_in, rank) in the tucker2 form."""
        return (self.rank,)

    @property
    @abstractmethod
    def rank(self) -> int:
        """Singular values kept, in each group of a grouped convolution."""

    @property
    def groups(self) -> int:
        """Groups of the convolution; 1 for a linear layer."""
        return int(getattr(self.chain[-1], "groups", 1))

    @property
    def weight(self) -> Tensor:
        """The product, shaped as the dense layer's weight, made anew at each access."""
        return self.product([cast(Tensor, part.weight) for part in self.chain])

    @abstractmethod
    def product(self, weights: Sequence[Tensor]) -> Tensor:
        """The dense weight that these weights of the chain (of any number type) stand for."""

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return cast(Tensor | None, self.chain[-1].bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that dense layers give it
        """Apply the chain; shapes are those of the dense layer."""
        x = input
        for part in self.chain:
            x = part(x)
        return x

    @abstractmethod
    def empty_dense(self) -> _Whole:
        """An unset dense layer with the same sizes and options, without storage."""


@final
class LowRankLinear(_LowRank[nn.Linear]):
    """A linear layer as the product of two thin ones: y = up(down(x)).

    Attributes:
        down: `nn.Linear(in_features, rank, bias=False)`.
        up: `nn.Linear(rank, out_features)`, with the bias, if any.

    Shapes:
        input (..., in_features), output (..., out_features), as for `nn.Linear`.

    Raises:
        ModelError: the two layers do not fit together, or `down` has a bias.
    """

    down: nn.Linear
    up: nn.Linear

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        if down.out_features != up.in_features or _has_bias(down):
            raise ModelError(
                f"down ({down}) must have no bias and as many outputs as up ({up}) has inputs; "
                "build them as nn.Linear(in, rank, bias=False) and nn.Linear(rank, out)"
            )
        self.down = down
        self.up = up

    @classmethod
    def empty_like(cls, layer: nn.Linear, *, ranks: Sequence[int], bias: bool) -> "LowRankLinear":
        """Unset factors with the device, type, training and gradient flags of `layer`. Draws no random numbers."""
        (rank,) = ranks
        down = nn.Linear(layer.in_features, rank, bias=False, device="meta", dtype=layer.weight.dtype)
        up = nn.Linear(rank, layer.out_features, bias=bias, device="meta", dtype=layer.weight.dtype)
        return _placed(cls(down, up), like=layer)

    @property
    def in_features(self) -> int:
        """Size of the last input dimension."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Size of the last output dimension."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """Number of singular values kept."""
        return self.down.out_features

    @property
    def form(self) -> FormName:
        """`linear`."""
        return "linear"

    def product(self, weights: Sequence[Tensor]) -> Tensor:
        """(out, in)."""
        down, up = weights
        return up @ down

    def empty_dense(self) -> nn.Linear:
        """An unset `nn.Linear` of the same sizes, without storage."""
        bias = self.bias is not None
        return nn.Linear(self.in_features, self.out_features, bias=bias, device="meta", dtype=self.up.weight.dtype)

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` shows them, and the rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class _LowRankConv(_LowRank[_Whole]):
    """A chain of convolutions; the last one makes the output's channels and has the bias, if any."""

    def __init__(self, *chain: nn.Module) -> None:
        super().__init__()
        for first, second in pairwise(chain):
            if first.out_channels != second.in_channels or first.groups != second.groups or _has_bias(first):
                raise ModelError(
                    f"{first} must have no bias, the groups of {second}, and as many outputs as that has inputs"
                )

    @property
    def rank(self) -> int:
        """Channels that the last convolution starts from, in each group."""
        last = self.chain[-1]
        return int(cast(int, last.in_channels)) // self.groups

    def extra_repr(self) -> str:
        """The ranks."""
        return f"rank={self.rank}" if len(self.ranks) == 1 else f"rank_in={self.ranks[0]}, rank={self.rank}"


_Conv = TypeVar("_Conv", nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


class _Channel(_LowRankConv[_Conv]):
    """A convolution in the channel form: the same kernel into fewer channels, then a 1-wide convolution out of them.

    Attributes:
        down: in -> rank a group, with the kernel, stride, padding, padding mode, dilation and groups; no bias.
        up: rank -> out, a kernel of 1, the same groups, with the bias, if any.

    Shapes:
        as for the convolution it stands for.

    Raises:
        ModelError: the two layers do not fit together, or `down` has a bias.
    """

    down: _Conv
    up: nn.Conv1d | nn.Conv2d
    _up: ClassVar[type[nn.Conv1d] | type[nn.Conv2d]] = nn.Conv2d

    @classmethod
    def empty_like(cls, layer: _Conv, *, ranks: Sequence[int], bias: bool) -> Self:
        """Unset factors with all options of `layer`, its device, type and flags. Draws no random numbers."""
        inner = ranks[0] * layer.groups
        down = _conv_like(layer, layer.in_channels, inner, bias=False)
        up = cls._up(inner, layer.out_channels, 1, bias=bias, **_meta(layer))
        return _placed(cls(down, up), like=layer)

    def __init__(self, down: _Conv, up: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(down, up)
        if set(up.kernel_size) != {1} or set(up.stride) != {1}:
            raise ModelError(f"up ({up}) must have a kernel and a stride of 1")
        self.down = down
        self.up = up

    @property
    def form(self) -> FormName:
        """`channel`, or `linear` where an ordinary convolution's kernel is 1 wide."""
        wide = set(self.down.kernel_size) != {1} or isinstance(self.down, nn.ConvTranspose2d)
        return "channel" if wide else "linear"

    def product(self, weights: Sequence[Tensor]) -> Tensor:
        """(out, in / groups, *kernel), or (in, out / groups, *kernel) for a transposed convolution."""
        groups, rank = self.groups, self.rank
        down, up = weights[0], weights[1].reshape(groups, -1, rank)
        if isinstance(self.down, nn.ConvTranspose2d):
            into = down.reshape(groups, -1, rank, *down.shape[2:])
            return torch.einsum("gor,girhw->giohw", up, into).flatten(0, 1)
        return (up @ down.reshape(groups, rank, -1)).reshape(self.up.out_channels, *down.shape[1:])

    def empty_dense(self) -> _Conv:
        """An unset convolution with the same options, without storage."""
        return _conv_like(self.down, self.down.in_channels, self.up.out_channels, bias=self.bias is not None)


@final
class LowRankConv1d(_Channel[nn.Conv1d]):
    """An `nn.Conv1d` in the channel form: `down` has its kernel, `up` a kernel of 1 and the bias."""

    _up = nn.Conv1d


@final
class LowRankConv2d(_Channel[nn.Conv2d]):
    """An `nn.Conv2d` in the channel form: `down` has its kernel, `up` a kernel of 1 and the bias."""


@final
class LowRankConvTranspose2d(_Channel[nn.ConvTranspose2d]):
    """An `nn.ConvTranspose2d` in the channel form: `down` is transposed and has its kernel, `up` a kernel of 1."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """Apply both factors; `output_size` as for `nn.ConvTranspose2d`."""
        y: Tensor = self.up(self.down(input, output_size))
        return y


@final
class SpatialConv2d(_LowRankConv[nn.Conv2d]):
    """An `nn.Conv2d` in the spatial form: a column of the kernel, then a row (Jaderberg 2014).

    Attributes:
        down: in -> rank a group, kernel (height, 1), with the vertical stride, padding and dilation; no bias.
        up: rank -> out, kernel (1, width), with the horizontal ones, and the bias, if any.

    Raises:
        ModelError: the two layers do not fit together, or `down` has a bias.
    """

    down: nn.Conv2d
    up: nn.Conv2d

    def __init__(self, down: nn.Conv2d, up: nn.Conv2d) -> None:
        super().__init__(down, up)
        if down.kernel_size[1] != 1 or up.kernel_size[0] != 1 or down.stride[1] != 1 or up.stride[0] != 1:
            raise ModelError(f"down ({down}) must be a column, and up ({up}) a row, each with its own stride only")
        self.down = down
        self.up = up

    @classmethod
    def empty_like(cls, layer: nn.Conv2d, *, ranks: Sequence[int], bias: bool) -> "SpatialConv2d":
        """Unset factors with all options of `layer`, its device, type and flags. Draws no random numbers."""
        inner, (column, row) = ranks[0] * layer.groups, _by_axis(layer)
        down = nn.Conv2d(layer.in_channels, inner, bias=False, **column, **_meta(layer))
        up = nn.Conv2d(inner, layer.out_channels, bias=bias, **row, **_meta(layer))
        return _placed(cls(down, up), like=layer)

    @property
    def form(self) -> FormName:
        """`spatial`."""
        return "spatial"

    def product(self, weights: Sequence[Tensor]) -> Tensor:
        """(out, in / groups, height, width)."""
        groups, rank = self.groups, self.rank
        column = weights[0].reshape(groups, rank, -1, self.down.kernel_size[0])
        row = weights[1].reshape(groups, -1, rank, self.up.kernel_size[1])
        return torch.einsum("grih,gorw->goihw", column, row).flatten(0, 1)

    def empty_dense(self) -> nn.Conv2d:
        """An unset convolution with the same options, without storage."""
        down, up = self.down, self.up
        options: dict[str, Any] = {
            key: (getattr(down, key)[0], getattr(up, key)[1]) for key in ("kernel_size", "stride", "dilation")
        }
        padding = down.padding if isinstance(down.padding, str) else (down.padding[0], int(up.padding[1]))
        return nn.Conv2d(
            down.in_channels,
            up.out_channels,
            bias=self.bias is not None,
            padding=padding,
            padding_mode=down.padding_mode,
            **options,
            **_meta(down),
        )


@final
class Tucker2Conv2d(_LowRankConv[nn.Conv2d]):
    """An `nn.Conv2d` in the tucker2 form: fewer channels, the kernel between few channels, then out (Kim 2016).

    Attributes:
        down: in -> rank_in a group, a kernel of 1; no bias.
        core: rank_in -> rank a group, with the kernel, stride, padding, padding mode and dilation; no bias.
        up: rank -> out, a kernel of 1, with the bias, if any.

    Raises:
        ModelError: the layers do not fit together, or one but the last has a bias.
    """

    down: nn.Conv2d
    core: nn.Conv2d
    up: nn.Conv2d

    def __init__(self, down: nn.Conv2d, core: nn.Conv2d, up: nn.Conv2d) -> None:
        super().__init__(down, core, up)
        if {*down.kernel_size, *up.kernel_size, *down.stride, *up.stride} != {1}:
            raise ModelError(f"down ({down}) and up ({up}) must have a kernel and a stride of 1")
        self.down = down
        self.core = core
        self.up = up

    @classmethod
    def empty_like(cls, layer: nn.Conv2d, *, ranks: Sequence[int], bias: bool) -> "Tucker2Conv2d":
        """Unset factors with all options of `layer`, its device, type and flags. Draws no random numbers."""
        first, second = (rank * layer.groups for rank in ranks)
        down = nn.Conv2d(layer.in_channels, first, 1, bias=False, **_meta(layer))
        core = _conv_like(layer, first, second, bias=False)
        up = nn.Conv2d(second, layer.out_channels, 1, bias=bias, **_meta(layer))
        return _placed(cls(down, core, up), like=layer)

    @property
    def ranks(self) -> tuple[int, ...]:
        """(rank_in, rank): channels into and out of the core, in each group."""
        return self.core.in_channels // self.groups, self.rank

    @property
    def form(self) -> FormName:
        """`tucker2`."""
        return "tucker2"

    def product(self, weights: Sequence[Tensor]) -> Tensor:
        """(out, in / groups, height, width)."""
        groups, (first, second) = self.groups, self.ranks
        down = weights[0].reshape(groups, first, -1)
        core = weights[1].reshape(groups, second, first, *self.core.kernel_size)
        up = weights[2].reshape(groups, -1, second)
        return torch.einsum("gos,gsrhw,gri->goihw", up, core, down).flatten(0, 1)

    def empty_dense(self) -> nn.Conv2d:
        """An unset convolution with the same options, without storage."""
        return _conv_like(self.core, self.down.in_channels, self.up.out_channels, bias=self.bias is not None)


LowRankLayer = LowRankLinear | LowRankConv1d | LowRankConv2d | LowRankConvTranspose2d | SpatialConv2d | Tucker2Conv2d


def _has_bias(layer: nn.Module) -> bool:
    return layer._parameters.get("bias") is not None


def _meta(layer: nn.Module) -> dict[str, Any]:
    """What the parts of a factored convolution share; they get their storage all at once."""
    weight = cast(Tensor, layer.weight)
    return {"groups": layer.groups, "device": "meta", "dtype": weight.dtype}


def _conv_like(layer: _Conv, into: int, out: int, *, bias: bool) -> _Conv:
    """An unset convolution of the same type and options with other sizes."""
    options: dict[str, Any] = {
        key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    }
    if isinstance(layer, nn.ConvTranspose2d):
        options["output_padding"] = layer.output_padding
    return type(layer)(into, out, bias=bias, **options, **_meta(layer))


def _by_axis(layer: nn.Conv2d) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the column and of the row that together do what `layer` does. Every padding acts axis by axis."""
    column: dict[str, Any] = {"padding_mode": layer.padding_mode}
    row = dict(column)
    for key, neutral in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
        option = getattr(layer, key)
        if isinstance(option, str):
            column[key] = row[key] = option
        else:
            column[key], row[key] = (option[0], neutral), (neutral, option[1])
    return column, row


_Made = TypeVar("_Made", bound=nn.Module)


def _placed(made: _Made, *, like: nn.Module) -> _Made:
    """`made` with storage on the device of `like`, and its training and gradient flags."""
    weight = like.get_parameter("weight")
    if not weight.is_meta:
        made.to_empty(device=weight.device)
    return made.train(like.training).requires_grad_(weight.requires_grad)


def is_low_rank(module: nn.Module) -> bool:
    """Whether `module` is one of the factored layers."""
    return isinstance(module, _LowRank)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """Every factored layer of `model` by its first name."""
    return {name: cast(LowRankLayer, module) for name, module in model.named_modules() if is_low_rank(module)}
