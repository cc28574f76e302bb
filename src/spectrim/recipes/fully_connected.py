"""The studies of the fully connected network: factors fine-tuned, truncation in training, projection in training."""

import copy
from abc import ABC
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn

from spectrim.analysis.calibration import calibrate
from spectrim.analysis.spectra import Analysis, analyze
from spectrim.core.files import Frozen
from spectrim.core.plans import Budget, Metric, Rank, Ratio
from spectrim.models import mlp
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.rules import plan, require_possible
from spectrim.recipes.images import Images
from spectrim.recipes.seed import Candidate, Network, Part, SeedRun
from spectrim.recipes.study import Phase, Study, Task, Tuned
from spectrim.reporting import LayerSpectrum
from spectrim.training import ProjectEachEpoch, RankSchedule, Step, Truncation, truncated_

PositiveInt = Annotated[int, Field(ge=1)]


class FullyConnected(Study, ABC):
    """A study of the fully connected network, with `hidden` layers of size `width`."""

    width: PositiveInt = 1024
    hidden: PositiveInt = 5

    def dense_network(self, images: Images) -> nn.Module:
        """Flatten, `hidden` layers of `width` with ReLU, and a head."""
        return mlp(images.train.images[0].numel(), len(images.names), width=self.width, hidden=self.hidden)

    def network_settings(self) -> Mapping[str, object]:
        """Its sizes."""
        return {"kind": "mlp", "width": self.width, "hidden": self.hidden}

    def require_ranks(self, model: nn.Module, example: Tensor, *, ranks: Iterable[int]) -> None:
        """Raise `RuleError` for a rank that a layer but the last cannot have."""
        analysis = analyze(model, example, keep_last=True)
        for rank in ranks:
            require_possible(analysis, Rank(rank), PlanOptions(), metric="plain")


class Tuning(Frozen):
    """How the factors are made, in which metric, and fine-tuned.

    With a `temperature` the dense network is the teacher; None trains with the labels.
    """

    metric: Metric
    phase: Phase
    temperature: float | None = Field(default=None, gt=0)


class MlpStudy(FullyConnected):
    """Rank against accuracy: every layer but the last factored, zero-shot and with the factors fine-tuned.

    Each of `tunings` at each of `ranks`; the activation metric is of so many `calibration_images`, without labels.
    """

    kind: Literal["mlp"] = "mlp"
    ranks: tuple[PositiveInt, ...] = Field(min_length=1)
    calibration_images: PositiveInt
    tunings: tuple[Tuning, ...] = Field(min_length=1)

    def tasks(self) -> Sequence[Task]:
        """Analysing, and each rank with each tuning."""
        pairs = product(self.tunings, self.ranks)
        networks = (partial(self._factored, tuning=tuning, rank=rank) for tuning, rank in pairs)
        return [partial(SeedRun.analyse, part="analysing"), *networks]

    def require_possible(self, model: nn.Module, example: Tensor) -> None:
        """Every layer but the last can have the ranks."""
        self.require_ranks(model, example, ranks=self.ranks)

    def _shortened(self) -> Mapping[str, object]:
        tunings = tuple(tuning.model_copy(update={"phase": tuning.phase.at_most(2)}) for tuning in self.tunings)
        return {"calibration_images": min(self.calibration_images, 1000), "tunings": tunings}

    def analysis(self, run: SeedRun) -> Analysis:
        """Of every layer but the last, in both metrics."""
        calibration = calibrate(run.dense, run.calibration(self.calibration_images, batch=1000))
        return analyze(run.dense, run.example, calibration=calibration, keep_last=True)

    def _factored(self, run: SeedRun, *, tuning: Tuning, rank: int) -> Iterator[Network]:
        """The network of one rank as factored, and after fine-tuning of its factors."""
        metric, phase, temperature = tuning.metric, tuning.phase, tuning.temperature
        run.begin(f"rank {rank}, {metric} metric: factoring and fine-tuning")
        candidate = Candidate(run, f"rank {rank}, {metric}", Rank(rank), metric)
        decided = plan(run.analysis, Rank(rank), metric=metric)
        small = Part(run.compressed_by(decided).model, plan=decided)
        yield candidate.network("zero-shot", small)
        tuned = Tuned(phase=phase, temperature=temperature)
        train = run.finetuning(small.model, tuned, train="factors", precomputed=True)
        settings = {"metric": metric, "rank": rank, "calibration": self.calibration_images}
        key = run.key(start=run.dense, tuning=(phase, temperature), **settings)
        name = f"rank{rank:04d}-{metric}" + ("" if temperature else "-labels")
        yield candidate.finetuned("fine-tuned", small, train=train, key=key, name=name)


class FixedRank(FullyConnected, ABC):
    """A study of training at one `rank`, that of every layer but the last."""

    rank: PositiveInt

    def require_possible(self, model: nn.Module, example: Tensor) -> None:
        """Every layer but the last can have the rank."""
        self.require_ranks(model, example, ranks=[self.rank])

    def spectra(self, run: SeedRun) -> tuple[LayerSpectrum, ...]:
        """None: ranks do not depend on them."""
        return ()


class Truncating(Frozen):
    """One way of training with the truncation inside, from the dense network on; the `name` is unique within a study.

    `residual_decay`, in the file `shrink`, is as for `truncated_`; 0 is the published method. `keep` takes the weights
    of the last epoch, or of the one with the best accuracy on held-out training images. With a `temperature` the dense
    network is the teacher; None trains with the labels.
    """

    name: str
    phase: Phase
    residual_decay: float = Field(ge=0, le=1, alias="shrink")
    keep: Literal["last", "best"]
    temperature: float | None = Field(default=None, gt=0)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        # with the names of the file, since this text is part of the keys of finished parts
        for name, value in super().__repr_args__():
            yield (type(self).model_fields[name].alias or name) if name else name, value


class Moving(Truncating):
    """The same with ranks that are chosen in training, for no more parameters than the study's rank gives.

    They `start` at this share of every full rank, move after `every` so many optimiser steps, and stay after the share
    `end` of all steps, in the file `settled`.
    """

    start: float = Field(gt=0, le=1)
    every: int = Field(ge=1)
    end: float = Field(gt=0, le=1, alias="settled")


def _tag(training: Any) -> str:
    """Which of the two it is, by the settings that only one of them has."""
    settings = training if isinstance(training, dict) else training.model_dump()
    return "moving" if settings.keys() & {"start", "every", "settled"} else "truncating"


Training = Annotated[Annotated[Moving, Tag("moving")] | Annotated[Truncating, Tag("truncating")], Discriminator(_tag)]


class DynamicStudy(FixedRank):
    """Every layer but the last truncated in every forward pass, as `ways` say, then converted to a factored network."""

    kind: Literal["dynamic"] = "dynamic"
    ways: tuple[Training, ...] = Field(min_length=1)

    def tasks(self) -> Sequence[Task]:
        """Each training from the same dense network."""
        return [partial(self._trained, training=training) for training in self.ways]

    def _shortened(self) -> Mapping[str, object]:
        return {"ways": tuple(each.model_copy(update={"phase": each.phase.at_most(2)}) for each in self.ways)}

    def _trained(self, run: SeedRun, *, training: Truncating) -> Iterator[Network]:
        schedule = self._schedule(run, training) if isinstance(training, Moving) else None
        title = training.name if schedule else f"rank {self.rank}, {training.name}"
        run.begin(f"{title}: truncation in every forward pass")
        model, truncation = self._truncated(run, training)
        part = run.trained(
            f"rank{self.rank:04d}-truncated-{training.name.replace(' ', '-')}",
            model,
            phase=training.phase,
            key=run.key(start=run.dense, rank=self.rank, way=training),
            temperature=training.temperature,
            keep=training.keep,
            after_step=None if schedule is None else lambda _: schedule.step(truncation),
            # the state of the schedule is not in a checkpoint: such a training starts from its beginning
            resumable=schedule is None,
        )
        # the part has the full weights, and is converted the same way whether it was trained now or found on disk
        small, final = self._truncated(run, training)
        small.load_state_dict(part.model.eval().state_dict())
        yield Candidate(run, title, None if schedule else Rank(self.rank)).factored(part, final.finish().eval())

    def _truncated(self, run: SeedRun, training: Truncating) -> tuple[nn.Module, Truncation]:
        model = copy.deepcopy(run.dense)
        rule = Ratio(training.start) if isinstance(training, Moving) else Rank(self.rank)
        return model, truncated_(model, rule, keep_last=True, residual_decay=training.residual_decay)

    def _schedule(self, run: SeedRun, training: Moving) -> RankSchedule:
        """Down to the parameters of the study's rank, at most, by the time that the ranks are to stay."""
        reference = truncated_(copy.deepcopy(run.dense), Rank(self.rank), keep_last=True).finish()
        small, dense = (sum(p.numel() for p in model.parameters()) for model in (reference, run.dense))
        steps = training.phase.epochs * len(run.epochs(training.phase)(0))
        return RankSchedule(Budget(params=small / dense), every=training.every, end=max(1, round(training.end * steps)))


class ProjectedStudy(FixedRank):
    """Trained from the dense network's own start with the labels, projected after every epoch, then factored."""

    kind: Literal["projected"] = "projected"
    projected: Phase

    def tasks(self) -> Sequence[Task]:
        """Training."""
        return [self._trained]

    def _shortened(self) -> Mapping[str, object]:
        return {"projected": self.projected.at_most(4)}

    def _trained(self, run: SeedRun) -> Iterator[Network]:
        run.begin(f"rank {self.rank}: training from scratch, projected at every epoch")
        model = self.initial_network(run.images, seed=run.seed)
        project = ProjectEachEpoch(Rank(self.rank), keep_last=True)

        def project_at_the_end(step: Step) -> None:
            if step.step + 1 < step.steps:
                return
            try:
                project(model)
            except KeyboardInterrupt:
                project(model)  # fully, since the saved state counts the epoch's steps as done
                raise

        part = run.trained(
            f"rank{self.rank:04d}-projected",
            model,
            phase=self.projected,
            key=run.key(rank=self.rank, projected=self.projected),
            after_step=project_at_the_end,
        )
        candidate = Candidate(run, f"rank {self.rank}, projected at every epoch", Rank(self.rank))
        yield candidate.factored(part, project.finish(part.model.eval()))
