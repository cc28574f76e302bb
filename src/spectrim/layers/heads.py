"""Linear layers around an attention whose heads hold fewer numbers than its code takes them to have."""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn


class AroundHeads(nn.Module):
    """A linear layer of the numbers that heads hold, in the place of one of all their numbers.

    Attributes:
        linear: The layer.
        size: Numbers of a head, as the attention takes it.
        ranks: Numbers that each head holds.
        narrowed_from: Shape of the weight in whose place it is.
    """

    # torch.jit.script compiles properties
    __jit_unused_properties__: ClassVar[list[str]] = ["weight", "bias", "heads"]

    def __init__(self, linear: nn.Module, *, size: int, ranks: Sequence[int], narrowed_from: tuple[int, ...]) -> None:
        super().__init__()
        self.linear, self.size, self.ranks, self.narrowed_from = linear, size, list(ranks), narrowed_from

    @property
    def heads(self) -> int:
        """How many heads there are."""
        return len(self.ranks)

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
        return f"size={self.size}, ranks={self.ranks}"


class FilledHeads(AroundHeads):
    """Gives the numbers of heads, and after those of each zeros up to the size that the attention expects.

    Shapes:
        input (..., in), output (..., heads * size); `linear` gives (..., sum of ranks).
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that dense layers give it
        """Apply the layer, and fill up."""
        values: Tensor = self.linear(input)
        if min(self.ranks) == max(self.ranks):
            values = values.unflatten(-1, [len(self.ranks), -1])
            return nn.functional.pad(values, [0, self.size - self.ranks[0]]).flatten(-2)
        zeros = [self.size - rank for rank in self.ranks]
        parts = nn.functional.pad(values, [0, sum(zeros)]).split(self.ranks + zeros, dim=-1)
        filled: list[Tensor] = []
        for head in range(len(zeros)):
            filled.extend([parts[head], parts[len(zeros) + head]])
        return torch.cat(filled, dim=-1)


class HeadValues(FilledHeads):
    """Gives the values of heads; `HeadOutput` reads what the attention makes of them."""


class HeadScores(FilledHeads):
    """Gives the queries or the keys of heads, whose products are the scores."""


class HeadOutput(AroundHeads):
    """Reads the numbers of each head, and not the zeros that may be after them.

    Shapes:
        input (..., heads * size), or (..., heads * r) with any r that is no less than the largest rank, output
        (..., out); `linear` takes (..., sum of ranks).
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Apply the layer to what the heads hold."""
        heads = input.unflatten(-1, [len(self.ranks), -1])
        if min(self.ranks) == max(self.ranks):
            numbers = heads[..., : self.ranks[0]].flatten(-2)
        else:
            sizes: list[int] = []
            for rank in self.ranks:
                sizes.extend([rank, heads.shape[-1] - rank])
            numbers = torch.cat(input.split(sizes, dim=-1)[::2], dim=-1)
        output: Tensor = self.linear(numbers)
        return output
