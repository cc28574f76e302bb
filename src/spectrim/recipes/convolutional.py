"""The studies of convolutional networks, and that of the mini-ResNet: energies, budgets, ranks by layer."""

import math
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from spectrim.analysis.spectra import Analysis, LayerAnalysis, analyze
from spectrim.compression import Compressed, compress
from spectrim.core.execution import ProgressCallback, evaluating
from spectrim.core.plans import Budget, Energy, LayerPlan, Metric, Plan
from spectrim.layers.forms import selected_forms
from spectrim.layers.replacement import duplicate, factored_at, own_bias, replace
from spectrim.linalg import Spectrum
from spectrim.models import mini_resnet
from spectrim.planning.decisions import PlanOptions, dense, factored, why_impossible
from spectrim.planning.rules import plan, require_possible
from spectrim.recipes.images import Augment, Images, Split
from spectrim.recipes.seed import Candidate, Network, SeedRun
from spectrim.recipes.study import Study, Task, Tuned
from spectrim.reporting import Variant
from spectrim.runtimes.sessions import RuntimeName

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
    ranks = {layer.name: _suggested_rank(layer, threshold) for layer in analysis if _has_smaller_rank(layer)}
    return _plan(analysis, ranks, rule=None, because=MEANING[threshold])


def held_out_plan(
    model: nn.Module,
    analysis: Analysis,
    images: Split,
    *,
    share: float,
    on_progress: ProgressCallback = lambda note, done, of: None,
) -> Plan:
    """Every layer at the smallest rank whose harm stays below one threshold, chosen for `share` of the parameters.

    Each layer is factored alone at ranks 1, 2, 3, 4, 6, 8, .. up to its break-even; its harm is what that adds to the
    cross-entropy on held-out training `images`. This is the sensitivity scan that Han et al. (2015) choose their
    pruning thresholds by, with truncation in the place of pruning. The threshold is the smallest one at which the
    network has at most `share` of its parameters; where none is small enough, every layer is at rank 1. `analysis` is
    of the dense `model` in the plain metric; `on_progress` is called with the networks scored so far, and of how many.
    """
    tried = [(layer, rank) for layer in analysis if _has_smaller_rank(layer) for rank in _candidate_ranks(layer)]
    dense_loss = _loss(model, images)
    harms: dict[str, dict[int, float]] = {}
    for done, (layer, rank) in enumerate(tried):
        on_progress("scanning the layers", done, len(tried))
        small, form, names = duplicate(model), layer.forms[0], layer.names
        factors = layer.decomposition(form, "plain").factors((rank,))
        replace(small, factored_at(small, names, form=form, factors=factors, bias=own_bias))
        harms.setdefault(layer.name, {})[rank] = _loss(small, images) - dense_loss
    total = analysis.whole.params
    for threshold in sorted({harm for by_rank in harms.values() for harm in by_rank.values()}):
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


def _has_smaller_rank(layer: LayerAnalysis) -> bool:
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
    spectra = [(analysis[layer.name].spectra["plain"], layer.rank) for layer in layers if layer.rank is not None]
    least = min((float(spectrum.cumulative_energy[rank - 1]) for spectrum, rank in spectra), default=1.0)
    return Plan(rule=rule or Energy(min(1.0, max(1e-9, least))), metric="plain", layers=layers)


def _decided(layer: LayerAnalysis, rank: int | None, *, because: str) -> LayerPlan:
    if not _has_smaller_rank(layer):
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
        sums = [float(functional.cross_entropy(model(x), y, reduction="sum")) for x, y in images.batches()]
    return sum(sums) / len(images)


ConvolutionForm = Literal["channel", "spatial", "tucker2"]


class ConvolutionalStudy(Study, ABC):
    """A study of a convolutional network; `augmentation` varies the training images, `tuning` trains the whole network.

    Compression on data takes so many `calibration_images` of the training images, without labels.
    """

    augmentation: Augment = Augment()
    calibration_images: int = Field(ge=1)
    tuning: Tuned
    runtimes: tuple[RuntimeName, ...] = ()

    def view(self) -> tuple[Augment, int | None]:
        """Varied as the settings say."""
        return self.augmentation, None

    def _shortened(self) -> Mapping[str, object]:
        return {
            "limit": min(self.limit or 1000, 1000),
            "held_out": min(self.held_out, 500),
            "calibration_images": min(self.calibration_images, 64),
            "tuning": self.tuning.in_small_steps(1),
        }

    def under_budget(
        self, run: SeedRun, rule: Budget, *, metric: Metric, forms: Sequence[str] | None = None, multiple: int = 1
    ) -> Compressed:
        """The dense network under a budget of all layers, on calibration images unless the metric is plain."""
        return compress(
            run.dense,
            rule,
            example_inputs=run.example,
            data=None if metric == "plain" else run.calibration(self.calibration_images),
            metric=metric,
            forms=forms,
            rank_multiple=multiple,
            on_progress=run.progress.update,
        )


class MiniResNetStudy(ConvolutionalStudy):
    """Every Linear and convolution of a mini-ResNet factored, with ranks from three methods, and fine-tuned.

    Attributes:
        width: Channels of the network's first stage.
        hidden: Outputs of its hidden dense layer.
        energies: As published: each of these shares of the energy of every layer, plain SVD.
        energy_form: Of the convolutions under an energy.
        allow_growth: Factor a layer under an energy even where that makes it larger; off leaves it dense.
        energy_tuning: Fine-tuning of these.
        budgets: Shares of the parameters, one budget for all layers: forms and ranks chosen together.
        budget_metric: `activation` or `loss`.
        thresholds: Ranks that each layer chooses itself; `held-out` has as many parameters as the first budget.
        threshold_images: Held-out training images for the last of these.
    """

    kind: Literal["mini-resnet"] = "mini-resnet"
    width: int = Field(default=32, ge=1)
    hidden: int = Field(default=512, ge=1)
    energies: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.5, 0.75, 0.9)
    energy_form: ConvolutionForm = "channel"
    allow_growth: bool = False
    energy_tuning: Tuned
    budgets: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(min_length=1)
    budget_metric: Literal["activation", "loss"] = "activation"
    thresholds: tuple[Threshold, ...] = ()
    threshold_images: int = Field(default=512, ge=1)

    def tasks(self) -> Sequence[Task]:
        """By energies, by budgets and by thresholds, each as compressed and fine-tuned."""
        return [
            *(partial(self._by_energy, share=share) for share in self.energies),
            *(partial(self._by_budget, share=share) for share in self.budgets),
            *(partial(self._by_threshold, threshold=threshold) for threshold in self.thresholds),
        ]

    def dense_network(self, images: Images) -> nn.Module:
        """The mini-ResNet of these sizes."""
        return mini_resnet(len(images.names), images.train.images.shape[1], width=self.width, hidden=self.hidden)

    def network_settings(self) -> Mapping[str, object]:
        """Its sizes."""
        return {"kind": "mini_resnet", "width": self.width, "hidden": self.hidden}

    def require_possible(self, model: nn.Module, example: Tensor) -> None:
        """Every budget can be reached."""
        analysis = analyze(model, example)
        for share in self.budgets:
            require_possible(analysis, Budget(params=share), PlanOptions(), metric=self.budget_metric)

    def _shortened(self) -> Mapping[str, object]:
        return {
            **super()._shortened(),
            "dense": self.dense.in_small_steps(4),
            "energies": self.energies[len(self.energies) // 2 :][:1],
            "budgets": self.budgets[:1],
            "energy_tuning": self.energy_tuning.in_small_steps(1),
            "threshold_images": min(self.threshold_images, 50),
        }

    def _by_energy(self, run: SeedRun, *, share: float) -> Iterator[Network]:
        energy, form, growth = Energy(share), self.energy_form, self.allow_growth

        def make() -> Compressed:
            return run.compressed_by(plan(run.analysis, energy, forms=(form,), allow_growth=growth))

        candidate = Candidate(run, f"{100 * share:g} % energy", energy, "plain")
        return candidate.networks(make, self.energy_tuning, energy=share, form=form, growth=growth)

    def _by_budget(self, run: SeedRun, *, share: float) -> Iterator[Network]:
        budget, metric, images = Budget(params=share), self.budget_metric, self.calibration_images
        # without forms that save no time, which is measured as well
        make = partial(self.under_budget, run, budget, metric=metric, forms=selected_forms(None, for_size=False))
        candidate = Candidate(run, f"budget, {100 * share:g} % of the parameters", budget, metric)
        return candidate.networks(make, self.tuning, budget=share, metric=metric, images=images)

    def _by_threshold(self, run: SeedRun, *, threshold: Threshold) -> Iterator[Network]:
        share, images = self.budgets[0], self.threshold_images

        def make() -> Compressed:
            if threshold != "held-out":
                return run.compressed_by(spectral_plan(run.analysis, threshold))
            held_out = run.images.held_out.sample(images, seed=0)
            progress = run.progress.update
            decided = held_out_plan(run.dense, run.analysis, held_out, share=share, on_progress=progress)
            return run.compressed_by(decided)

        rule = Budget(params=share) if threshold == "held-out" else None
        candidate = Candidate(run, MEANING[threshold], rule, "plain")
        return candidate.networks(make, self.tuning, threshold=threshold, share=share, images=images)

    def remark(self, images: Images, dense: nn.Module, variants: Sequence[Variant]) -> str:
        """How many layers an energy leaves dense, since its factors would be larger than they are."""
        plans = [(variant.rule, variant.plan) for variant in variants if variant.plan and variant.stage == "zero-shot"]
        counts = [
            f"{len(decided) - len(decided.factored)} of {len(decided)} at {100 * rule.energy:g} %"
            for rule, decided in plans
            if isinstance(rule, Energy)
        ]
        if self.allow_growth or not counts:
            return ""
        return (
            f"Layers that one energy for all leaves dense, because their factors would be larger: {', '.join(counts)}."
        )
