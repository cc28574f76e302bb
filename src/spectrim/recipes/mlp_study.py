"""The classic study of a fully connected network: rank against accuracy, before and after fine-tuning the factors."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from spectrim.analysis.calibration import calibrate
from spectrim.analysis.spectra import Analysis, analyze
from spectrim.compression import compress
from spectrim.core.files import Frozen
from spectrim.core.plans import Metric, Rank
from spectrim.planning.rules import plan
from spectrim.recipes.fully_connected import FullyConnected
from spectrim.recipes.outcome import Network, SeedOutcome
from spectrim.recipes.parts import Trained
from spectrim.recipes.study import Phase, SeedRun
from spectrim.reporting import spectra_of
from spectrim.training import finetune
from spectrim.training.checkpoint import Checkpoint


class Tuning(Frozen):
    """How the factors come about and are fine-tuned.

    Attributes:
        metric: Of the factorisation.
        phase: Of the fine-tuning.
        temperature: With the dense network as the teacher; None trains with the labels.
    """

    metric: Metric
    phase: Phase
    temperature: float | None = Field(default=None, gt=0)


class MlpStudy(FullyConnected):
    """Every layer but the last factored, as it comes out (zero-shot) and with the factors fine-tuned.

    Attributes:
        ranks: Applied to every layer but the last.
        calibration_images: Training images for the activation metric.
        tunings: Each one at each rank.
    """

    kind: Literal["mlp"] = "mlp"
    ranks: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    calibration_images: int = Field(ge=1)
    tunings: tuple[Tuning, ...] = Field(min_length=1)

    @property
    def steps(self) -> int:
        """Analysing, and each rank in each way."""
        return 1 + len(self.ranks) * len(self.tunings)

    def require_possible(self, model: nn.Module, example: Tensor) -> None:
        """Every layer but the last can have the ranks."""
        self.require_ranks(model, example, self.ranks)

    def outcome(self, run: SeedRun) -> SeedOutcome:
        """Every rank in every way."""
        dense, curve = run.dense()
        analysis = _analysis(run, dense, images=self.calibration_images)
        answers = cache(lambda: run.answers(dense))
        networks = tuple(
            network
            for tuning in self.tunings
            for rank in self.ranks
            for network in self._factored(run, dense, analysis, answers, tuning=tuning, rank=rank)
        )
        return SeedOutcome(run.seed, dense, run.held_out(dense), curve, networks, spectra_of(analysis))

    def _shortened(self) -> Mapping[str, object]:
        tunings = tuple(one.model_copy(update={"phase": one.phase.at_most(2)}) for one in self.tunings)
        return {"calibration_images": min(self.calibration_images, 1000), "tunings": tunings}

    def _factored(
        self,
        run: SeedRun,
        dense: nn.Module,
        analysis: Analysis,
        answers: Callable[[], Tensor],
        *,
        tuning: Tuning,
        rank: int,
    ) -> Iterator[Network]:
        """The network of one rank as factored, and after its factors were tuned."""
        metric, phase = tuning.metric, tuning.phase
        run.begin(f"rank {rank}, {metric} metric: factoring and fine-tuning")
        decided = plan(analysis, Rank(rank), metric=metric)
        example = run.images.train.images[:1]
        small = compress(dense, decided, example_inputs=example, analysis=analysis)
        network = partial(Network, rule=Rank(rank), metric=metric, plan=decided)
        yield network(f"rank {rank}, {metric}, zero-shot", "zero-shot", small.model, run.held_out(small.model))

        def train(checkpoint: Checkpoint) -> Trained:
            targets = run.images.train.labels if tuning.temperature is None else answers()
            tuned = finetune(
                small.model,
                run.epochs(targets, phase),
                train="factors",
                temperature=tuning.temperature or 1.0,
                **run.options(phase, checkpoint),
            )
            return tuned.model, tuned.history

        key = run.key(
            start=dense,
            metric=metric,
            rank=rank,
            calibration=self.calibration_images,
            tuning=(phase, tuning.temperature),
        )
        name = f"rank{rank:04d}-{metric}" + ("" if tuning.temperature else "-labels")
        model, curve = run.parts.trained(name, key=key, blank=dense, train=train)
        yield network(f"rank {rank}, {metric}, fine-tuned", "fine-tuned", model, run.held_out(model), curve)


def _analysis(run: SeedRun, dense: nn.Module, *, images: int) -> Analysis:
    """Of every layer but the last, in both metrics."""
    run.begin("analysing")
    train = run.images.train
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(run.seed))
    calibration = calibrate(dense, train.images[order[:images]].split(1000))
    return analyze(dense, train.images[:1], calibration=calibration, keep_last=True)
