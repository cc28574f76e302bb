"""Truncation in every forward pass: the network runs at low rank while the full weights are trained."""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.utils import parametrize

from spectrim.core.errors import PatternError, RuleError, TrainingError
from spectrim.layers.registry import Geometry, Positions, as_kernels, forms_of
from spectrim.layers.replacement import factored_at, own_bias
from spectrim.layers.selection import Patterns, Target, near, replace
from spectrim.linalg import Spectrum, spectrum
from spectrim.training.choice import Choice, LayerRule, choose, require_finite, require_ranks
from spectrim.training.cut import Cut


def truncated_(
    model: nn.Module,
    rule: LayerRule,
    *,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    keep_last: bool = False,
    exact: bool = False,
    shrink: float = 0.1,
    movable: bool = False,
) -> "Truncation":
    """Let `model` itself compute y = g(W_D x + b), W_D the best rank-D approximation of W, and go on training all of W.

    The gradient with respect to W is taken as if the truncation were the identity (straight-through; Bengio 2013). The
    parameter stays the same object, under the name `parametrizations.weight.original`, so any loop and optimiser,
    also one made before, trains it; save `state_dict()` after an optimiser step to go on bit for bit. That W changed is
    seen from its version counter and, since torch's fused optimisers do not count, after every backward pass from a sum
    over its bits; so not where it is written through `.data` at other times.

    The part of W outside W_D is invisible to the loss and still receives gradients: it grows, then swaps into the top
    D at once. Therefore the first forward pass in training mode after W changed shrinks it, W <- W_D + (1 - shrink)
    (W - W_D). The published method is `shrink=0.0`.

    Args:
        model: Its Linear and convolution layers are truncated, convolutions in the channel form: the (out, in * kernel)
            matrix of each group. Layers that the rule leaves at full rank, or that have no such form, stay as they are.
        rule: The rank of every layer; for `Energy`, what the weight needs now. Ranks by name leave every other layer
            alone. They stay until `Truncation.set_ranks`, or a `RankSchedule`, changes them.
        include: Name patterns of the layers to truncate.
        exclude: Name patterns of layers to leave out.
        keep_last: Leave out the layer registered last.
        exact: A full decomposition whenever W has changed, instead of one started from the last subspace (within 1e-4
            of the least error, see `linalg.truncate`).
        shrink: Share of W - W_D taken away after every step, 0 to 1.
        movable: Take up layers that the rule leaves at full rank as well, so that their ranks can be lowered later.
            Until then they are as they were, at no cost; `finish()` leaves those dense whose factors would not be
            smaller.

    Returns:
        The ranks, what was left out and why, and the ways back: `finish()` and `remove()`.

    Raises:
        RuleError: not a rule for single layers, or a rank that a layer cannot have.
        PatternError: a pattern or a name matches no layer.
        ModelError: no layer with a factored form.
        TrainingError: a chosen layer is parametrised already, no layer is left, or `shrink` is not a share.
    """
    if isinstance(shrink, bool) or not isinstance(shrink, int | float) or not 0 <= shrink <= 1:
        raise TrainingError(f"shrink={shrink!r} is not a share from 0 (as published) to 1; the default is 0.1")
    choice = choose(model, rule, include=include, exclude=exclude, keep_last=keep_last, movable=movable)
    cuts = [
        Cut(target.name, target.module, rank=rank, exact=exact, shrink=float(shrink)) for target, rank in choice.layers
    ]
    for (target, _), cut in zip(choice.layers, cuts, strict=True):
        for site in target.sites:
            # layers that share a weight share what truncates it, so that it is shrunk once
            parametrize.register_parametrization(model.get_submodule(site), "weight", cut)
        cut.train(target.module.training).seen(_original(target.module))
    return Truncation(model, choice, cuts, movable=movable)


class Truncation:
    """What `truncated_` did to a model, and how to change and to end it.

    Attributes:
        model: The model.
        targets: Where each truncated weight is used, by its layer's first name.
        skipped: Of every layer that is not truncated, why it was left alone.
    """

    def __init__(self, model: nn.Module, choice: Choice, cuts: list[Cut], *, movable: bool) -> None:
        self.model = model
        self._movable = movable
        self.skipped = choice.skipped
        self._cuts = MappingProxyType({target.name: cut for (target, _), cut in zip(choice.layers, cuts, strict=True)})
        self.targets: Mapping[str, Target] = MappingProxyType({target.name: target for target, _ in choice.layers})
        self._ended = False

    @property
    def ranks(self) -> Mapping[str, int]:
        """The present rank of every truncated weight, by its layer's first name; the last ones once it has ended.

        They are part of the model's state: loading a `state_dict` brings them back.
        """
        return MappingProxyType({name: cut.present_rank() for name, cut in self._cuts.items()})

    @property
    def sizes(self) -> Mapping[str, Geometry]:
        """The sizes of every truncated weight, by its layer's first name; `full_rank` is among them."""
        return MappingProxyType({name: cut.sizes for name, cut in self._cuts.items()})

    def stays_dense(self, name: str, rank: int) -> bool:
        """Whether `finish()` would leave a layer dense at this rank.

        It does at full rank and, in a `movable` truncation, wherever factors would not be smaller.
        """
        sizes = self._cuts[name].sizes
        nowhere = Positions()
        grows = sizes.cost("channel", (rank,), nowhere).params >= sizes.dense_cost(nowhere).params
        return rank == sizes.full_rank or (self._movable and grows)

    def weights(self) -> Mapping[str, nn.Parameter]:
        """The full weight W of every truncated layer, which is what is trained, by the layer's first name.

        Raises:
            TrainingError: the truncation has ended already.
        """
        self._require_open()
        return MappingProxyType({name: _original(target.module) for name, target in self.targets.items()})

    def spectra(self) -> Mapping[str, Spectrum]:
        """The singular values of every full weight W as it is now; a full decomposition each.

        Raises:
            TrainingError: the truncation has ended already, or a weight became NaN.
        """
        weights = self.weights()
        for name, weight in weights.items():
            require_finite(name, weight)
        return MappingProxyType(
            {
                name: spectrum(as_kernels(weight.detach(), self._cuts[name].sizes).flatten(2))
                for name, weight in weights.items()
            }
        )

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Truncate the named layers at other ranks from now on; the full weights stay as they are.

        Up as well as down, and up to the full rank, where the truncation is the identity. What was shrunk away outside
        a lower rank does not come back by a higher one. Ranks of a quarter of the shorter side and above need a full
        decomposition at every step.

        Raises:
            PatternError: a name of no truncated layer.
            RuleError: a rank that its layer cannot have.
            TrainingError: the truncation has ended already, or a weight became NaN. Nothing is changed in any case.
        """
        weights = self.weights()
        require_ranks(ranks, {name: cut.sizes.full_rank for name, cut in self._cuts.items()})
        for name in ranks:
            require_finite(name, weights[name])
        present = self.ranks
        moved = {name: rank for name, rank in ranks.items() if rank != present[name]}
        starts = {name: self._cuts[name].start_at(weights[name], rank) for name, rank in moved.items()}
        for name, start in starts.items():
            self._cuts[name].move(moved[name], start)

    def soft_threshold(self, amounts: Mapping[str, float]) -> Mapping[str, int]:
        """Lower the singular values of the named weights by an amount each, to no less than 0: one proximal step.

        W becomes U (S - t)_+ V^T, with U S V^T its best approximation W_D of the present rank D. That is the proximal
        operator of t |X|_* over the matrices X of rank at most D (Cai, Candes & Shen 2010, singular value
        thresholding), so W - W_D goes with it; at full rank it is that of the nuclear norm itself. It takes no more
        than the truncation itself does, and at full rank one decomposition.

        Args:
            amounts: t, at least 0, in units of singular values, by the layer's name.

        Returns:
            The ranks left: how many values are above 0, in the group that has most of them, and at least 1.

        Raises:
            PatternError: a name of no truncated layer.
            RuleError: an amount that is negative or no number.
            TrainingError: the truncation has ended already, or a weight became NaN. Nothing is changed in any case.
        """
        weights = self.weights()
        for name, amount in amounts.items():
            if name not in self._cuts:
                raise PatternError(f"there is no truncated layer {name!r}{near(str(name), self._cuts)}")
            if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < math.inf:
                raise RuleError(f"threshold {amount!r} for {name}: give a number of at least 0, in singular values")
        softened = {name: self._cuts[name].softened(weights[name], amount) for name, amount in amounts.items()}
        with torch.no_grad():
            for name, (lowered, _) in softened.items():
                weights[name].copy_(lowered)
        left = {name: rank for name, (_, rank) in softened.items()}
        self.set_ranks(left)
        return MappingProxyType(left)

    def finish(self) -> nn.Module:
        """Put balanced factors in the place of the truncated layers; the outputs stay the same up to rounding.

        Layers that stay dense (see `stays_dense`) become plain layers again, with W_D as their weight.

        Returns:
            The model itself.

        Raises:
            TrainingError: the truncation has ended already.
        """
        replacements: dict[str, nn.Module] = {}
        for target, cut in self._closed():
            if self.stays_dense(target.name, cut.present_rank()):
                self._flatten(target, cut)
                continue
            factors = cut.factors(_original(target.module))
            self._restore(target)
            form = forms_of(target.module)[0]
            replacements |= factored_at(
                self.model, (target.name, *target.also), form=form, factors=factors, bias=own_bias
            )
        replace(self.model, replacements)
        return self.model

    def remove(self) -> nn.Module:
        """Put the plain layers back, with W_D as their weight: the same outputs, and the same parameters.

        Returns:
            The model itself.

        Raises:
            TrainingError: the truncation has ended already.
        """
        for target, cut in self._closed():
            self._flatten(target, cut)
        return self.model

    def _closed(self) -> list[tuple[Target, Cut]]:
        self._require_open()
        self._ended = True
        for cut in self._cuts.values():
            cut.eval()
        return [(self.targets[name], cut) for name, cut in self._cuts.items()]

    def _require_open(self) -> None:
        if self._ended:
            raise TrainingError("this truncation has ended already; call truncated_ again to start another")

    def _flatten(self, target: Target, cut: Cut) -> None:
        weight = _original(target.module)
        kept = cut(weight).detach()
        self._restore(target)
        with torch.no_grad():
            weight.copy_(kept)

    def _restore(self, target: Target) -> None:
        for site in target.sites:
            layer = self.model.get_submodule(site)
            if len(layer.parametrizations) > 1:  # type: ignore[arg-type]
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
                continue
            # torch's way changes the class, which copies of the layer share, such as the best epoch's
            weight = _original(layer)
            del layer.parametrizations
            layer.__class__ = type(layer).__bases__[0]
            layer.register_parameter("weight", weight)


def _original(layer: nn.Module) -> nn.Parameter:
    """The full weight of a truncated layer."""
    return layer.get_parameter("parametrizations.weight.original")
