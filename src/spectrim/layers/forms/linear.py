"""The linear form: a matrix as the product of two thin ones, y = up(down(x)); of 1x1 convolutions too."""

from typing import final

from torch import Tensor, nn

from spectrim.layers.factored import FactoredLayer
from spectrim.layers.forms.channel import TwoFactorForm, TwoFactors, conv_chain
from spectrim.layers.types import Geometry, LayerType
from spectrim.layers.types.transposed_linear import TransposedWeight
from spectrim.linalg import Ranks


class LinearFactors(TwoFactors):
    """Two layers that multiply each vector by a matrix, or look it up and multiply it."""

    @property
    def form(self) -> str:
        """`linear`."""
        return "linear"


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
class LowRankOutput(LinearFactors):
    """An output layer that shares its factors with an embedding, whose weight it shared before: y = up(down(x)).

    Attributes:
        down: Multiplies by the weight (in_features, rank) of the embedding's `up`.
        up: `nn.Linear(rank, out_features)` with the weight of the embedding's `down`, and a bias of its own, if any.

    Shapes:
        input (..., in_features), output (..., out_features), as for `nn.Linear`.
    """

    is_tied_output = True


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

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:  # noqa: A002
        """As `nn.EmbeddingBag`."""
        y: Tensor = self.up(self.down(input, offsets, per_sample_weights))
        return y


_CLASSES: dict[str, type[LinearFactors]] = {"Embedding": LowRankEmbedding, "EmbeddingBag": LowRankEmbeddingBag}
"""By the name of the layer type; others become a `LowRankLinear`."""


def tied_output(layer: FactoredLayer, dense: nn.Module) -> LowRankOutput:
    """An unset replacement for a dense output layer that can share its factors; as `layer`, which cannot."""
    down, up = layer.chain
    output = LowRankOutput(TransposedWeight(down.get_parameter("weight").detach().T), up, dense=dense)
    return output.train(layer.training).requires_grad_(up.get_parameter("weight").requires_grad)


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
