"""The layers that take a dense layer's place: ordinary modules made of ordinary modules."""

from typing import Any, Generic, Self, TypeVar, cast, final

from torch import Tensor, nn

from spectrim.errors import ModelError

_Conv = TypeVar("_Conv", nn.Conv1d, nn.Conv2d)


@final
class LowRankLinear(nn.Module):
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
        if down.out_features != up.in_features or "bias" in dict(down.named_parameters()):
            raise ModelError(
                f"down ({down}) must have no bias and as many outputs as up ({up}) has inputs; "
                "build them as nn.Linear(in, rank, bias=False) and nn.Linear(rank, out)"
            )
        self.down = down
        self.up = up

    @classmethod
    def empty_like(cls, layer: nn.Linear, *, rank: int, bias: bool) -> "LowRankLinear":
        """Unset factors with the device, type, training and gradient flags of `layer`. Draws no random numbers."""
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
    def weight(self) -> Tensor:
        """The product (out, in), made anew at each access, for code that looks at a linear layer's weight."""
        return self.up.weight @ self.down.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply both factors: (..., in_features) -> (..., out_features)."""
        y: Tensor = self.up(self.down(x))
        return y

    def empty_dense(self) -> nn.Linear:
        """An unset `nn.Linear` of the same sizes, without storage."""
        bias = self.bias is not None
        return nn.Linear(self.in_features, self.out_features, bias=bias, device="meta", dtype=self.up.weight.dtype)

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` shows them, and the rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class _LowRankConv(nn.Module, Generic[_Conv]):
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
    up: _Conv

    def __init__(self, down: _Conv, up: _Conv) -> None:
        super().__init__()
        if down.out_channels != up.in_channels or down.groups != up.groups or "bias" in dict(down.named_parameters()):
            raise ModelError(
                f"down ({down}) must have no bias, the groups of up ({up}) and as many outputs as it has inputs"
            )
        if set(up.kernel_size) != {1} or set(up.stride) != {1}:
            raise ModelError(f"up ({up}) must have a kernel and a stride of 1")
        self.down = down
        self.up = up

    @classmethod
    def empty_like(cls, layer: _Conv, *, rank: int, bias: bool) -> Self:
        """Unset factors with all options of `layer`, its device, type and flags. Draws no random numbers."""
        inner, kind, options = rank * layer.groups, type(layer), _options(layer)
        plain: dict[str, Any] = {"groups": layer.groups, "device": "meta", "dtype": layer.weight.dtype}
        down = kind(layer.in_channels, inner, bias=False, **options, **plain)
        up = kind(inner, layer.out_channels, 1, bias=bias, **plain)
        return _placed(cls(down, up), like=layer)

    @property
    def rank(self) -> int:
        """Number of singular values kept in each group."""
        return self.down.out_channels // self.down.groups

    @property
    def weight(self) -> Tensor:
        """The product (out, in / groups, kernel..), made anew at each access."""
        groups = self.down.groups
        down = self.down.weight.reshape(groups, self.rank, -1)
        up = self.up.weight.reshape(groups, -1, self.rank)
        return (up @ down).reshape(self.up.out_channels, *self.down.weight.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply both factors."""
        y: Tensor = self.up(self.down(x))
        return y

    def empty_dense(self) -> _Conv:
        """An unset convolution with the same options, without storage."""
        plain: dict[str, Any] = {"groups": self.down.groups, "device": "meta", "dtype": self.up.weight.dtype}
        into, out = self.down.in_channels, self.up.out_channels
        return type(self.down)(into, out, bias=self.bias is not None, **_options(self.down), **plain)

    def extra_repr(self) -> str:
        """The rank."""
        return f"rank={self.rank}"


@final
class LowRankConv1d(_LowRankConv[nn.Conv1d]):
    """An `nn.Conv1d` in the channel form: `down` has its kernel, `up` a kernel of 1 and the bias."""


@final
class LowRankConv2d(_LowRankConv[nn.Conv2d]):
    """An `nn.Conv2d` in the channel form: `down` has its kernel, `up` a kernel of 1 and the bias."""


LowRankLayer = LowRankLinear | LowRankConv1d | LowRankConv2d


def _options(layer: nn.Conv1d | nn.Conv2d) -> dict[str, Any]:
    """What a convolution does besides its sizes."""
    return {
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "padding_mode": layer.padding_mode,
    }


_Made = TypeVar("_Made", bound=nn.Module)


def _placed(made: _Made, *, like: nn.Module) -> _Made:
    """`made` with storage on the device of `like`, and its training and gradient flags."""
    weight = like.get_parameter("weight")
    if not weight.is_meta:
        made.to_empty(device=weight.device)
    return made.train(like.training).requires_grad_(weight.requires_grad)


def is_low_rank(module: nn.Module) -> bool:
    """Whether `module` is one of the factored layers."""
    return isinstance(module, LowRankLinear | _LowRankConv)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """Every factored layer of `model` by its first name."""
    return {name: cast(LowRankLayer, module) for name, module in model.named_modules() if is_low_rank(module)}
