"""Ranks chosen for each layer by itself: from its singular values alone, or from a scan on held-out images."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from torch import nn
from torch.nn import functional

from spectrim.analysis.spectra import Analysis, LayerAnalysis
from spectrim.core.execution import evaluating
from spectrim.core.plans import Budget, Energy, LayerPlan, Plan
from spectrim.layers.replacement import duplicate, factored_at, own_bias, replace
from spectrim.linalg import Spectrum
from spectrim.planning.decisions import dense, factored, why_impossible
from spectrim.recipes.images import Split

Threshold = Literal["gap", "hard", "effective-rank", "held-out"]

MEANING: Mapping[Threshold, str] = {
    "gap": "largest spectral gap",
    "hard": "optimal hard threshold",
    "effective-rank": "effective rank",
    "held-out": "per-layer energy, held-out",
}
"""Their names in tables."""


def gap_rank(spectrum: Spectrum) -> int:
    """The rank after which the values drop most, as a ratio, within the first half of them.

    The eigenvalue-ratio estimator of Ahn & Horenstein (2013), whose upper limit keeps it from the noise at the end.
    """
    values = spectrum.values
    most = max(1, len(values) // 2)
    following = np.maximum(values[1 : most + 1], np.finfo(float).tiny)
    return 1 + int(np.argmax(values[: len(following)] / following)) if len(following) else 1


def hard_rank(spectrum: Spectrum, *, outputs: int, inputs: int) -> int:
    """How many values stand above the noise of a matrix: omega(beta) times their median (Gavish & Donoho 2014)."""
    beta = min(outputs, inputs) / max(outputs, inputs)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return max(1, int((spectrum.values > omega * np.median(spectrum.values)).sum()))


def effective_rank(spectrum: Spectrum) -> int:
    """The exponential of the entropy of the values, rounded up (Roy & Vetterli 2007)."""
    return max(1, min(len(spectrum), math.ceil(spectrum.effective_rank)))


def spectral_plan(analysis: Analysis, threshold: Threshold) -> Plan:
    """Every layer at the rank that its own singular values suggest; one that would grow stays dense.

    The plan's rule is the energy that every factored layer holds at least: these rules ask for no common share.
    """
    ranks = {layer.name: _suggested_rank(layer, threshold) for layer in analysis if _can_shrink(layer)}
    return _plan(analysis, ranks, rule=None, because=MEANING[threshold])


def held_out_plan(
    model: nn.Module,
    analysis: Analysis,
    images: Split,
    *,
    share: float,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Plan:
    """Every layer at the smallest rank whose harm stays below one threshold, chosen for `share` of the parameters.

    Each layer is factored alone at ranks 1, 2, 3, 4, 6, 8, .. up to its break-even; its harm is what that adds to the
    cross-entropy on `images`. This is the sensitivity scan that Han et al. (2015) choose their pruning thresholds by,
    with truncation in the place of pruning. The threshold is the smallest one at which the whole network has at most
    `share` of its parameters; where none is small enough, every layer is at rank 1.

    `analysis` is of the dense `model` in the plain metric, and `images` are held-out training images. `on_progress` is
    called with the networks scored so far, and of how many.
    """
    tried = [(layer, rank) for layer in analysis if _can_shrink(layer) for rank in _candidate_ranks(layer)]
    dense_loss = _loss(model, images)
    harms: dict[str, dict[int, float]] = {}
    for done, (layer, rank) in enumerate(tried):
        on_progress(done, len(tried))
        small, form, names = duplicate(model), layer.forms[0], layer.names
        factors = layer.decomposition(form, "plain").factors((rank,))
        replace(small, factored_at(small, names, form=form, factors=factors, bias=own_bias))
        harms.setdefault(layer.name, {})[rank] = _loss(small, images) - dense_loss
    total = analysis.whole.params
    thresholds = sorted({harm for by_rank in harms.values() for harm in by_rank.values()})
    for threshold in thresholds:
        ranks = {
            name: min(allowed)
            for name, by_rank in harms.items()
            if (allowed := [rank for rank, harm in by_rank.items() if harm <= threshold])
        }
        saved = sum(
            layer.dense.params - layer.cost(layer.forms[0], (ranks[layer.name],), "plain").params
            for layer in analysis
            if layer.name in ranks
        )
        if total - saved <= share * total:
            break
    because = f"the smallest that adds at most {max(threshold, 0.0):.3g} to the held-out cross-entropy"
    return _plan(analysis, ranks, rule=Budget(params=share), because=because)


def _can_shrink(layer: LayerAnalysis) -> bool:
    return why_impossible(layer, "plain") is None and layer.break_even(layer.forms[0], "plain") > 0


def _candidate_ranks(layer: LayerAnalysis) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, .. up to the break-even rank."""
    most = layer.break_even(layer.forms[0], "plain")
    steps = {1, 2, 3, *(power * 2**at for at in range(2, 12) for power in (1, 1.5))}
    return sorted(int(step) for step in steps if step <= most)


def _suggested_rank(layer: LayerAnalysis, threshold: Threshold) -> int:
    spectrum = layer.spectra["plain"]
    if threshold == "hard":
        return hard_rank(spectrum, outputs=layer.shape[0], inputs=math.prod(layer.shape[1:]))
    return gap_rank(spectrum) if threshold == "gap" else effective_rank(spectrum)


def _plan(analysis: Analysis, ranks: Mapping[str, int], *, rule: Budget | None, because: str) -> Plan:
    layers = tuple(_decided(layer, ranks.get(layer.name), because=because) for layer in analysis)
    energies = [
        float(analysis[layer.name].spectra["plain"].cumulative_energy[layer.rank - 1])
        for layer in layers
        if layer.rank is not None
    ]
    return Plan(rule=rule or Energy(max(1e-9, min([1.0, *energies]))), metric="plain", layers=layers)


def _decided(layer: LayerAnalysis, rank: int | None, *, because: str) -> LayerPlan:
    if not _can_shrink(layer):
        reason = why_impossible(layer, "plain") or "it would not be smaller at any rank"
    elif rank is None:
        reason = f"no rank below break-even is {because}"
    elif not layer.shrinks(layer.cost(layer.forms[0], (rank,), "plain")):
        limit = layer.break_even(layer.forms[0], "plain")
        reason = f"rank {rank} ({because}) would not be smaller; it shrinks only up to rank {limit} (break-even)"
    else:
        return factored(layer, layer.forms[0], (rank,), metric="plain", reason=because)
    return dense(layer, reason=reason, metric="plain")


def _loss(model: nn.Module, images: Split) -> float:
    with evaluating(model):
        sums = [
            float(functional.cross_entropy(model(inputs), labels, reduction="sum"))
            for inputs, labels in images.batches()
        ]
    return sum(sums) / len(images)
