"""Projection at every epoch: the network trained from scratch, its weights cut to low rank after each epoch."""

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from spectrim.core.plans import Rank
from spectrim.recipes.fully_connected import FullyConnected
from spectrim.recipes.outcome import Network, SeedOutcome
from spectrim.recipes.parts import Trained
from spectrim.recipes.study import Phase, SeedRun
from spectrim.training import ProjectEachEpoch, Step, train_in_place
from spectrim.training.checkpoint import Checkpoint


class ProjectedStudy(FullyConnected):
    """Trained from the dense network's own start with the labels, projected after every epoch, then factored.

    Attributes:
        rank: Of every layer but the last.
        projected: The training; its last action is a projection.
    """

    kind: Literal["projected"] = "projected"
    rank: int = Field(ge=1)
    projected: Phase

    @property
    def steps(self) -> int:
        """Training."""
        return 1

    def require_possible(self, model: nn.Module, example: Tensor) -> None:
        """Every layer but the last can have the rank."""
        self.require_ranks(model, example, (self.rank,))

    def outcome(self, run: SeedRun) -> SeedOutcome:
        """The projected network, and the dense one to compare it with."""
        dense, curve = run.dense()
        return SeedOutcome(run.seed, dense, run.held_out(dense), curve, (self._trained(run),))

    def _shortened(self) -> Mapping[str, object]:
        return {"projected": self.projected.at_most(4)}

    def _trained(self, run: SeedRun) -> Network:
        run.begin(f"rank {self.rank}: training from scratch, projected at every epoch")
        model = run.blank()
        project = ProjectEachEpoch(Rank(self.rank), keep_last=True)

        def stepped(step: Step) -> None:
            if step.step + 1 == step.steps:
                _wholly(project, model)
            run.teller.training(step)

        def train(checkpoint: Checkpoint) -> Trained:
            labels = run.images.train.labels
            training = run.training(model, labels, self.projected, checkpoint=checkpoint, on_step=stepped)
            return model, train_in_place(training)

        key = run.key(rank=self.rank, projected=self.projected)
        trained, curve = run.parts.trained(f"rank{self.rank:04d}-projected", key=key, blank=model, train=train)
        return Network(
            f"rank {self.rank}, projected at every epoch",
            "trained",
            project.finish(trained.eval()),
            run.held_out(trained),
            curve,
            rule=Rank(self.rank),
            reference=trained,
        )


def _wholly(project: ProjectEachEpoch, model: nn.Module) -> None:
    """Project, also when Ctrl-C comes meanwhile: what is saved then counts the epoch's steps as done."""
    try:
        project(model)
    except KeyboardInterrupt:
        project(model)
        raise
