"""Truncation in every forward pass: the network runs at low rank while the full weights are trained."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectrim.errors import ModelError, PatternError, RuleError, TrainingError
from spectrim.execution import Trace
from spectrim.factorize import factored_at, own_bias
from spectrim.forms import LAYERS, Geometry, Positions, as_kernels, as_stored, forms_of, geometry, matrices
from spectrim.linalg import Factors, Spectrum, Truncated, algebra, is_finite, spectrum, truncate, truncate_exactly
from spectrim.plan import Energy, Rank, Ratio
from spectrim.ranks import require_reachable
from spectrim.surgery import Patterns, Target, find_targets, near, replace

LayerRule = Rank | Ratio | Energy | Mapping[str, int]
"""What says a rank for each layer by itself: a rule for all of them, or the ranks by the layers' names."""


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
        _Cut(target.name, target.module, rank=rank, exact=exact, shrink=float(shrink)) for target, rank in choice.layers
    ]
    for (target, _), cut in zip(choice.layers, cuts, strict=True):
        for site in target.sites:
            # layers that share a weight share what truncates it, so that it is shrunk once
            parametrize.register_parametrization(model.get_submodule(site), "weight", cut)
        cut.train(target.module.training).seen(_original(target.module))
    return Truncation(model, choice, cuts, movable=movable)


@dataclass(frozen=True, eq=False)
class Choice:
    """Layers to work on with their ranks, and for every other name why it is left alone."""

    layers: tuple[tuple[Target, int], ...]
    skipped: Mapping[str, str]


def choose(
    model: nn.Module,
    rule: LayerRule,
    *,
    include: Patterns,
    exclude: Patterns,
    keep_last: bool,
    movable: bool = False,
) -> Choice:
    """The layers whose weight a rule truncates; raises as `truncated_` does."""
    if not isinstance(rule, Rank | Ratio | Energy | Mapping):
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
    ranks = _ranks(rule, fit, full)
    taken = [target for target in fit if target.name in ranks and (movable or ranks[target.name] < full[target.name])]
    skipped = {target.name: target.refusal for target in targets if target.refusal is not None}
    unnamed = {name: "it is not among the ranks given" for name in full if name not in ranks}
    whole = {name: f"rank {rank} is its full rank" for name, rank in ranks.items() if rank == full[name]}
    if not taken:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in [*whole.items(), *skipped.items()][:4])
        raise TrainingError(f"{rule} leaves no layer to truncate ({reasons}); choose a smaller rank or other layers")
    kept = {} if movable else whole
    return Choice(tuple((one, ranks[one.name]) for one in taken), MappingProxyType({**skipped, **unnamed, **kept}))


def _ranks(rule: LayerRule, layers: Sequence[Target], full: Mapping[str, int]) -> dict[str, int]:
    """The rank of every layer that the rule speaks of."""
    if isinstance(rule, Mapping):
        names = {name: target.name for target in layers for name in (target.name, *target.also)}
        require_ranks(rule, {name: full[first] for name, first in names.items()})
        return {names[name]: rank for name, rank in rule.items()}
    sizes = {target.name: (target.module.get_parameter("weight").shape, full[target.name]) for target in layers}
    require_reachable(rule, sizes)
    return {target.name: _rank(rule, target.module, full[target.name]) for target in layers}


def _rank(rule: Rank | Ratio | Energy, layer: nn.Module, full: int) -> int:
    match rule:
        case Rank(rank=rank):
            return rank
        case Ratio():
            return rule.rank_of(full)
        case Energy(energy=energy):
            return spectrum(matrices(layer)).rank_for(energy)


def require_ranks(ranks: Mapping[str, int], full: Mapping[str, int]) -> None:
    """Check ranks by name against the full ranks of the layers that there are.

    Raises:
        PatternError: a name of no layer.
        RuleError: a rank that its layer cannot have.
    """
    for name, rank in ranks.items():
        if name not in full:
            raise PatternError(f"there is no layer {name!r} to give rank {rank} to{near(str(name), full)}")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= full[name]:
            raise RuleError(f"rank {rank!r} for {name}: give a whole number from 1 to its full rank, {full[name]}")


class Truncation:
    """What `truncated_` did to a model, and how to change and to end it.

    Attributes:
        model: The model.
        targets: Where each truncated weight is used, by its layer's first name.
        skipped: Of every layer that is not truncated, why it was left alone.
    """

    def __init__(self, model: nn.Module, choice: Choice, cuts: "list[_Cut]", *, movable: bool) -> None:
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
            _require_finite(name, weight)
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
            _require_finite(name, weights[name])
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

    def _closed(self) -> "list[tuple[Target, _Cut]]":
        self._require_open()
        self._ended = True
        for cut in self._cuts.values():
            cut.eval()
        return [(self.targets[name], cut) for name, cut in self._cuts.items()]

    def _require_open(self) -> None:
        if self._ended:
            raise TrainingError("this truncation has ended already; call truncated_ again to start another")

    def _flatten(self, target: Target, cut: "_Cut") -> None:
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


def _require_finite(name: str, weight: Tensor) -> None:
    if not is_finite(weight):
        raise TrainingError(f"the weight of {name} became NaN or infinite; lower the learning rate or check the data")


def _original(layer: nn.Module) -> nn.Parameter:
    """The full weight of a truncated layer."""
    return layer.get_parameter("parametrizations.weight.original")


class _Cut(nn.Module):
    """W to W_D, computed once for every value that W takes.

    Attributes:
        sizes: Of the weight.
        basis: (groups, min(out, in), a quarter of that), where the next subspace starts; as many columns as the rank
            asks for, then zeros, so that its shape says nothing of the rank. Part of the state, so that a resumed run
            computes what an uninterrupted one would. Only training changes it.
        rank: D, a whole number (); part of the state.
    """

    basis: Tensor
    rank: Tensor

    def __init__(self, name: str, layer: nn.Module, *, rank: int, exact: bool, shrink: float) -> None:
        super().__init__()
        self._name, self.sizes = name, geometry(layer)
        self._exact, self._shrink = exact, shrink
        weight = layer.get_parameter("weight")
        side = min(self.sizes.out, self.sizes.width)
        self.register_buffer("rank", torch.tensor(rank, device=weight.device))
        self.register_buffer("basis", weight.new_zeros(self.sizes.groups, side, side // 4).detach())
        self._read = (rank, _version(self.rank))
        self._filled = (0, _version(self.basis))
        self._parts: list[Truncated] = []
        self._kept = weight.new_empty(0).detach()
        if not self.whole:
            self._take(self._decomposed(weight, rank, None), weight)
            self._remember(_bases(self._parts))
        # None until registered: registration counts as a write to the weight, and asks for W_D
        self._key: tuple[object, ...] | None = None
        self._bits: Tensor | None = None
        self._unsettled = False

    def extra_repr(self) -> str:
        """The rank, and how it is made."""
        return f"rank={self.present_rank()}, exact={self._exact}, shrink={self._shrink:g}"

    def present_rank(self) -> int:
        """D as a plain number, read again only when the buffer was written to, as by loading a state."""
        if self._read[1] != (now := _version(self.rank)):
            self._read = (int(self.rank), now)
        return self._read[0]

    @property
    def whole(self) -> bool:
        """Whether W_D is W."""
        return self.present_rank() == self.sizes.full_rank

    def seen(self, weight: Tensor) -> None:
        """Take what is cached as that of the weight as it now is."""
        self._key, self._bits, self._unsettled = self._key_of(weight), None, False

    def felt(self, weight: Tensor) -> None:
        """Take note of a backward pass: an optimiser may write to the weight now without counting it."""
        if self._bits is None:
            self._bits = _sum_of_bits(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """W_D, (out, in, ..), with the gradient passed to W unchanged."""
        if self.whole:
            return weight
        self._update(weight)
        if self.training and self._unsettled:
            # in eval mode the weight is left alone, and the basis too, so that evaluating has no effect on training
            with torch.inference_mode(mode=False), torch.no_grad():
                self._remember(_bases(self._parts))
                if self._shrink > 0:
                    weight.lerp_(self._kept, self._shrink)
            self.seen(weight)
        kept: Tensor = _StraightThrough.apply(weight, self._kept, self)
        return kept

    def factors(self, weight: Tensor) -> Factors:
        """(down, up) in float64, (groups, rank, in, *kernel) and (groups, out, rank)."""
        self._update(weight)
        up = torch.stack([algebra(part.left) for part in self._parts])
        down = torch.stack([algebra(part.right).mT for part in self._parts])
        return down.reshape(*down.shape[:2], self.sizes.into, *self.sizes.kernel), up

    def start_at(self, weight: Tensor, rank: int) -> Tensor:
        """The basis (groups, side, n) to start from at another rank: a part of the one there is, if that will do."""
        columns = self._columns()
        if rank == self.sizes.full_rank:
            return self.basis[..., :0].clone()
        if columns and rank <= self.present_rank():
            return self.basis[..., : columns - self.present_rank() + rank].clone()
        return _bases(self._decomposed(weight, rank, None))

    def move(self, rank: int, start: Tensor) -> None:
        """Truncate at another rank from now on."""
        with torch.inference_mode(mode=False), torch.no_grad():
            self.rank.fill_(rank)
            self._remember(start)

    def softened(self, weight: Tensor, amount: float) -> tuple[Tensor, int]:
        """W_D with its singular values lowered, like the weight, and how many are left."""
        rank = self.present_rank()
        parts = self._exactly(weight, rank) if self.whole else self._decomposed(weight, rank, self._basis())
        with torch.inference_mode(mode=False), torch.no_grad():
            lowered, most = [], 1
            for part in parts:
                # one of the two has orthonormal columns, the other orthogonal ones as long as the singular values
                values = torch.linalg.vector_norm(part.left.double(), dim=0) * torch.linalg.vector_norm(
                    part.right.double(), dim=0
                )
                left = (1 - amount / values.clamp(min=1e-300)).clamp(min=0)
                most = max(most, int((left > 0).sum()))
                lowered.append(replaced(part, left=part.left * left.to(part.left.dtype)))
            return _product(lowered, self.sizes).to(weight.dtype), most

    def _key_of(self, weight: Tensor) -> tuple[object, ...]:
        return *_version(weight), weight.dtype, weight.device, self.present_rank()

    def _update(self, weight: Tensor) -> None:
        same = self._key in (None, self._key_of(weight))
        if same and (self._bits is None or torch.equal(self._bits, _sum_of_bits(weight))):
            return
        self._take(self._decomposed(weight, self.present_rank(), self._basis()), weight)
        self._key, self._bits, self._unsettled = self._key_of(weight), None, True

    def _take(self, parts: list[Truncated], weight: Tensor) -> None:
        self._parts, self._kept = parts, _product(parts, self.sizes).to(weight.dtype)

    def _columns(self) -> int:
        """How many columns of the basis are in use."""
        if self._filled[1] != (now := _version(self.basis)):
            self._filled = (int((self.basis[:1] != 0).any(dim=1).sum()), now)
        return self._filled[0]

    def _basis(self) -> Tensor:
        return self.basis[..., : self._columns()]

    def _remember(self, start: Tensor) -> None:
        columns = start.shape[2]
        if columns != self._columns():
            self.basis.zero_()
        self.basis[..., :columns] = start
        self._filled = (columns, _version(self.basis))

    def _exactly(self, weight: Tensor, rank: int) -> list[Truncated]:
        return self._checked(weight, lambda groups: [truncate_exactly(W, rank) for W in groups])

    def _decomposed(self, weight: Tensor, rank: int, basis: Tensor | None) -> list[Truncated]:
        if self._exact:
            return self._exactly(weight, rank)
        starts = [None] * self.sizes.groups if basis is None else list(basis)

        def from_basis(groups: Tensor) -> list[Truncated]:
            return [
                truncate(W, rank, basis=None if V is None else V.to(W.dtype))
                for W, V in zip(groups, starts, strict=True)
            ]

        return self._checked(weight, from_basis)

    def _checked(self, weight: Tensor, decompose: Callable[[Tensor], list[Truncated]]) -> list[Truncated]:
        # mixed precision would take the products in half of it, and what inference mode makes cannot be trained with
        off = torch.autocast(weight.device.type, enabled=False)
        with torch.inference_mode(mode=False), torch.no_grad(), off:
            kind = weight.dtype if weight.dtype == torch.float64 else torch.float32
            groups = as_kernels(weight.detach(), self.sizes).flatten(2).to(kind)
            try:
                return decompose(groups)
            except ModelError as error:
                raise TrainingError(f"{self._name}: {error}; lower the learning rate or check the data") from error


def _sum_of_bits(weight: Tensor) -> Tensor:
    """Another number whenever a training step has changed the weight, but for one chance in millions."""
    size = weight.element_size()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    # overflow does no harm, and a wider sum takes twenty times as long
    return weight.detach().view(whole).sum(dtype=torch.int64 if size == 8 else torch.int32)


def _version(tensor: Tensor) -> tuple[int, int]:
    """Changes whenever the tensor is written to or another takes its place."""
    return tensor._version, tensor.data_ptr()


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
    def forward(ctx: Any, weight: Tensor, kept: Tensor, cut: _Cut) -> Tensor:
        ctx.weight, ctx.cut = weight, cut
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.cut.felt(ctx.weight)
        return gradients[0], None, None
