"""Low rank beside the training: weights projected between epochs, and factors trained from scratch with decay."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectrim.core.errors import ModelError, TrainingError
from spectrim.core.plans import Energy
from spectrim.layers.factored import FactoredLayer, low_rank_layers
from spectrim.layers.replacement import duplicate, replace
from spectrim.layers.selection import Patterns
from spectrim.layers.units import SingleWeight
from spectrim.linalg import Factors, to_float64
from spectrim.training.choice import LayerFilter, LayerRule, factored, require_finite, weight_of

# what torch's optimisers call the running mean of the gradient
_MOMENTUM = ("exp_avg", "momentum_buffer")


@dataclass
class ProjectEachEpoch(LayerFilter):
    """Replace every weight by its best approximation of rank D, whenever called; use it in any loop.

        project = st.training.ProjectEachEpoch(st.Rank(20))
        for epoch in range(epochs):
            train(model, optimizer)
            project(model, optimizer)
        small = project.finish(model)

    Projected gradient descent on matrices of bounded rank (Jain 2010, singular value projection). The projection is the
    plain truncated SVD (Eckart & Young 1936), in float64; convolutions in the channel form, each group by itself.

    Attributes:
        rule: The rank of every layer, or ranks by the layers' names. `Energy` is of the weight as it is at each call,
            so ranks can fall with time.
        every_steps: Project after this many calls of `step`; None leaves it to calls at the ends of epochs.
        include, exclude, keep_last: As in `LayerFilter`.
    """

    rule: LayerRule
    _: KW_ONLY
    every_steps: int | None = None
    _steps: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        every = self.every_steps
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise TrainingError(f"every_steps={every!r} is not a whole number of at least 1, such as 100, or None")

    def __call__(self, model: nn.Module, optimizer: Optimizer | None = None) -> Mapping[str, float]:
        """Project the chosen weights of `model` itself, and the momentum of the optimiser that trains them.

        The momentum M (Adam's `exp_avg`, SGD's `momentum_buffer`) of a projected weight U S V^T keeps its part in the
        tangent space of the matrices of rank D there, U U^T M + M V V^T - U U^T M V V^T (Vandereycken 2013): the rest
        would raise the rank again at the next step. Second moments stay: they are sizes of the gradient's entries.

        Returns:
            By layer name, the relative error |W - W_D| / |W| of this projection.

        Raises:
            RuleError: not a rule for single layers, or a rank above the full rank of a layer.
            PatternError: a pattern matches no layer.
            TrainingError: no layer is left to project, one is parametrised, or a weight became NaN; nothing is changed.
        """
        chosen, _ = self.choose(model, self.rule)
        projections = [_Projection.of(unit, model, rank) for unit, rank in chosen.items()]
        errors: dict[str, float] = {}
        with torch.no_grad():
            for projection in projections:
                weight = weight_of(projection.unit, model)
                weight.copy_(projection.weight)
                errors[projection.unit.name] = projection.error
                state = {} if optimizer is None else optimizer.state.get(weight, {})
                for momentum in (state[name] for name in _MOMENTUM if isinstance(state.get(name), Tensor)):
                    momentum.copy_(projection.tangent(momentum))
        return errors

    def step(self, model: nn.Module, optimizer: Optimizer | None = None) -> bool:
        """Count one optimiser step and project after every `every_steps` of them; returns whether it did.

        The count starts at 0 with this object and is not part of any saved state. Raises `TrainingError` if
        `every_steps` is None; otherwise as a call.
        """
        if self.every_steps is None:
            advice = "give ProjectEachEpoch(.., every_steps=100)"
            raise TrainingError(f"step() counts to every_steps, which is None; {advice}")
        self._steps += 1
        if due := self._steps % self.every_steps == 0:
            self(model, optimizer)
        return due

    def finish(self, model: nn.Module) -> nn.Module:
        """A copy of `model` with the chosen layers factored; right after a projection its outputs are the same.

        A weight that was trained since is projected once more, in the copy. With `Energy`, a weight below its full rank
        keeps its rank. Raises as a call.
        """
        copied = duplicate(model)
        replacements: dict[str, nn.Module] = {}
        for unit, rank in self.choose(copied, self.rule)[0].items():
            # Energy asks anew each time, so a weight below its full rank has been projected already
            at_most = unit.geometry.full_rank if isinstance(self.rule, Energy) else rank
            replacements |= factored(copied, unit, _Projection.of(unit, copied, rank, at_most=at_most).factors)
        replace(copied, replacements)
        return copied


@dataclass(frozen=True, eq=False)
class _Projection:
    """U S V^T, in float64: (groups, out, rank), (groups, rank), (groups, rank, n)."""

    unit: SingleWeight
    U: Tensor
    S: Tensor
    Vh: Tensor
    error: float

    @classmethod
    def of(cls, unit: SingleWeight, model: nn.Module, rank: int, *, at_most: int = 0) -> "_Projection":
        """The best approximation of a weight at a rank; at the weight's own rank, if that is below `at_most`."""
        weight = weight_of(unit, model)
        require_finite(unit.name, weight)
        U, S, Vh = torch.linalg.svd(unit.matrices(to_float64(weight)), full_matrices=False)
        tolerance = torch.finfo(weight.dtype).eps * max(unit.geometry.out, unit.geometry.width) * S[:, :1]
        own = int((tolerance < S).sum(dim=1).max())
        rank = own if 0 < own < at_most else rank
        total = float(S.square().sum())
        error = (float(S[:, rank:].square().sum()) / total) ** 0.5 if total > 0 else 0.0
        return cls(unit, U[:, :, :rank], S[:, :rank], Vh[:, :rank], error)

    @property
    def factors(self) -> Factors:
        """(down, up), (groups, rank, in, *kernel) and (groups, out, rank)."""
        return self.Vh.reshape(*self.S.shape, *self.unit.geometry.shape[2:]), self.U * self.S.unsqueeze(1)

    @property
    def weight(self) -> Tensor:
        """W_D, as the layer stores its weight."""
        return self.unit.to_weight((self.U * self.S.unsqueeze(1)) @ self.Vh)

    def tangent(self, momentum: Tensor) -> Tensor:
        """A tensor like the weight, projected onto the tangent space at W_D."""
        M = self.unit.matrices(to_float64(momentum))
        outside = M - self.U @ (self.U.mT @ M)
        outside = outside - (outside @ self.Vh.mT) @ self.Vh
        return self.unit.to_weight(M - outside)


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
        frozenset(id(part.get_parameter("weight")) for part in layer.chain): layer
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
