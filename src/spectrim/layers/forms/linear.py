"""The linear form: a matrix as the product of two thin ones, y = up(down(x)); of 1x1 convolutions too."""

from typing import final

from torch import Tensor, nn

from spectrim.layers.factored import FactoredLayer
from spectrim.layers.forms.channel import TwoFactorForm, TwoFactors, conv_chain
from spectrim.layers.types import Geometry, LayerType
from spectrim.linalg import Ranks


class LinearFactors(TwoFactors):
    """Two layers that multiply each vector by a matrix, or look it up and multiply it."""

    def __init__(self, down: nn.Module, up: nn.Module, *, dense: nn.Module | None = None) -> None:
        super().__init__((down, up), dense)
        self.down = down
        self.up = up

    @property
    def form(self) -> str:
        """`linear`."""
        return "linear"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that dense layers give it
        """Apply both factors."""
        y: Tensor = self.up(self.down(input))
        return y


@final
class LowRankLinear(LinearFactors):
    """A linear layer as the product of two thin ones: y = up(down(x)).

    Attributes:
        down: `nn.Linear(in_features, rank, bias=False)`.
        up: `nn.Linear(rank, out_features)`, with the bias, if any.

    Shapes:
        input (..., in_features), output (..., out_features), as for `nn.Linear`.

    Raises:
        ModelError: the two layers do not fit together, or `down` has a bias.
    """


@final
class LowRankEmbedding(LinearFactors):
    """An embedding that looks up fewer numbers and multiplies them: y = up(down(indices)).

    Attributes:
        down: `nn.Embedding(num_embeddings, rank)`.
        up: `nn.Linear(rank, embedding_dim, bias=False)`.

    Shapes:
        indices (...), output (..., embedding_dim), as for `nn.Embedding`.
    """


@final
class LowRankEmbeddingBag(LinearFactors):
    """The same for an `nn.EmbeddingBag` that sums or averages: `down` does so before `up` multiplies."""

    def forward(
        self,
        input: Tensor,  # noqa: A002
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """As `nn.EmbeddingBag`."""
        y: Tensor = self.up(self.down(input, offsets, per_sample_weights))
        return y


_CLASSES: dict[str, type[LinearFactors]] = {"Embedding": LowRankEmbedding, "EmbeddingBag": LowRankEmbeddingBag}
"""By the name of the layer type; others become a `LowRankLinear`."""


class LinearForm(TwoFactorForm):
    """Layers that multiply each vector by one matrix."""

    name = "linear"

    def fits_shape(self, geometry: Geometry) -> bool:
        return geometry.is_pointwise

    def chain(self, layer: nn.Module, layer_type: LayerType, ranks: Ranks, *, bias: bool) -> FactoredLayer:
        if layer_type.geometry(layer).kernel:
            return conv_chain(layer, layer_type, ranks, bias=bias)
        down = layer_type.resized(layer, out=ranks[0], bias=False)
        up = layer_type.pointwise(layer, into=ranks[0], bias=bias)
        return _CLASSES.get(layer_type.name, LowRankLinear)(down, up, dense=layer)
