"""The studies of convolutional networks, and that of the mini-ResNet: energies, budgets, thresholds of each layer."""

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from spectrim.analysis.spectra import analyze
from spectrim.compression import Compressed, compress
from spectrim.core.plans import Budget, Energy, Metric
from spectrim.models import mini_resnet
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.rules import plan, require_possible
from spectrim.recipes.images import Augment, Images
from spectrim.recipes.seed import Candidate, Network, SeedRun
from spectrim.recipes.study import Study, Task, Tuned
from spectrim.recipes.thresholds import MEANING, Threshold, held_out_plan, spectral_plan
from spectrim.reporting import Variant
from spectrim.runtimes.sessions import RuntimeName

ConvolutionForm = Literal["channel", "spatial", "tucker2"]


class ConvolutionalStudy(Study, ABC):
    """A study of a convolutional network.

    Attributes:
        augmentation: How training images are varied.
        calibration_images: Training images for compression on data, without labels.
        tuning: Fine-tuning of the whole network.
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
            on_progress=lambda note, done, of: run.progress.update(done, of=of, note=note),
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
        channels = images.train.images.shape[1]
        return mini_resnet(len(images.names), channels, width=self.width, hidden=self.hidden)

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
        make = partial(self.under_budget, run, budget, metric=metric)
        candidate = Candidate(run, f"budget, {100 * share:g} % of the parameters", budget, metric)
        return candidate.networks(make, self.tuning, budget=share, metric=metric, images=images)

    def _by_threshold(self, run: SeedRun, *, threshold: Threshold) -> Iterator[Network]:
        share, images = self.budgets[0], self.threshold_images

        def on_progress(done: int, of: int) -> None:
            run.progress.update(done, of=of, note="scanning the layers")

        def make() -> Compressed:
            if threshold != "held-out":
                return run.compressed_by(spectral_plan(run.analysis, threshold))
            held_out = run.images.held_out.sample(images, seed=0)
            scanned = held_out_plan(run.dense, run.analysis, held_out, share=share, on_progress=on_progress)
            return run.compressed_by(scanned)

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
