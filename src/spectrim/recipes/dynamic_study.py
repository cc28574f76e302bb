"""Truncation in every forward pass: the dense network trained on while it computes at low rank."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn

from spectrim.core.files import Frozen
from spectrim.core.plans import Budget, Rank, Ratio
from spectrim.recipes.fully_connected import FullyConnected
from spectrim.recipes.outcome import Network, SeedOutcome
from spectrim.recipes.parts import Trained
from spectrim.recipes.study import Phase, SeedRun
from spectrim.training import RankSchedule, Step, Truncation, train_in_place, truncated_
from spectrim.training.checkpoint import Checkpoint


class Truncating(Frozen):
    """One way of training with the truncation inside.

    Attributes:
        name: In tables; unique within a study.
        phase: From the dense network on.
        shrink: The `residual_decay` of `truncated_`; 0 is the published method.
        keep: Weights of the last epoch, or of the one with the best accuracy on held-out training images.
        temperature: With the dense network as the teacher; None trains with the labels.
    """

    name: str
    phase: Phase
    shrink: float = Field(ge=0, le=1)
    keep: Literal["last", "best"]
    temperature: float | None = Field(default=None, gt=0)


class Moving(Truncating):
    """The same with ranks that are chosen in training, for no more parameters than the study's rank gives.

    Attributes:
        start: Share of every full rank to begin with.
        every: Optimiser steps from one move to the next.
        settled: Share of all steps after which the ranks stay.
    """

    start: float = Field(gt=0, le=1)
    every: int = Field(ge=1)
    settled: float = Field(gt=0, le=1)


def _moves(way: object) -> str:
    """Which of the two a way is, by the settings that only one of them has."""
    names = way.keys() if isinstance(way, dict) else vars(way).keys()
    return "moving" if names & {"start", "every", "settled"} else "truncating"


Way = Annotated[Annotated[Moving, Tag("moving")] | Annotated[Truncating, Tag("truncating")], Discriminator(_moves)]


class DynamicStudy(FullyConnected):
    """Every layer but the last truncated in every forward pass, then finished as a factored network.

    Attributes:
        rank: Of every layer but the last.
        ways: How it is trained.
    """

    kind: Literal["dynamic"] = "dynamic"
    rank: int = Field(ge=1)
    ways: tuple[Way, ...] = Field(min_length=1)

    @property
    def steps(self) -> int:
        """One a way."""
        return len(self.ways)

    def require_possible(self, model: nn.Module, example: Tensor) -> None:
        """Every layer but the last can have the rank."""
        self.require_ranks(model, example, (self.rank,))

    def outcome(self, run: SeedRun) -> SeedOutcome:
        """Each way from the same dense network."""
        dense, curve = run.dense()
        answers = cache(lambda: run.answers(dense))
        networks = tuple(self._trained(run, dense, way, answers=answers) for way in self.ways)
        return SeedOutcome(run.seed, dense, run.held_out(dense), curve, networks)

    def _shortened(self) -> Mapping[str, object]:
        return {"ways": tuple(one.model_copy(update={"phase": one.phase.at_most(2)}) for one in self.ways)}

    def _trained(self, run: SeedRun, dense: nn.Module, way: Truncating, *, answers: Callable[[], Tensor]) -> Network:
        moving = isinstance(way, Moving)
        title = way.name if moving else f"rank {self.rank}, {way.name}"
        run.begin(f"{title}: truncation in every forward pass")
        model, truncation = self._truncated(dense, way)
        schedule = self._schedule(run, dense, way) if isinstance(way, Moving) else None

        def stepped(step: Step) -> None:
            if schedule is not None:
                schedule.step(truncation)
            run.teller.training(step)

        def train(checkpoint: Checkpoint) -> Trained:
            targets = run.images.train.labels if way.temperature is None else answers()
            training = run.training(
                model,
                targets,
                way.phase,
                # where the schedule stood is not part of a checkpoint, so that this way starts from its beginning
                checkpoint=None if moving else checkpoint,
                on_step=stepped,
                temperature=way.temperature or 1.0,
                keep=way.keep,
            )
            return model, train_in_place(training)

        name = f"rank{self.rank:04d}-truncated-{way.name.replace(' ', '-')}"
        # the part has the full weights, and is finished the same way whether it was trained now or found
        trained, curve = run.parts.trained(
            name, key=run.key(start=dense, rank=self.rank, way=way), blank=model, train=train
        )
        small, final = self._truncated(dense, way)
        small.load_state_dict(trained.eval().state_dict())
        return Network(
            title,
            "trained",
            final.finish().eval(),
            run.held_out(trained),
            curve,
            rule=None if moving else Rank(self.rank),
            reference=trained,
        )

    def _truncated(self, dense: nn.Module, way: Truncating) -> tuple[nn.Module, Truncation]:
        model = copy.deepcopy(dense)
        rule = Ratio(way.start) if isinstance(way, Moving) else Rank(self.rank)
        return model, truncated_(model, rule, keep_last=True, residual_decay=way.shrink)

    def _schedule(self, run: SeedRun, dense: nn.Module, way: Moving) -> RankSchedule:
        """Down to the parameters of the study's rank, at most, by the time that the ranks are to settle."""
        fixed = truncated_(copy.deepcopy(dense), Rank(self.rank), keep_last=True).finish()
        wanted, whole = (sum(one.numel() for one in model.parameters()) for model in (fixed, dense))
        steps = way.phase.epochs * len(run.epochs(run.images.train.labels, way.phase)(0))
        return RankSchedule(Budget(params=wanted / whole), every=way.every, end=max(1, round(way.settled * steps)))
