"""The mini-ResNet: one energy for every layer, one budget for all of them, and thresholds a layer chooses itself."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from spectrim.analysis.spectra import Analysis, analyze
from spectrim.compression import compress
from spectrim.core.plans import Budget, Energy, FormName, Metric, Plan, Rule
from spectrim.models import mini_resnet
from spectrim.planning.rules import plan, require_possible
from spectrim.recipes.images import Augment, Images, Part
from spectrim.recipes.outcome import Network, SeedOutcome
from spectrim.recipes.parts import Made
from spectrim.recipes.study import SeedRun, Study
from spectrim.recipes.thresholds import MEANING, Threshold, held_out_plan, spectral_plan
from spectrim.recipes.tuning import Smaller, Tuned
from spectrim.reporting import Variant, spectra_of
from spectrim.runtimes.sessions import RuntimeName

Share = Annotated[float, Field(gt=0, lt=1)]


class MiniResNetStudy(Study):
    """Every Linear and convolution of a mini-ResNet factored, in three ways side by side, and fine-tuned.

    Attributes:
        width: Channels of the network's first stage.
        hidden: Outputs of its hidden dense layer.
        augmentation: How training images are varied.
        energies: As published: each of these shares of the energy of every layer, plain SVD.
        energy_form: Of the convolutions under an energy.
        allow_growth: Factor a layer under an energy even where that makes it larger; off leaves it dense.
        energy_tuning: Fine-tuning of these.
        budgets: Shares of the parameters, one budget for all layers: forms and ranks chosen together.
        budget_metric: `activation` or `loss`.
        calibration_images: Training images for that, without labels.
        thresholds: Ranks that each layer chooses itself; `held-out` has as many parameters as the first budget.
        threshold_images: Held-out training images for the last of these.
        tuning: Fine-tuning of budgets and thresholds.
    """

    kind: Literal["mini-resnet"] = "mini-resnet"
    width: int = Field(default=32, ge=1)
    hidden: int = Field(default=512, ge=1)
    augmentation: Augment = Augment()
    energies: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.5, 0.75, 0.9)
    energy_form: Literal["channel", "spatial", "tucker2"] = "channel"
    allow_growth: bool = False
    energy_tuning: Tuned
    budgets: tuple[Share, ...] = Field(min_length=1)
    budget_metric: Literal["activation", "loss"] = "activation"
    calibration_images: int = Field(ge=1)
    thresholds: tuple[Threshold, ...] = ()
    threshold_images: int = Field(default=512, ge=1)
    tuning: Tuned
    runtimes: tuple[RuntimeName, ...] = ()

    @property
    def steps(self) -> int:
        """One a compressed network."""
        return len(self.energies) + len(self.budgets) + len(self.thresholds)

    def network(self, images: Images) -> nn.Module:
        """The mini-ResNet of these sizes."""
        channels = images.train.images.shape[1]
        return mini_resnet(images.classes, channels, width=self.width, hidden=self.hidden)

    def network_settings(self) -> Mapping[str, object]:
        """Its sizes."""
        return {"kind": "mini_resnet", "width": self.width, "hidden": self.hidden}

    def augment(self) -> Augment:
        """As the settings say."""
        return self.augmentation

    def require_possible(self, model: nn.Module, example: Tensor) -> None:
        """Every budget can be reached."""
        analysis = analyze(model, example)
        for share in self.budgets:
            require_possible(analysis, Budget(params=share), metric=self.budget_metric)

    def outcome(self, run: SeedRun) -> SeedOutcome:
        """Every way, each as it comes out and fine-tuned."""
        dense, curve = run.dense()
        work = Compressing(self, run, dense)
        networks = (*work.energies(), *work.budgets(), *work.thresholds())
        return SeedOutcome(run.seed, dense, run.held_out(dense), curve, networks, spectra_of(work.analysis))

    def remark(self, images: Images, dense: nn.Module, variants: Sequence[Variant]) -> str:
        """How many layers an energy leaves dense, since its factors would be larger than they are."""
        plans = [(one.rule, one.plan) for one in variants if one.plan and one.stage == "zero-shot"]
        told = [
            f"{len(decided) - len(decided.factored)} of {len(decided)} at {100 * rule.energy:g} %"
            for rule, decided in plans
            if isinstance(rule, Energy)
        ]
        if self.allow_growth or not told:
            return ""
        return f"Layers that one energy for all leaves dense, because their factors would be larger: {', '.join(told)}."

    def _shortened(self) -> Mapping[str, object]:
        return {
            "limit": min(self.limit or 1000, 1000),
            "held_out": min(self.held_out, 500),
            "dense": self.dense.in_small_steps(4),
            "energies": self.energies[len(self.energies) // 2 :][:1],
            "budgets": self.budgets[:1],
            "energy_tuning": self.energy_tuning.in_small_steps(1),
            "tuning": self.tuning.in_small_steps(1),
            "calibration_images": min(self.calibration_images, 64),
            "threshold_images": min(self.threshold_images, 50),
        }


class Compressing:
    """One seed's compressed networks."""

    def __init__(self, study: MiniResNetStudy, run: SeedRun, dense: nn.Module) -> None:
        self.study, self.run, self.dense = study, run, dense
        self.example = run.images.train.example()

    @cached_property
    def analysis(self) -> Analysis:
        """Of the weights alone."""
        return analyze(self.dense, self.example)

    def energies(self) -> Iterator[Network]:
        """As published."""
        study = self.study
        for share in study.energies:
            work = self._way(f"{100 * share:g} % energy", Energy(share), "plain")

            def make(share: float = share) -> Made:
                forms: tuple[FormName, ...] = (study.energy_form,)
                decided = plan(self.analysis, Energy(share), forms=forms, allow_growth=study.allow_growth)
                return self._made(decided)

            settings = {"energy": share, "form": study.energy_form, "growth": study.allow_growth}
            yield from work.networks(*work.compressed(make, **settings), study.energy_tuning)

    def budgets(self) -> Iterator[Network]:
        """All layers together."""
        study = self.study
        for share in study.budgets:
            rule = Budget(params=share)
            work = self._way(f"budget, {100 * share:g} % of the parameters", rule, study.budget_metric)

            def make(rule: Budget = rule) -> Made:
                some = self.run.images.train.some(study.calibration_images, seed=self.run.seed)
                done = compress(
                    self.dense,
                    rule,
                    example_inputs=self.example,
                    data=[images for images, _ in some.batches(64)],
                    metric=study.budget_metric,
                    on_progress=lambda what, at, of: self.run.teller.tell(at, of=of, note=what),
                )
                return done.model, done.plan

            settings = {"budget": share, "metric": study.budget_metric, "images": study.calibration_images}
            yield from work.networks(*work.compressed(make, **settings), study.tuning)

    def thresholds(self) -> Iterator[Network]:
        """Each layer by itself."""
        study = self.study
        for threshold in study.thresholds:
            share = study.budgets[0]
            rule = Budget(params=share) if threshold == "held-out" else None
            work = self._way(MEANING[threshold], rule, "plain")

            def make(threshold: Threshold = threshold, share: float = share) -> Made:
                if threshold != "held-out":
                    return self._made(spectral_plan(self.analysis, threshold))
                told = self.run.teller
                scan = held_out_plan(
                    self.dense,
                    self.analysis,
                    self._held_out(),
                    share=share,
                    told=lambda done, of: told.tell(done, of=of, note="scanning the layers"),
                )
                return self._made(scan)

            settings = {"threshold": threshold, "share": share, "images": study.threshold_images}
            yield from work.networks(*work.compressed(make, **settings), study.tuning)

    def _way(self, title: str, rule: Rule | None, metric: Metric) -> Smaller:
        self.run.begin(f"{title}: compressing and fine-tuning")
        return Smaller(self.run, self.dense, title, rule, metric)

    def _made(self, decided: Plan) -> Made:
        done = compress(self.dense, decided, example_inputs=self.example, analysis=self.analysis)
        return done.model, done.plan

    def _held_out(self) -> Part:
        return self.run.images.held_out.some(self.study.threshold_images, seed=0)
