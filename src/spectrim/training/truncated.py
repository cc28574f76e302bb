"""Truncation in every forward pass: the network computes at low rank while the full weights are trained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from spectrim.core.errors import PatternError, RuleError, TrainingError, near
from spectrim.layers.replacement import replace
from spectrim.layers.selection import Patterns
from spectrim.layers.units import SingleWeight
from spectrim.linalg import Spectrum
from spectrim.training.choice import (
    LayerFilter,
    LayerRule,
    factored,
    require_finite,
    require_ranks,
    shrinks,
    weight_of,
    weight_spectrum,
)
from spectrim.training.low_rank_parametrization import LowRankParametrization


def truncated_(
    model: nn.Module,
    rule: LayerRule,
    *,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    keep_last: bool = False,
    exact: bool = False,
    residual_decay: float = 0.1,
    trainable_rank: bool = False,
) -> "Truncation":
    """Let `model` itself compute y = g(W_D x + b), W_D the best rank-D approximation of W, and go on training all of W.

    The gradient passes the truncation as if it were the identity (straight-through; Bengio 2013). The parameter stays
    the same object, under the name `parametrizations.weight.original`, so any loop and optimiser trains it, also an
    optimiser made before. Save `state_dict()` after an optimiser step to resume bit for bit. Writing to W through
    `.data` is noticed only after a backward pass.

    The residual W - W_D is invisible to the loss and still receives gradients: it grows, then changes places with the
    top D at once. So the first forward pass in training mode after a change of W lessens it, W <- W_D +
    (1 - residual_decay) (W - W_D). The published method is `residual_decay=0.0`.

    Args:
        model: Its Linear and convolution layers are truncated, convolutions in the channel form: the (out, in * kernel)
            matrix of each group. Layers that the rule leaves at full rank, or that have no such form, stay as they are.
        rule: The rank of every layer, or ranks by name, which leave other layers alone; for `Energy`, what the weight
            needs now. They stay until `Truncation.set_ranks`, or a `RankSchedule`, changes them.
        include: Name patterns of the layers to truncate.
        exclude: Name patterns of layers to leave out.
        keep_last: Leave out the layer registered last.
        exact: Decompose W fully whenever it has changed, instead of starting from the last subspace (within 1e-4 of the
            least error, see `linalg.truncate`).
        residual_decay: Share of W - W_D taken away after every step, 0 to 1.
        trainable_rank: Also take layers that the rule leaves at full rank, so that their ranks can be lowered later.
            Until then they are unchanged, at no cost; `finish()` leaves those dense whose factors would not be smaller.

    Raises:
        RuleError: not a rule for single layers, or a rank that a layer cannot have.
        PatternError: a pattern or a name matches no layer.
        ModelError: no layer with a factored form.
        TrainingError: a chosen layer is parametrised already, no layer is left, or `residual_decay` is not in [0, 1].
    """
    if isinstance(residual_decay, bool) or not isinstance(residual_decay, int | float) or not 0 <= residual_decay <= 1:
        raise TrainingError(f"residual_decay={residual_decay!r} is not a share from 0 (as published) to 1, such as 0.1")
    layer_filter = LayerFilter(include=include, exclude=exclude, keep_last=keep_last)
    chosen, skipped = layer_filter.choose(model, rule, trainable_rank=trainable_rank)
    decay = float(residual_decay)
    layers = {
        unit: LowRankParametrization(unit, weight_of(unit, model), rank=rank, exact=exact, residual_decay=decay)
        for unit, rank in chosen.items()
    }
    for unit, layer in layers.items():
        for site in unit.call_sites:
            # layers that share a weight share its parametrisation, so that its residual decays once
            parametrize.register_parametrization(model.get_submodule(site), "weight", layer)
        layer.train(unit.layer(model).training).mark_current(_original(unit.layer(model)))
    named = {unit.name: layer for unit, layer in layers.items()}
    return Truncation(model, {unit.name: unit for unit in chosen}, skipped, named, trainable_rank)


@dataclass(eq=False, repr=False)
class Truncation:
    """What `truncated_` did to a model, and how to change it and to end it, by `finish()` or `remove()`.

    Layers go by the first name of each truncated weight. Once the truncation has ended, every method but `ranks`,
    `full_ranks` and `stays_dense` raises `TrainingError`.

    Attributes:
        model: The model.
        units: The truncated weights.
        skipped: Of every layer that is not truncated, why it was left alone.
    """

    model: nn.Module
    units: Mapping[str, SingleWeight]
    skipped: Mapping[str, str]
    _layers: Mapping[str, LowRankParametrization]
    _trainable_rank: bool
    _ended: bool = False

    @property
    def ranks(self) -> Mapping[str, int]:
        """The present ranks, or the last ones once it has ended. Loading a `state_dict` of the model restores them."""
        return {name: layer.present_rank() for name, layer in self._layers.items()}

    @property
    def full_ranks(self) -> Mapping[str, int]:
        """The full rank of every truncated weight."""
        return {name: unit.geometry.full_rank for name, unit in self.units.items()}

    def stays_dense(self, name: str, rank: int) -> bool:
        """Whether `finish()` leaves a layer dense: at full rank and, with `trainable_rank`, if factors are larger."""
        unit = self.units[name]
        return rank == unit.geometry.full_rank or (self._trainable_rank and not shrinks(unit, rank))

    def weights(self) -> Mapping[str, nn.Parameter]:
        """The full weight W of every truncated layer, which is what is trained."""
        if self._ended:
            raise TrainingError("this truncation has ended already; call truncated_ again to start another")
        return {name: _original(unit.layer(self.model)) for name, unit in self.units.items()}

    def spectra(self) -> Mapping[str, Spectrum]:
        """The singular values of every full weight W as it is now; raises `TrainingError` if one became NaN."""
        return {name: weight_spectrum(self.units[name], weight) for name, weight in self.weights().items()}

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Truncate the named layers at other ranks from now on; the full weights stay as they are.

        They may rise up to the full rank, where the truncation is the identity; what has decayed outside a lower rank
        does not come back. From a quarter of the shorter side on, every step takes a full decomposition.

        Raises:
            PatternError: a name of no truncated layer.
            RuleError: a rank that its layer cannot have.
            TrainingError: a weight became NaN. Nothing is changed in any case.
        """
        weights, present = self.weights(), self.ranks
        require_ranks(ranks, self.full_ranks)
        for name in ranks:
            require_finite(name, weights[name])
        changed = {name: rank for name, rank in ranks.items() if rank != present[name]}
        bases = {name: self._layers[name].basis_for(weights[name], rank) for name, rank in changed.items()}
        for name, basis in bases.items():
            self._layers[name].set_rank(changed[name], basis)

    def soft_threshold(self, amounts: Mapping[str, float]) -> Mapping[str, int]:
        """Lower the singular values of the named weights by an amount each, to no less than 0: one proximal step.

        W becomes U (S - t)_+ V^T, with U S V^T its best approximation W_D of the present rank D. That is the proximal
        operator of t |X|_* over the matrices X of rank at most D (Cai, Candes & Shen 2010, singular value
        thresholding), so W - W_D is removed too; at full rank it is that of the nuclear norm itself.

        Args:
            amounts: t, at least 0, in units of singular values, by the layer's name.

        Returns:
            The new ranks: how many values are above 0, in the group that has most of them, and at least 1.

        Raises:
            PatternError: a name of no truncated layer.
            RuleError: an amount that is negative or not a number.
            TrainingError: a weight became NaN. Nothing is changed in any case.
        """
        weights = self.weights()
        for name, amount in amounts.items():
            if name not in weights:
                raise PatternError(f"there is no truncated layer {name!r}{near(str(name), weights)}")
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < math.inf:
                raise RuleError(f"threshold {amount!r} for {name}: give a number of at least 0, in singular values")
        softened = {name: self._layers[name].softened(weights[name], amount) for name, amount in amounts.items()}
        with torch.no_grad():
            for name, (lowered, _) in softened.items():
                weights[name].copy_(lowered)
        ranks = {name: rank for name, (_, rank) in softened.items()}
        self.set_ranks(ranks)
        return ranks

    def finish(self) -> nn.Module:
        """Replace the truncated layers by balanced factors, with the same outputs up to rounding; returns the model.

        Layers that stay dense (see `stays_dense`) become plain layers again, with W_D as their weight.

        Raises:
            ModelError: factors that the layers' number type cannot hold; all layers are then as `remove` leaves them.
        """
        weights = self.weights()
        ranks = {name: rank for name, rank in self.ranks.items() if not self.stays_dense(name, rank)}
        factors = {name: self._layers[name].factors(weights[name]) for name in ranks}
        self.remove()
        replacements: dict[str, nn.Module] = {}
        for name in ranks:
            replacements |= factored(self.model, self.units[name], factors[name])
        replace(self.model, replacements)
        return self.model

    def remove(self) -> nn.Module:
        """Make the truncated layers plain ones again, with W_D as their weight: the same outputs; returns the model.

        Its parameters are the same objects as before `truncated_`.
        """
        weights, self._ended = self.weights(), True
        for name, weight in weights.items():
            low_rank = self._layers[name].eval()(weight).detach()
            self._unregister(self.units[name])
            with torch.no_grad():
                weight.copy_(low_rank)
        return self.model

    def _unregister(self, unit: SingleWeight) -> None:
        for site in unit.call_sites:
            layer = self.model.get_submodule(site)
            if len(layer.parametrizations) > 1:  # type: ignore[arg-type]
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
                continue
            # torch's function changes the class itself, which copies of the layer share, such as the best epoch's
            weight = _original(layer)
            del layer.parametrizations
            layer.__class__ = type(layer).__bases__[0]
            layer.register_parameter("weight", weight)


def _original(layer: nn.Module) -> nn.Parameter:
    """The full weight of a truncated layer."""
    return layer.get_parameter("parametrizations.weight.original")
