"""Truncation in every forward pass: the network runs at low rank while the full weights are trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectrim.errors import ModelError, RuleError, TrainingError
from spectrim.execution import Trace
from spectrim.factorize import factored_at, own_bias
from spectrim.forms import LAYERS, Geometry, as_kernels, as_stored, forms_of, geometry, matrices
from spectrim.linalg import Factors, Truncated, algebra, spectrum, truncate, truncate_exactly
from spectrim.plan import Energy, Rank, Ratio
from spectrim.ranks import require_reachable
from spectrim.surgery import Patterns, Target, find_targets, replace


def truncated_(
    model: nn.Module,
    rule: Rank | Ratio | Energy,
    *,
    include: Patterns = ("*",),
    exclude: Patterns = (),
    keep_last: bool = False,
    exact: bool = False,
    shrink: float = 0.1,
) -> "Truncation":
    """Let `model` itself compute y = g(W_D x + b), W_D the best rank-D approximation of W, and go on training all of W.

    The gradient with respect to W is taken as if the truncation were the identity (straight-through; Bengio 2013). The
    parameter stays the same object, under the name `parametrizations.weight.original`, so any loop and optimiser,
    also one made before, trains it; save `state_dict()` after an optimiser step to go on bit for bit. That W changed is
    seen from its version counter, so not where it is written through `.data`.

    The part of W outside W_D is invisible to the loss and still receives gradients: it grows, then swaps into the top
    D at once. Therefore the first forward pass in training mode after W changed shrinks it, W <- W_D + (1 - shrink)
    (W - W_D). The published method is `shrink=0.0`.

    Args:
        model: Its Linear and convolution layers are truncated, convolutions in the channel form: the (out, in * kernel)
            matrix of each group. Layers that the rule leaves at full rank, or that have no such form, stay as they are.
        rule: The rank of every layer; for `Energy`, what the weight needs now, fixed from then on.
        include: Name patterns of the layers to truncate.
        exclude: Name patterns of layers to leave out.
        keep_last: Leave out the layer registered last.
        exact: A full decomposition whenever W has changed, instead of one started from the last subspace (within 1e-4
            of the least error, see `linalg.truncate`).
        shrink: Share of W - W_D taken away after every step, 0 to 1.

    Returns:
        The ranks, what was left out and why, and the ways back: `finish()` and `remove()`.

    Raises:
        RuleError: not a rule for single layers, or a rank above the full rank of a layer.
        PatternError: a pattern matches no layer.
        ModelError: no layer with a factored form.
        TrainingError: a chosen layer is parametrised already, no layer is left, or `shrink` is not a share.
    """
    if isinstance(shrink, bool) or not isinstance(shrink, int | float) or not 0 <= shrink <= 1:
        raise TrainingError(f"shrink={shrink!r} is not a share from 0 (as published) to 1; the default is 0.1")
    choice = choose(model, rule, include=include, exclude=exclude, keep_last=keep_last)
    cuts = [
        _Cut(target.name, target.module, rank=rank, exact=exact, shrink=float(shrink)) for target, rank in choice.layers
    ]
    for (target, _), cut in zip(choice.layers, cuts, strict=True):
        for site in target.sites:
            # layers that share a weight share what truncates it, so that it is shrunk once
            parametrize.register_parametrization(model.get_submodule(site), "weight", cut)
        cut.train(target.module.training).seen(_original(target.module))
    return Truncation(model, choice, cuts)


@dataclass(frozen=True, eq=False)
class Choice:
    """Layers to work on with their ranks, and for every other name why it is left alone."""

    layers: tuple[tuple[Target, int], ...]
    skipped: Mapping[str, str]


def choose(
    model: nn.Module, rule: Rank | Ratio | Energy, *, include: Patterns, exclude: Patterns, keep_last: bool
) -> Choice:
    """The layers whose weight a rule truncates; raises as `truncated_` does."""
    if not isinstance(rule, Rank | Ratio | Energy):
        raise RuleError(f"{rule!r} does not say a rank for each layer; give Rank(20), Ratio(0.25) or Energy(0.9)")
    named = model.named_modules(remove_duplicate=False)
    calls = {name: 1 for name, module in named if isinstance(module, LAYERS)}
    targets = find_targets(model, Trace({}, calls), include=include, exclude=exclude, keep_last=keep_last)
    for target in targets:
        if parametrize.is_parametrized(target.module) and "parametrised" in (target.refusal or ""):
            raise TrainingError(
                f"{target.name} is parametrised already, perhaps truncated; call finish() or remove() of that "
                "truncation, or torch's remove_parametrizations, or leave the layer out with exclude="
            )
    fit = [target for target in targets if target.refusal is None]
    full = {target.name: geometry(target.module).full_rank for target in fit}
    require_reachable(
        rule, {target.name: (target.module.get_parameter("weight").shape, full[target.name]) for target in fit}
    )
    ranks = {target.name: _rank(rule, target.module, full[target.name]) for target in fit}
    layers = tuple((target, ranks[target.name]) for target in fit if ranks[target.name] < full[target.name])
    skipped = {target.name: target.refusal for target in targets if target.refusal is not None}
    whole = {name: f"rank {rank} is its full rank" for name, rank in ranks.items() if rank == full[name]}
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in [*whole.items(), *skipped.items()][:4])
        raise TrainingError(f"{rule} leaves no layer to truncate ({reasons}); choose a smaller rank or other layers")
    return Choice(layers, MappingProxyType({**skipped, **whole}))


def _rank(rule: Rank | Ratio | Energy, layer: nn.Module, full: int) -> int:
    match rule:
        case Rank(rank=rank):
            return rank
        case Ratio():
            return rule.rank_of(full)
        case Energy(energy=energy):
            return spectrum(matrices(layer)).rank_for(energy)


class Truncation:
    """What `truncated_` did to a model, and how to end it.

    Attributes:
        ranks: The rank of every truncated weight, by its layer's first name.
        skipped: Of every other layer, why it was left alone.
    """

    def __init__(self, model: nn.Module, choice: Choice, cuts: "list[_Cut]") -> None:
        self.ranks: Mapping[str, int] = MappingProxyType({target.name: rank for target, rank in choice.layers})
        self.skipped = choice.skipped
        self._model = model
        self._open = list(zip((target for target, _ in choice.layers), cuts, strict=True))

    def finish(self) -> nn.Module:
        """Put balanced factors in the place of the truncated layers; the outputs stay the same up to rounding.

        Returns:
            The model itself.

        Raises:
            TrainingError: the truncation has ended already.
        """
        replacements: dict[str, nn.Module] = {}
        for target, cut in self._closed():
            factors = cut.factors(_original(target.module))
            self._restore(target)
            form = forms_of(target.module)[0]
            replacements |= factored_at(
                self._model, (target.name, *target.also), form=form, factors=factors, bias=own_bias
            )
        replace(self._model, replacements)
        return self._model

    def remove(self) -> nn.Module:
        """Put the plain layers back, with W_D as their weight: the same outputs, and the same parameters.

        Returns:
            The model itself.

        Raises:
            TrainingError: the truncation has ended already.
        """
        for target, cut in self._closed():
            weight = _original(target.module)
            kept = cut(weight).detach()
            self._restore(target)
            with torch.no_grad():
                weight.copy_(kept)
        return self._model

    def _closed(self) -> "list[tuple[Target, _Cut]]":
        if not self._open:
            raise TrainingError("this truncation has ended already; call truncated_ again to start another")
        ended, self._open = self._open, []
        for _, cut in ended:
            cut.eval()
        return ended

    def _restore(self, target: Target) -> None:
        for site in target.sites:
            layer = self._model.get_submodule(site)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def _original(layer: nn.Module) -> nn.Parameter:
    """The full weight of a truncated layer."""
    return layer.get_parameter("parametrizations.weight.original")


class _Cut(nn.Module):
    """W to W_D, computed once for every value that W takes.

    Attributes:
        basis: (groups, min(out, in), n), where the next subspace starts; part of the state, so that a resumed run
            computes what an uninterrupted one would. Only training changes it.
    """

    basis: Tensor

    def __init__(self, name: str, layer: nn.Module, *, rank: int, exact: bool, shrink: float) -> None:
        super().__init__()
        self._name, self._sizes = name, geometry(layer)
        self._rank, self._exact, self._shrink = rank, exact, shrink
        weight = layer.get_parameter("weight")
        self._parts = self._decomposed(weight, None)
        self._kept = _product(self._parts, self._sizes).to(weight.dtype)
        self.register_buffer("basis", _bases(self._parts).to(weight.dtype))
        # None until registered: registration counts as a write to the weight, and asks for W_D
        self._key: tuple[object, ...] | None = None
        self._unsettled = False

    def extra_repr(self) -> str:
        """The rank, and how it is made."""
        return f"rank={self._rank}, exact={self._exact}, shrink={self._shrink:g}"

    def seen(self, weight: Tensor) -> None:
        """Take what is cached as that of the weight as it now is."""
        self._key, self._unsettled = _key(weight), False

    def forward(self, weight: Tensor) -> Tensor:
        """W_D, (out, in, ..), with the gradient passed to W unchanged."""
        self._update(weight)
        if self.training and self._unsettled:
            # in eval mode the weight is left alone, and the basis too, so that evaluating has no effect on training
            with torch.inference_mode(mode=False), torch.no_grad():
                self.basis.copy_(_bases(self._parts))
                if self._shrink > 0:
                    weight.lerp_(self._kept, self._shrink)
            self.seen(weight)
        kept: Tensor = _StraightThrough.apply(weight, self._kept)
        return kept

    def factors(self, weight: Tensor) -> Factors:
        """(down, up) in float64, (groups, rank, in, *kernel) and (groups, out, rank)."""
        self._update(weight)
        up = torch.stack([algebra(part.left) for part in self._parts])
        down = torch.stack([algebra(part.right).mT for part in self._parts])
        return down.reshape(len(down), self._rank, self._sizes.into, *self._sizes.kernel), up

    def _update(self, weight: Tensor) -> None:
        if self._key in (None, _key(weight)):
            return
        self._parts = self._decomposed(weight, self.basis)
        self._kept = _product(self._parts, self._sizes).to(weight.dtype)
        self._key, self._unsettled = _key(weight), True

    def _decomposed(self, weight: Tensor, basis: Tensor | None) -> list[Truncated]:
        # mixed precision would take the products in half of it, and what inference mode makes cannot be trained with
        off = torch.autocast(weight.device.type, enabled=False)
        with torch.inference_mode(mode=False), torch.no_grad(), off:
            kind = weight.dtype if weight.dtype == torch.float64 else torch.float32
            groups = as_kernels(weight.detach(), self._sizes).flatten(2).to(kind)
            try:
                if self._exact:
                    return [truncate_exactly(W, self._rank) for W in groups]
                starts = [None] * len(groups) if basis is None else list(basis.to(kind))
                return [truncate(W, self._rank, basis=V) for W, V in zip(groups, starts, strict=True)]
            except ModelError as error:
                raise TrainingError(f"{self._name}: {error}; lower the learning rate or check the data") from error


def _key(weight: Tensor) -> tuple[object, ...]:
    return weight._version, weight.data_ptr(), weight.dtype, weight.device


def _bases(parts: list[Truncated]) -> Tensor:
    return torch.stack([part.basis for part in parts])


def _product(parts: list[Truncated], sizes: Geometry) -> Tensor:
    """W_D as the layer stores its weight."""
    with torch.inference_mode(mode=False), torch.no_grad(), torch.autocast(parts[0].left.device.type, enabled=False):
        whole = parts[0].matrix.unsqueeze(0) if len(parts) == 1 else torch.stack([part.matrix for part in parts])
        return as_stored(whole.reshape(sizes.groups, sizes.out, sizes.into, *sizes.kernel), sizes)


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient given to the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor) -> Tensor:
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
