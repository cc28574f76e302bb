"""What is looked at before a compressed network is given back: its outputs and its cost against what they should be."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from spectrim.analysis.sensitivities import subset
from spectrim.analysis.spectra import Analysis
from spectrim.core.display import Displayed
from spectrim.core.errors import ModelError, warn
from spectrim.core.execution import Inputs, call, evaluating
from spectrim.core.files import Frozen
from spectrim.core.nested import describe, fractions, logits_of, tensors
from spectrim.core.plans import Budget, Plan
from spectrim.layers.cost import NetworkCost
from spectrim.layers.replacement import duplicate, factorize
from spectrim.layers.tokens import TokenMasks, TokenPlaces

_WORSE, _NEAR, _FAR = 1.2, 0.02, 0.9
_UNIT, _SURE = 1e-2, 0.9
_FURTHER, _LARGE = 3.0, 0.3
_LITTLE_AGREEMENT = 0.5
_ROWS = 256
_ROUNDING = 1e-12
_CLEARLY_OFF, _OVER_BUDGET = 1e-3, 5e-3
SAMPLES, _PLACES = 128, 512


class Fidelity(Displayed, Frozen):
    """How near a compressed network's outputs are to those of the dense one, on the same inputs.

    Attributes:
        relative_error: Norm of the differences over the norm of the dense outputs around their mean over the samples:
            1 is as far off as that mean; below 0.05 a classifier has usually lost nothing.
        agreement: Of scores (batch, classes) the share of samples with the same largest one; None for other outputs.
        samples: How many samples were looked at.
        held_out: Whether they were kept aside; if not, weights may have been fitted to these very samples.
        predicted: The relative error that the plan's losses and sensitivities add up to, before weights are fitted
            anew; None where no sensitivities were measured.
        plain: The same of a network with the same forms and ranks, whose weights are approximated by themselves;
            None if no other metric was used, or where a weight is so wide that this would take as long again.
    """

    relative_error: float = Field(ge=0)
    agreement: float | None = None
    samples: int
    held_out: bool = False
    predicted: float | None = None
    plain: "Fidelity | None" = None

    def __str__(self) -> str:
        """One or two sentences, for people."""
        seen = "kept aside" if self.held_out else "that the network was fitted to, so that others are further off"
        text = f"Outputs on {self.samples} calibration samples {seen}: {self.relative_error:.1%} off the dense ones"
        text += "" if self.predicted is None else f", {self.predicted:.1%} predicted"
        text += "." if self.agreement is None else f"; the largest output is the same for {self.agreement:.1%}."
        return text if self.plain is None else f"{text} Without data: {self.plain.relative_error:.1%} off."


def measured_fidelity(
    model: nn.Module, small: nn.Module, batches: Sequence[Inputs], *, plan: Plan, analysis: Analysis, held_out: bool
) -> Fidelity | None:
    """Compare a compressed network on up to 128 samples, in an order of their own; see `fidelity`.

    Warns if weights approximated by themselves, without the data, come nearer to the dense network, or if it is much
    further away than the plan says.
    """
    layers = tuple(layer.model_copy(update={"metric": "plain"}) if layer.is_factored else layer for layer in plan)
    plain = None
    wide = any(analysis[layer.name].problems["plain"].is_wide for layer in plan.factored)
    if not wide and any(layer.metric != "plain" for layer in plan.factored):
        plain = factorize(duplicate(model), plan.model_copy(update={"layers": layers}), factors=analysis.factors)
    used = [part for batch in subset(model, batches, samples=SAMPLES) for part in batch.parts(places=_PLACES)]
    measured = fidelity(model, small, used, plain=plain, predicted=_predicted_square(plan, analysis))
    if measured is None:
        return None
    _warn_if_useless(measured)
    rounding = max((torch.finfo(own.dtype).eps for own in small.parameters() if own.is_floating_point()), default=0.0)
    _warn_if_worse_with_data(measured, near=max(_NEAR, 8 * rounding))
    _warn_if_worse_than_predicted(measured)
    others = measured.plain and measured.plain.model_copy(update={"held_out": held_out})
    return measured.model_copy(update={"held_out": held_out, "plain": others})


def _predicted_square(plan: Plan, analysis: Analysis) -> float | None:
    """The mean squared error of the outputs' entries that the plan's losses add up to."""
    if not analysis.sensitivity or any(layer.predicted_error is None for layer in plan.factored):
        return None
    each = ((layer, analysis.sensitivity_of(layer.name, layer.form) or 0.0) for layer in plan.factored)
    return sum((layer.predicted_error or 0.0) ** 2 * sensitivity for layer, sensitivity in each)


def fidelity(
    model: nn.Module,
    small: nn.Module,
    batches: Iterable[Inputs],
    *,
    plain: nn.Module | None = None,
    predicted: float | None = None,
) -> Fidelity | None:
    """Compare two networks with the dense one, in evaluation mode.

    None where shapes of outputs depend on values, or where the dense outputs do not vary.

    Args:
        model: The dense network.
        small: The compressed one.
        batches: What they are run on.
        plain: Another one, for `Fidelity.plain`.
        predicted: The mean squared error of the outputs' entries that is expected, for `Fidelity.predicted`.

    Raises:
        ModelError: outputs of `small` that are not finite where those of `model` are, or of another type.
    """
    networks = [network for network in (small, plain) if network is not None]
    sums, samples = _Sums(len(networks)), 0
    for position, batch in enumerate(batches):
        samples += batch.samples
        dense = _outputs(model, batch, position)
        others = [_outputs(network, batch, position) for network in networks]
        require_sound(dense, others[0])
        sums.add(dense, others, TokenMasks.of(model, batch))
    energy, total = sums.energy, sums.total
    if not _ROUNDING * total < energy < float("inf"):
        return None
    compared = []
    for lost, same in zip(sums.lost, sums.same, strict=True):
        if lost is None:
            return None
        agreement = None if same is None else same / sums.scored
        compared.append(Fidelity(relative_error=math.sqrt(lost / energy), agreement=agreement, samples=samples))
    expected = None if predicted is None else (predicted * sums.entries / energy) ** 0.5
    return compared[0].model_copy(update={"plain": compared[1] if plain else None, "predicted": expected})


def require_sound(dense: Any, small: Any) -> None:
    """Raise `ModelError` for outputs of another type than the dense network's, or not finite where those are.

    Of a tensor that holds infinite values in the dense network, as masked scores do, others may be infinite.
    """
    kinds = [{tensor.dtype for tensor in tensors(outputs)} for outputs in (dense, small)]
    if type(dense) is not type(small) or kinds[0] != kinds[1]:
        raise ModelError(
            f"the compressed network gives {describe(small)} where the dense one gives {describe(dense)}; it looks at "
            "more of its layers than their outputs. Leave them out (exclude=..)"
        )
    if any(_is_broken(*pair) for pair in zip(fractions(dense), fractions(small), strict=False)):
        raise ModelError(
            "the compressed network's outputs are NaN or infinite, and the dense one's are not; in half precision "
            "convert the model to float32 first"
        )


def _is_broken(dense: Tensor, small: Tensor) -> bool:
    if torch.isfinite(small).all():
        return False
    new = small.isnan() & ~dense.isnan() if dense.shape == small.shape else small.isnan() & ~dense.isnan().any()
    return bool(new.any() or (small.isinf().any() and not dense.isinf().any()))


_DEVIATIONS = {
    "macs": "multiplies {:,} times, and {:,} were planned: it does something with its layers besides calling them, or "
    "how much it works depends on values",
    "params": "has {:,} parameters, and {:,} were planned: layers share some that the plan takes for their own",
    "bytes": "takes {:,} bytes in a file, and {:,} were planned: its tensors are of other types than the layers' "
    "weights, or layers share some that the plan takes for their own",
}
"""What to say of more than was planned, by cost."""


def require_planned_cost(plan: Plan, dense: NetworkCost, measured: NetworkCost) -> None:
    """Hold the counted cost against the plan's; warns of a plan by which no layer can be factored.

    Of bytes a plan says only what they are limited to. MACs that cannot be counted are not looked at.

    Warns if the network multiplies more, or has more parameters, than the plan says.

    Raises:
        ModelError: so much more that a budget of MACs, parameters or bytes is missed.
    """
    if plan.layers and all(layer.frozen for layer in plan):
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in plan.layers[:3])
        warn(f"no layer of this network can be factored, and it stays as it is. {reasons}")
    for cost, deviation in _DEVIATIONS.items():
        before, after = getattr(dense, cost), getattr(measured, cost)
        share = getattr(plan.rule, cost) if isinstance(plan.rule, Budget) else None
        if cost == "bytes":
            planned = after if share is None else int(before * share)
        else:
            planned = before - sum(getattr(layer.dense, cost) - getattr(layer.kept, cost) for layer in plan)
            if share is not None and isinstance(plan.rule, Budget) and plan.rule.of:
                share = planned / before
        if after <= planned * (1 + _CLEARLY_OFF) or (cost == "macs" and dense.uncounted_weights):
            continue
        message = f"the compressed network {deviation.format(after, planned)}"
        if share is not None and after > before * (share + _OVER_BUDGET):
            raise ModelError(f"{message}. Limit another of macs=, params=, bytes= or latency=, or leave layers out")
        warn(message)


def _warn_if_useless(measured: Fidelity) -> None:
    """Warn of a network that is hardly nearer to the dense one than a constant, or mostly answers otherwise."""
    if measured.relative_error <= _FAR and (measured.agreement is None or measured.agreement >= _LITTLE_AGREEMENT):
        return
    same = "" if measured.agreement is None else f", and the same largest output for {measured.agreement:.0%}"
    warn(
        f"little is left of the network: its outputs are {measured.relative_error:.0%} off the dense one's{same} of "
        f"{measured.samples} samples. Give a larger budget or rank, or fine-tune it (st.finetune)"
    )


def _warn_if_worse_than_predicted(measured: Fidelity) -> None:
    """Warn of a network that is much further from the dense one than its plan says."""
    expected = measured.predicted
    if expected is None or measured.relative_error <= max(_LARGE, _FURTHER * expected):
        return
    warn(
        f"the compressed network is {measured.relative_error:.3g} off (relative error) where its plan promises "
        f"{expected:.3g}. Likely reasons: the budget is too small for this network, errors that grow from layer to "
        "layer, or layers that pass more than their outputs on. Give a larger budget, or leave layers out (exclude=..)"
    )


def _warn_if_worse_with_data(measured: Fidelity, *, near: float) -> None:
    """Warn if weights approximated by themselves, without the data, come nearer to the dense network on these data."""
    plain = measured.plain
    if plain is None or plain.relative_error > _FAR:  # nothing is left of the network either way
        return
    if measured.relative_error <= max(near, _WORSE * plain.relative_error):
        return
    warn(
        f"on the calibration data the compressed network is {measured.relative_error:.3g} off (relative error), and "
        f"{plain.relative_error:.3g} without these data. Likely reasons: they are few or unlike each other, layers "
        "pass more than their outputs on, or some work outside of what gradients reach. Compare metric='activation', "
        "reconstruct=False, or no data"
    )


def _outputs(model: nn.Module, batch: Inputs, position: int) -> Any:
    with evaluating(model):
        return call(model, batch, what=f"batch {position}")


class _Sums:
    """What is added up over batches, in float64 and a few rows at a time, so that no outputs need be kept.

    Attributes:
        lost: By network the squared differences to the dense outputs; None for outputs of other shapes.
        same: By network how many scores have the same largest one; None for other outputs.
        scored: How many scores there are.
        total: Squares of the dense outputs.
        entries: How many there are.
    """

    def __init__(self, networks: int) -> None:
        self.lost: list[float | None] = [0.0] * networks
        self.same: list[int | None] = [0] * networks
        self.scored = self.entries = 0
        self.total = 0.0
        self._shapes: set[tuple[torch.Size, ...]] = set()
        self._columns: list[_Columns] = []

    @property
    def energy(self) -> float:
        """Squares of the dense outputs around their mean over the rows; 0 where shapes depend on values."""
        return sum(column.energy for column in self._columns) if len(self._shapes) == 1 else 0.0

    def add(self, dense: Any, others: Sequence[Any], masks: TokenMasks) -> None:
        rows = _rows(dense, masks)
        self._shapes.add(tuple(tensor.shape[1:] for tensor in rows))
        if not rows or len(self._shapes) > 1:
            return
        self._columns = self._columns or [_Columns(tensor) for tensor in rows]
        self.entries += sum(tensor.numel() for tensor in rows)
        for column, tensor in zip(self._columns, rows, strict=True):
            for part in tensor.split(_ROWS):
                column.add(part.double())
                self.total += _squares(part.double())
        scores = logits_of(dense)
        self.scored += len(scores) if _are_scores(scores) else 0
        for position, outputs in enumerate(others):
            self._compare(position, rows, _rows(outputs, masks))
            self._count(position, scores, logits_of(outputs))

    def _compare(self, position: int, dense: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        lost = self.lost[position]
        if lost is None or [tensor.shape for tensor in dense] != [tensor.shape for tensor in rows]:
            self.lost[position] = None
            return
        parts = (zip(a.split(_ROWS), b.split(_ROWS), strict=True) for a, b in zip(dense, rows, strict=True))
        self.lost[position] = lost + sum(_squares(a.double() - b.double()) for pairs in parts for a, b in pairs)

    def _count(self, position: int, dense: Any, scores: Any) -> None:
        same = self.same[position]
        if same is None or not (_are_scores(dense) and _are_scores(scores) and len(dense) == len(scores)):
            self.same[position] = None
            return
        self.same[position] = same + int((dense.argmax(dim=1) == scores.argmax(dim=1)).sum())


class _Columns:
    """Squares of a tensor's rows around their mean; entries that are ever NaN or infinite count as zero."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = 0
        self.sums, self.squares = (rows.new_zeros(rows.shape[1:], dtype=torch.float64) for _ in range(2))

    def add(self, rows: Tensor) -> None:
        self.rows += len(rows)
        self.sums += rows.sum(dim=0)
        self.squares += rows.square().sum(dim=0)

    @property
    def energy(self) -> float:
        varying = self.squares - self.sums.square() / max(1, self.rows)
        return float(varying.nan_to_num(0.0, 0.0, 0.0).clamp(min=0).sum())


def _squares(values: Tensor) -> float:
    return float(values.nan_to_num(0.0, 0.0, 0.0).square().sum())


def _rows(outputs: Any, masks: TokenMasks) -> list[Tensor]:
    """Each tensor of the outputs; of sequences whose tokens are known, these."""
    return [torch.atleast_1d(tensor.detach()) for tensor in masks.mapped(outputs, TokenPlaces.take)]


def _are_scores(outputs: Any) -> bool:
    """Whether the largest of each row may say something: not of embeddings, which have a norm of 1."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2 or outputs.is_complex():
        return False
    values = outputs.double()
    unlike = (torch.linalg.vector_norm(values, dim=1) - 1).abs() > _UNIT
    return bool(unlike.any() or (values.abs().amax(dim=1) > _SURE).all())  # probabilities of 1 have that norm as well
