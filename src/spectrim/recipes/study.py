"""What the studies share: the settings of all of them, and one run of a seed with its dense network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from spectrim.execution import evaluating
from spectrim.files import Frozen
from spectrim.measure import Accuracy, accuracy
from spectrim.models import mlp
from spectrim.recipes.images import Images, Minibatches
from spectrim.recipes.outcome import SeedOutcome
from spectrim.recipes.parts import Parts, Trained, key_of
from spectrim.recipes.progress import Teller
from spectrim.report import Published
from spectrim.training import fit
from spectrim.training.checkpoint import Checkpoint


class Phase(Frozen):
    """A stretch of training with Adam: epochs, peak learning rate, batch size, decoupled weight decay."""

    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    batch: int = Field(ge=1)
    weight_decay: float = Field(default=0.0, ge=0)

    def at_most(self, epochs: int) -> "Phase":
        """The same with no more than so many epochs."""
        return self.model_copy(update={"epochs": min(self.epochs, epochs)})


class Study(Frozen, ABC):
    """Everything that decides the outcome of a study of the fully connected network; each study adds its own.

    Attributes:
        name: Its name on the command line.
        title: One line for the report.
        dataset: As `spectrim data list` names it.
        width: Size of the hidden layers.
        hidden: How many there are.
        held_out: Training images set aside for choices.
        limit: Use at most so many training and test images.
        dense: Training of the dense network, cross-entropy.
        seeds: One whole run each.
        tolerance: The chosen network is the smallest that loses at most this share of held-out accuracy.
        published: Figures to compare with.
        command: What repeats the study.
    """

    name: str
    title: str
    dataset: str
    width: int = Field(default=1024, ge=1)
    hidden: int = Field(default=5, ge=1)
    held_out: int = Field(ge=1)
    limit: int | None = Field(default=None, ge=1)
    dense: Phase
    seeds: tuple[int, ...] = (0,)
    tolerance: float = Field(default=0.005, ge=0)
    published: tuple[Published, ...] = ()
    command: str

    def quick(self) -> Self:
        """The same study on little data with few epochs: to see it work, not for its figures."""
        return self.model_copy(
            update={
                "title": f"{self.title} (quick look: little data, few epochs)",
                "command": f"{self.command} --quick",
                "limit": min(self.limit or 2000, 2000),
                "held_out": min(self.held_out, 1000),
                "dense": self.dense.at_most(4),
                **self._shortened(),
            }
        )

    @abstractmethod
    def _shortened(self) -> Mapping[str, object]:
        """A study's own settings for a quick look."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Parts of the progress that each seed takes after its dense network."""

    @abstractmethod
    def outcome(self, run: "SeedRun") -> SeedOutcome:
        """All networks of one seed, before the test set is opened."""


@dataclass(frozen=True, eq=False)
class SeedRun:
    """One seed of a study: its data, and its networks, trained or found on disk."""

    study: Study
    seed: int
    images: Images
    parts: Parts
    teller: Teller

    def blank(self) -> nn.Module:
        """The dense network before any training; the seed alone decides its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            inputs = self.images.train.images[0].numel()
            return mlp(inputs, self.images.classes, width=self.study.width, hidden=self.study.hidden)

    def dense(self) -> Trained:
        """The dense network, trained with the labels, and its curve."""
        phase, model = self.study.dense, self.blank()
        self.begin("training the dense network")

        def train(checkpoint: Checkpoint) -> Trained:
            curve = fit(
                model,
                self.epochs(self.images.train.labels, phase),
                **self.options(phase, checkpoint),
            )
            return model, curve

        dense, curve = self.parts.trained("dense", key=self.key(), blank=model, train=train)
        return dense.eval(), curve

    def options(self, phase: Phase, checkpoint: Checkpoint) -> dict[str, Any]:
        """What `fit` and `finetune` are given in every phase."""
        return {
            "epochs": phase.epochs,
            "lr": phase.lr,
            "weight_decay": phase.weight_decay,
            "held_out": self.images.held_out.batches(),
            "seed": self.seed,
            "checkpoint": checkpoint,
            "on_step": self.teller.training,
        }

    def begin(self, what: str) -> None:
        """A new part of the progress."""
        self.teller.begin(f"seed {self.seed}: {what}" if len(self.study.seeds) > 1 else what)

    def held_out(self, model: nn.Module) -> Accuracy:
        """Accuracy on the training images that nothing is trained on."""
        return accuracy(model, self.images.held_out.batches())

    def answers(self, dense: nn.Module) -> Tensor:
        """The teacher's logits (N, classes) of the training images, computed once instead of in every epoch."""
        with evaluating(dense):
            return torch.cat([dense(some) for some in self.images.train.images.split(1000)])

    def epochs(self, targets: Tensor, phase: Phase) -> Callable[[int], Minibatches]:
        """The minibatches of every epoch, the same ones for every network of this seed."""
        return lambda epoch: Minibatches(self.images.train.images, targets, phase.batch, self.seed, epoch)

    def key(self, **more: object) -> str:
        """A hash of the data, of the dense network's training and of `more`."""
        study = self.study
        return key_of(
            data=self.images.checksum,
            split=(study.held_out, study.limit),
            shape=(study.width, study.hidden),
            dense=study.dense,
            seed=self.seed,
            **more,
        )
