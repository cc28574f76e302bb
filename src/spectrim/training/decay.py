"""Training factors from scratch: spectral initialisation, and weight decay of the product instead of the factors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError, TrainingError
from spectrim.layers.factored import FactoredLayer, low_rank_layers
from spectrim.layers.selection import Patterns
from spectrim.training.choice import LayerRule
from spectrim.training.project import ProjectEachEpoch


def frobenius_decay(model: nn.Module) -> Tensor:
    """Half of the squared Frobenius norm of every product of factors, summed: what to add to a loss, times the decay.

        loss = criterion(model(x), y) + 1e-4 * st.training.frobenius_decay(model)

    In a dense layer, weight decay acts on W = U V^T itself. Decay of the factors lowers the nuclear norm instead, and
    costs accuracy when factors are trained from scratch (Khodak 2021): leave them out of the optimiser's weight decay.

    Exact for every form, without making a dense weight: |U V^T|^2 is the sum over the product, entry by entry, of the
    Gram matrices U^T U and V^T V (rank x rank, each group by itself). Factors that several layers share count once.

    Returns:
        A scalar with its gradient, on the device of the factors; float64 for float64 weights, otherwise float32, under
        mixed precision too.

    Raises:
        ModelError: the model has no factored layer.
    """
    layers = {
        tuple(id(part.get_parameter("weight")) for part in layer.chain): layer
        for layer in low_rank_layers(model).values()
    }
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no factored layer whose product could decay; factor it first, with "
            "st.compress or st.training.spectral"
        )
    first, *rest = (_half_square(layer) for layer in layers.values())
    return sum((term.to(first.device) for term in rest), first)


def _half_square(layer: FactoredLayer) -> Tensor:
    weights = [part.get_parameter("weight") for part in layer.chain]
    with torch.autocast(weights[0].device.type, enabled=False):
        factors = layer.factors([weight if weight.dtype == torch.float64 else weight.float() for weight in weights])
        # Gram matrices, rank x rank in each group: of the outputs of all factors but the last, of the last one's inputs
        first, *middle, last = (factor.flatten(3) if factor.ndim > 3 else factor.unsqueeze(3) for factor in factors)
        gram = torch.einsum("grik,gsik->grs", first, first)
        for factor in middle:
            gram = torch.einsum("gsrk,grt,gutk->gsu", factor, gram, factor)
        return (torch.einsum("gork,gosk->grs", last, last) * gram).sum() / 2


@dataclass(frozen=True, eq=False)
class Spectral:
    """A network to be trained as factors from the start: the factored copy, and the strength of the Frobenius decay."""

    model: nn.Module
    decay: float

    def penalty(self) -> Tensor:
        """`decay` times `frobenius_decay` of the model, to be added to the loss at every step."""
        return self.decay * frobenius_decay(self.model)


def spectral(
    model: nn.Module,
    rule: LayerRule,
    *,
    decay: float = 1e-4,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    keep_last: bool = False,
) -> Spectral:
    """Factor a network before it is trained: spectral initialisation together with Frobenius decay (Khodak 2021).

        start = st.training.spectral(network, st.Rank(20), keep_last=True)
        loss = criterion(start.model(x), y) + start.penalty()

    The factors are U sqrt(S) and sqrt(S) V^T of the plain SVD of each random weight, convolutions in the channel form,
    as `st.compress` with neither data nor reconstruction makes them. The study found that the two help only together.

    Args:
        model: The network with its initial weights; left as it is.
        rule: The rank of every layer, or ranks by the layers' names.
        decay: The strength of the Frobenius decay, at least 0, as weight decay would have for the dense network.
        include: Name patterns of the layers to factor.
        exclude: Name patterns of layers to leave dense.
        keep_last: Leave the layer registered last dense.

    Raises:
        RuleError, PatternError, TrainingError: as `truncated_`, or `decay` is not a number of at least 0.
    """
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < math.inf:
        raise TrainingError(f"decay={decay!r}: give a number of at least 0, such as 1e-4")
    factor = ProjectEachEpoch(rule, include=include, exclude=exclude, keep_last=keep_last)
    return Spectral(factor.finish(model), float(decay))
