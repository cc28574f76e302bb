"""The settings that all studies share, what each kind of study adds to them, and what a study reports while it runs."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from spectrim.analysis.spectra import Analysis, analyze
from spectrim.core.execution import as_inputs
from spectrim.core.files import Frozen
from spectrim.layers.tracing import trace
from spectrim.recipes.images import Augment, Images
from spectrim.reporting import LayerSpectrum, Published, Variant, spectra_of
from spectrim.reporting.results import PublishedPoint
from spectrim.runtimes.sessions import RuntimeName

if TYPE_CHECKING:
    from spectrim.recipes.seed import Network, SeedRun
from dataclasses import dataclass, field

Task = Callable[["SeedRun"], Iterable["Network"]]

QUICK = " (quick look: little data, few epochs)"


def key_of(**settings: object) -> str:
    """A hash of everything that decides a result."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


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


class Tuned(Frozen):
    """How a compressed network is fine-tuned.

    With a `temperature` the dense network is the teacher; None trains with the labels. `frozen_norms` leaves
    BatchNorm's running statistics as they are; after a plain truncation they no longer fit.
    """

    phase: Phase
    temperature: float | None = Field(default=None, gt=0)
    frozen_norms: bool = True

    def in_small_steps(self, epochs: int) -> "Tuned":
        """The same with a phase for little data."""
        return self.model_copy(update={"phase": self.phase.in_small_steps(epochs)})


class PublishedFigures(Frozen):
    """Somebody else's figures for the same study; accuracies in [0, 1].

    `dense` is that of their dense network, `ranks` are those by rank, `points` are networks that no single rank
    describes.
    """

    source: str
    dense: float | None = Field(default=None, ge=0, le=1)
    ranks: dict[int, float] = Field(default_factory=dict)
    points: tuple[PublishedPoint, ...] = ()

    def for_report(self) -> Published:
        """As a report takes them."""
        dense: tuple[tuple[int | None, float], ...] = () if self.dense is None else ((None, self.dense),)
        return Published(source=self.source, accuracy=(*dense, *self.ranks.items()), points=self.points)


class Recipe(Frozen, ABC):
    """What every kind of study has.

    Attributes:
        kind: Which class of study it is.
        name: Its name on the command line.
        title: One line for the report.
        dataset: As `spectrim data list` names it; of texts, what they are called.
        seeds: One whole run each.
        command: What repeats the study.
    """

    kind: str
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str
    dataset: str
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    command: str = ""

    def quick(self) -> Self:
        """The same study on little data, for its first seed: to see it work, not for its figures."""
        if self.is_quick:
            return self
        common = {"title": f"{self.title}{QUICK}", "command": f"{self.command} --quick", "seeds": self.seeds[:1]}
        return self.model_copy(update={**common, **self._reduced()})

    @abstractmethod
    def _reduced(self) -> Mapping[str, object]:
        """The other settings of a quick look."""

    @property
    def is_quick(self) -> bool:
        """Whether `quick` made it."""
        return self.title.endswith(QUICK)

    @property
    def identity(self) -> str:
        """A hash of all that decides what one seed gives; seeds, words and published figures do not."""
        return key_of(**self.model_dump(mode="json", exclude={"seeds", "title", "published", "command", "substitute"}))


class Study(Recipe):
    """Everything that decides the result of a study of images; each kind adds its network and its own settings.

    Attributes:
        held_out: Training images set aside for choices.
        limit: Use at most so many training and test images.
        dense: Training of the dense network, cross-entropy.
        tolerance: The chosen network is the smallest that loses at most this share of held-out accuracy; of those up to
            5 % larger, the most accurate.
        runtimes: What the networks are timed in, the first one for the table; none means torch, and ONNX Runtime where
            it is installed.
        latency_batch: Images of one timed pass.
        substitute: The recipe to take where the data cannot be had. In the file: `stand_in`.
        published: Figures to compare with.
    """

    held_out: int = Field(ge=1)
    limit: int | None = Field(default=None, ge=1)
    dense: Phase
    tolerance: float = Field(default=0.005, ge=0)
    runtimes: tuple[RuntimeName, ...] = ("torch",)
    latency_batch: int = Field(default=1, ge=1)
    substitute: str | None = Field(default=None, alias="stand_in")
    published: tuple[PublishedFigures, ...] = ()

    def _reduced(self) -> Mapping[str, object]:
        return {
            "limit": min(self.limit or 2000, 2000),
            "held_out": min(self.held_out, 1000),
            "dense": self.dense.at_most(4),
            **self._shortened(),
        }

    @abstractmethod
    def _shortened(self) -> Mapping[str, object]:
        """A study's own settings for a quick look."""

    @abstractmethod
    def tasks(self) -> Sequence[Task]:
        """What each seed does after its dense network: parts of the progress that give its low-rank networks."""

    @abstractmethod
    def dense_network(self, images: Images) -> nn.Module:
        """The dense network, untrained, for these images. Raises `ModelError` or `DependencyError` where it cannot be
        made.
        """

    @abstractmethod
    def network_settings(self) -> Mapping[str, object]:
        """What decides the network and its training besides the common settings, for the key of finished parts."""

    def require_available(self) -> None:
        """Raise for a missing package or unreadable weights, before anything is read or written."""

    def require_possible(self, model: nn.Module, example: Tensor) -> None:
        """Raise what an untrained network tells before hours of training: here, that it cannot take one image.

        That is a `ModelError` or a `RuleError`: what the settings ask cannot be done with this network.
        """
        trace(model, as_inputs(example))

    def initial_network(self, images: Images, *, seed: int = 0) -> nn.Module:
        """The dense network before any training; the seed alone decides its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.dense_network(images)

    def load_weights(self, model: nn.Module) -> bool:
        """Fill in weights to take or to begin with; whether the network is not to be trained any more."""
        return False

    def view(self) -> tuple[Augment, int | None]:
        """How training images are varied, and the side that the network sees all images at; None for their own."""
        return Augment(), None

    def analysis(self, run: "SeedRun") -> Analysis:
        """Of the dense network: by default, of its weights alone."""
        return analyze(run.dense, run.example)

    def spectra(self, run: "SeedRun") -> tuple[LayerSpectrum, ...]:
        """The singular values to report."""
        return spectra_of(run.analysis)

    def remark(self, images: Images, dense: nn.Module, variants: Sequence[Variant]) -> str:
        """What else to say about the results, in a sentence or two."""
        return ""


@dataclass(frozen=True)
class Progress:
    """Where a study stands: within the current part, and how many parts of all are finished."""

    part: str
    done: int
    of: int
    note: str
    parts_done: int
    parts: int


ProgressCallback = Callable[[Progress], None]


@dataclass
class ProgressReporter:
    """Counts the parts of a study and calls back at each step."""

    callback: ProgressCallback | None = None
    parts: int = 1
    _finished: int = field(default=0, init=False)
    _part: str = field(default="", init=False)

    def begin(self, part: str) -> None:
        """Start a new part; the one before it is finished."""
        self._finished += bool(self._part)
        self._part = part
        self.update("", 0, 1)

    def update(self, note: str, done: int, of: int) -> None:
        """`done` of `of` steps of the current part are finished; what the library reports its progress to."""
        if self.callback is not None:
            self.callback(Progress(self._part, done, of, note, self._finished, self.parts))

    def end(self) -> None:
        """Everything is done."""
        self._part, self._finished = "done", self.parts
        self.update("", 1, 1)
