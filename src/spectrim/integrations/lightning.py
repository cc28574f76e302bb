"""Callbacks for Lightning (needs the extra `lightning`); nothing else imports this module."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from spectrim.core.errors import TrainingError
from spectrim.training.project import ProjectEachEpoch
from spectrim.training.schedule import RankSchedule
from spectrim.training.truncated import Truncation


class ProjectionCallback(Callback):
    """`ProjectEachEpoch` for a Lightning trainer: at the end of every training epoch, or every `every_steps` steps.

        trainer = lightning.Trainer(callbacks=[ProjectionCallback(ProjectEachEpoch(st.Rank(20)))])

    Patterns of `project` are of names in the LightningModule. Steps are the trainer's optimiser steps
    (`global_step`), so that a resumed run projects when an uninterrupted one would.

    Attributes:
        project: What to do; its `finish` gives the factored copy afterwards.
    """

    def __init__(self, project: ProjectEachEpoch) -> None:
        super().__init__()
        self.project = project

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the trainer is."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Project after every `every_steps` optimiser steps."""
        before, self._seen = self._seen, trainer.global_step
        every = self.project.every_steps
        if every is not None and self._seen // every > before // every:
            self._apply(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Project after every epoch, unless steps are counted."""
        if self.project.every_steps is None:
            self._apply(trainer, pl_module)

    def _apply(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a second optimiser finds the weights projected already, and projects its own momentum
        for optimizer in trainer.optimizers:
            self.project(pl_module, optimizer)


class RankScheduleCallback(Callback):
    """`RankSchedule.step` after every optimiser step of a Lightning trainer; the count is kept in its checkpoints.

    In `fit`, more than one optimiser is a `TrainingError`.

    Attributes:
        schedule: What changes the ranks.
        truncation: From `truncated_`, made before `fit`.
    """

    def __init__(self, schedule: RankSchedule, truncation: Truncation) -> None:
        super().__init__()
        self.schedule, self.truncation = schedule, truncation

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the trainer is."""
        if len(trainer.optimizers) != 1:
            raise TrainingError(
                f"there are {len(trainer.optimizers)} optimisers, and a RankSchedule counts the steps of one; call "
                "schedule.step(truncation, optimizer) in training_step instead"
            )
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the optimiser steps; under gradient accumulation there is not one after every batch."""
        before, self._seen = self._seen, trainer.global_step
        for _ in range(self._seen - before):
            self.schedule.step(self.truncation, trainer.optimizers[0])

    def state_dict(self) -> dict[str, Any]:
        """That of the schedule."""
        return self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a checkpoint of the trainer."""
        self.schedule.load_state_dict(state_dict)
