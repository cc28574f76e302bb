"""What the studies share: the settings of all of them, and one run of a seed with its dense network."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from spectrim.benchmark.measurement import Accuracy, accuracy
from spectrim.core.execution import as_inputs, evaluating, trace
from spectrim.core.files import Frozen
from spectrim.recipes.images import Augment, Images, Minibatches
from spectrim.recipes.outcome import SeedOutcome
from spectrim.recipes.parts import Parts, Trained, key_of
from spectrim.recipes.progress import Teller
from spectrim.reporting import Published, Variant
from spectrim.reporting.results import PublishedPoint
from spectrim.runtimes.sessions import RuntimeName
from spectrim.training import Settings, Step, TrainingRun, train_in_place
from spectrim.training.checkpoint import Checkpoint, fingerprint

QUICK = " (quick look: little data, few epochs)"


class Phase(Frozen):
    """A stretch of training with Adam: epochs, peak learning rate, batch size, decoupled weight decay, precision."""

    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    batch: int = Field(ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    precision: Literal["float32", "bf16"] = "float32"

    def at_most(self, epochs: int) -> "Phase":
        """The same with no more than so many epochs."""
        return self.model_copy(update={"epochs": min(self.epochs, epochs)})

    def in_small_steps(self, epochs: int) -> "Phase":
        """No more than so many epochs in batches of at most 32: on little data large ones would be too few steps."""
        return self.at_most(epochs).model_copy(update={"batch": min(self.batch, 32)})


class Earlier(Frozen):
    """Somebody else's figures for the same study; accuracy in [0, 1].

    Attributes:
        source: Whose.
        dense: Accuracy of the dense network.
        ranks: Accuracy by rank.
        points: Compressed networks that no single rank describes.
    """

    source: str
    dense: float | None = Field(default=None, ge=0, le=1)
    ranks: dict[int, float] = Field(default_factory=dict)
    points: tuple[PublishedPoint, ...] = ()

    def shown(self) -> Published:
        """As a report takes them."""
        first: tuple[tuple[int | None, float], ...] = () if self.dense is None else ((None, self.dense),)
        return Published(source=self.source, accuracy=(*first, *self.ranks.items()), points=self.points)


class Study(Frozen, ABC):
    """Everything that decides the outcome of a study; each kind adds its network and its own settings.

    Attributes:
        kind: Which class of study it is.
        name: Its name on the command line.
        title: One line for the report.
        dataset: As `spectrim data list` names it.
        held_out: Training images set aside for choices.
        limit: Use at most so many training and test images.
        dense: Training of the dense network, cross-entropy.
        seeds: One whole run each.
        tolerance: The chosen network is the smallest that loses at most this share of held-out accuracy; of those up to
            5 % larger, the most accurate.
        runtimes: What the networks are timed in, the first one for the table; none means torch, and ONNX Runtime where
            it is installed.
        latency_batch: Images of one timed pass.
        stand_in: The recipe to take where the data cannot be had.
        published: Figures to compare with.
        command: What repeats the study.
    """

    kind: str
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str
    dataset: str
    held_out: int = Field(ge=1)
    limit: int | None = Field(default=None, ge=1)
    dense: Phase
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    tolerance: float = Field(default=0.005, ge=0)
    runtimes: tuple[RuntimeName, ...] = ("torch",)
    latency_batch: int = Field(default=1, ge=1)
    stand_in: str | None = None
    published: tuple[Earlier, ...] = ()
    command: str = ""

    def quick(self) -> Self:
        """The same study on little data with few epochs, for its first seed: to see it work, not for its figures."""
        if self.is_quick:
            return self
        return self.model_copy(
            update={
                "title": f"{self.title}{QUICK}",
                "command": f"{self.command} --quick",
                "seeds": self.seeds[:1],
                "limit": min(self.limit or 2000, 2000),
                "held_out": min(self.held_out, 1000),
                "dense": self.dense.at_most(4),
                **self._shortened(),
            }
        )

    @property
    def is_quick(self) -> bool:
        """Whether it is a quick look, made by `quick`."""
        return self.title.endswith(QUICK)

    @property
    def identity(self) -> str:
        """A hash of all that decides what one seed gives; seeds, words and published figures do not."""
        return key_of(**self.model_dump(mode="json", exclude={"seeds", "title", "published", "command", "stand_in"}))

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

    @abstractmethod
    def network(self, images: Images) -> nn.Module:
        """The dense network, untrained, for these images.

        Raises:
            ModelError, DependencyError: it cannot be made here.
        """

    @abstractmethod
    def network_settings(self) -> Mapping[str, object]:
        """What decides the network and its training besides the common settings, for the key of finished parts."""

    def require(self) -> None:
        """Raise what can be told before anything is read or written: a missing package, weights that cannot be read."""

    def blank(self, images: Images, *, seed: int = 0) -> nn.Module:
        """The dense network before any training; the seed alone decides its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network(images)

    def require_possible(self, model: nn.Module, example: Tensor) -> None:
        """Raise what an untrained network tells before hours of training: here, that it cannot take the images.

        Args:
            model: From `blank`.
            example: One image (1, C, H, W), as the network sees it.

        Raises:
            ModelError, RuleError: what the settings ask cannot be done with this network.
        """
        trace(model, as_inputs(example))

    def augment(self) -> Augment:
        """How training images are varied."""
        return Augment()

    def pixels(self) -> int | None:
        """Side of the images as the network sees them; None for that of the data set."""
        return None

    def start(self, model: nn.Module) -> bool:
        """Fill in weights that are given instead of trained; whether there were any."""
        return False

    def remark(self, images: Images, dense: nn.Module, variants: Sequence[Variant]) -> str:
        """What else to say about the results, in a sentence or two."""
        return ""


@dataclass(frozen=True, eq=False)
class SeedRun:
    """One seed of a study: its data, and its networks, trained or found on disk."""

    study: Study
    seed: int
    images: Images
    parts: Parts
    teller: Teller

    def blank(self) -> nn.Module:
        """The dense network before any training."""
        return self.study.blank(self.images, seed=self.seed)

    def dense(self) -> Trained:
        """The dense network, trained with the labels, and its curve."""
        phase, model = self.study.dense, self.blank()
        given = self.study.start(model)
        self.begin("taking the given weights" if given else "training the dense network")
        if given:
            return model.eval(), ()

        def train(checkpoint: Checkpoint) -> Trained:
            return model, train_in_place(self.training(model, self.images.train.labels, phase, checkpoint=checkpoint))

        dense, curve = self.parts.trained("dense", key=self.key(), blank=model, train=train)
        return dense.eval(), curve

    def options(self, phase: Phase, checkpoint: Checkpoint) -> dict[str, Any]:
        """What `finetune` is given in every phase."""
        return {
            **phase.model_dump(exclude={"batch"}),
            "held_out": self.tested,
            "seed": self.seed,
            "checkpoint": checkpoint,
            "on_step": self.teller.training,
        }

    def training(
        self,
        model: nn.Module,
        targets: Tensor,
        phase: Phase,
        *,
        checkpoint: Checkpoint | None,
        on_step: Callable[[Step], None] | None = None,
        temperature: float = 1.0,
        keep: Literal["last", "best"] = "last",
    ) -> TrainingRun:
        """A run that trains all of `model` on the training images."""
        own = phase.model_dump(exclude={"batch"})
        return TrainingRun(
            model,
            self.epochs(targets, phase),
            settings=Settings(clip=None, temperature=temperature, keep=keep, seed=self.seed, **own),
            held_out=self.tested,
            checkpoint=checkpoint,
            on_step=on_step or self.teller.training,
        )

    def begin(self, what: str) -> None:
        """A new part of the progress."""
        self.teller.begin(f"seed {self.seed}: {what}" if len(self.study.seeds) > 1 else what)

    @cached_property
    def tested(self) -> list[tuple[Tensor, Tensor]]:
        """The training images that nothing is trained on, in batches."""
        return self.images.held_out.batches()

    def held_out(self, model: nn.Module) -> Accuracy:
        """Accuracy on the training images that nothing is trained on."""
        return accuracy(model, self.tested)

    def answers(self, dense: nn.Module) -> Tensor:
        """The teacher's logits (N, classes) of the training images, computed once instead of in every epoch."""
        with evaluating(dense):
            return torch.cat([dense(some) for some, _ in self.images.train.batches()])

    def epochs(self, targets: Tensor, phase: Phase) -> Callable[[int], Minibatches]:
        """The minibatches of every epoch, the same ones for every network of this seed."""
        images, study = self.images.train.images, self.study
        return lambda epoch: Minibatches(
            images, targets, phase.batch, self.seed, epoch, study.augment(), study.pixels()
        )

    def key(self, *, start: nn.Module | None = None, **more: object) -> str:
        """A hash of the data, of the dense network's training, of the weights to start from, and of `more`."""
        study = self.study
        return key_of(
            data=self.images.checksum,
            split=(study.held_out, study.limit),
            network=study.network_settings(),
            seen=(study.augment(), study.pixels()),
            dense=study.dense,
            seed=self.seed,
            start=None if start is None else fingerprint(start),
            **more,
        )
