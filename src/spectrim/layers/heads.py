"""Linear layers around an attention whose heads hold fewer numbers than its code takes them to have."""

from typing import ClassVar, cast

from torch import Tensor, nn


class AroundHeads(nn.Module):
    """A linear layer of the numbers that heads hold, in the place of one of all their numbers.

    Attributes:
        linear: The layer.
        heads: How many heads there are.
        size: Numbers of a head, as the attention takes it.
        rank: Numbers that it holds.
        narrowed_from: Shape of the weight in whose place it is.
    """

    # torch.jit.script compiles properties
    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "bias"]

    def __init__(self, linear: nn.Module, *, heads: int, size: int, rank: int, narrowed_from: tuple[int, ...]) -> None:
        super().__init__()
        self.linear, self.heads, self.size, self.rank = linear, heads, size, rank
        self.narrowed_from = narrowed_from

    @property
    def weight(self) -> Tensor:
        """That of the layer within: fewer numbers than those of the layer in whose place it is."""
        return cast(Tensor, self.linear.weight)

    @property
    def bias(self) -> Tensor | None:
        """That of the layer within."""
        return cast(Tensor | None, self.linear.bias)

    def extra_repr(self) -> str:
        """How the heads lie."""
        return f"heads={self.heads}, size={self.size}, rank={self.rank}"


class HeadValues(AroundHeads):
    """Gives the values of heads: the numbers of each, and zeros up to the size that the attention expects.

    Shapes:
        input (..., in), output (..., heads * size); `linear` gives (..., heads * rank).
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that dense layers give it
        """Apply the layer, and fill up."""
        values: Tensor = self.linear(input).unflatten(-1, [self.heads, self.rank])
        return nn.functional.pad(values, [0, self.size - self.rank]).flatten(-2)


class HeadOutput(AroundHeads):
    """Reads the numbers of each head, and not the zeros that may be after them.

    Shapes:
        input (..., heads * size) or (..., heads * rank), output (..., out); `linear` takes (..., heads * rank).
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Apply the layer to what the heads hold."""
        heads = input.unflatten(-1, [self.heads, -1])
        output: Tensor = self.linear(heads[..., : self.rank].flatten(-2))
        return output
