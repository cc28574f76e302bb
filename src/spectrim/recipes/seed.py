"""One seed of a study: its dense network, and the low-rank networks made from it, trained now or found on disk."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from spectrim.analysis.spectra import Analysis
from spectrim.benchmark.measurement import Accuracy, Epoch, accuracy
from spectrim.compression import Compressed, compress
from spectrim.core.errors import FileError
from spectrim.core.files import FrozenFile
from spectrim.core.plans import Metric, Plan, Rule
from spectrim.layers.saving import load, save
from spectrim.recipes.images import Batch, Images, Minibatches
from spectrim.recipes.study import Phase, ProgressReporter, Study, Tuned, key_of
from spectrim.reporting import LayerSpectrum
from spectrim.reporting.results import Stage
from spectrim.training import Settings, Step, TrainingRun, finetune, train_in_place
from spectrim.training.checkpoint import Checkpoint, fingerprint


class Part(NamedTuple):
    """A network with the curve of its training, or with the plan that it was compressed by."""

    model: nn.Module
    curve: tuple[Epoch, ...] = ()
    plan: Plan | None = None


class _Note(FrozenFile):
    key: str
    curve: tuple[Epoch, ...] = ()
    plan: Plan | None = None


@dataclass(frozen=True, eq=False)
class Network:
    """One network of one seed, ready to be saved; what is not explained here is as in a `Variant`.

    `held_out` is its accuracy on held-out training images, `reference` the network as it was trained, if `model` has
    been made from it and should answer the same.
    """

    name: str
    stage: Stage
    model: nn.Module
    held_out: Accuracy
    curve: tuple[Epoch, ...] = ()
    rule: Rule | None = None
    metric: Metric | None = None
    plan: Plan | None = None
    reference: nn.Module | None = None


@dataclass(frozen=True, eq=False)
class SeedResult:
    """Everything that one seed produced before the test set is opened."""

    seed: int
    dense: Network
    networks: tuple[Network, ...]
    spectra: tuple[LayerSpectrum, ...] = ()


@dataclass(frozen=True, eq=False)
class SeedRun:
    """One seed of a study under way; `folder` holds its parts, networks with a note of what decides each."""

    study: Study
    seed: int
    images: Images
    folder: Path
    progress: ProgressReporter

    def result(self) -> SeedResult:
        """Train and compress everything that is not yet on disk."""
        dense = Network("dense", "dense", self.dense, self.held_out(self.dense), self._dense.curve)
        networks = tuple(network for task in self.study.tasks() for network in task(self))
        return SeedResult(self.seed, dense, networks, self.study.spectra(self))

    def begin(self, part: str) -> None:
        """A new part of the progress."""
        self.progress.begin(f"seed {self.seed}: {part}" if len(self.study.seeds) > 1 else part)

    @property
    def dense(self) -> nn.Module:
        """The dense network, trained with the labels."""
        return self._dense.model

    @cached_property
    def _dense(self) -> Part:
        model = self.study.initial_network(self.images, seed=self.seed)
        is_trained = self.study.load_weights(model)
        self.begin("taking the given weights" if is_trained else "training the dense network")
        part = Part(model) if is_trained else self.trained("dense", model, phase=self.study.dense, key=self.key())
        part.model.eval()
        return part

    @cached_property
    def analysis(self) -> Analysis:
        """Of the dense network, as the study takes it."""
        return self.study.analysis(self)

    def analyse(self, part: str) -> tuple[()]:
        """Make the analysis a part of the progress; a task that gives no network."""
        self.begin(part)
        _ = self.analysis
        return ()

    def compressed_by(self, plan: Plan) -> Compressed:
        """The dense network compressed by a plan from the analysis."""
        return compress(self.dense, plan, example_inputs=self.example, analysis=self.analysis)

    @cached_property
    def _teacher_logits(self) -> Tensor:
        """The dense network's logits (N, classes) of the training images, computed once instead of in every epoch."""
        return self.images.train.logits(self.dense)

    @cached_property
    def _held_out(self) -> list[Batch]:
        return self.images.held_out.batches()

    def held_out(self, model: nn.Module) -> Accuracy:
        """Accuracy on the training images that nothing is trained on."""
        return accuracy(model, self._held_out)

    @property
    def example(self) -> Tensor:
        """One training image, as a network sees it."""
        return self.images.train.example()

    def calibration(self, number: int, *, batch: int = 64) -> list[Tensor]:
        """At most so many training images without labels, chosen by the seed, in batches."""
        return [images for images, _ in self.images.train.sample(number, seed=self.seed).batches(batch)]

    def epochs(self, phase: Phase, *, temperature: float | None = None) -> Callable[[int], Minibatches]:
        """The minibatches of every epoch, the same ones for every network of this seed.

        Their targets are the labels, or the dense network's logits where a temperature makes it the teacher.
        """

        def minibatches(epoch: int) -> Minibatches:
            train = self.images.train
            targets = train.labels if temperature is None else self._teacher_logits
            return Minibatches(train.images, targets, phase.batch, self.seed, epoch, *self.study.view())

        return minibatches

    def options(self, phase: Phase, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """What `finetune` is given in every phase."""
        return phase.model_dump(exclude={"batch"}) | {
            "held_out": self._held_out,
            "seed": self.seed,
            "checkpoint": checkpoint,
            "on_progress": self.progress.update,
        }

    def key(self, *, start: nn.Module | None = None, **settings: object) -> str:
        """A hash of the data, of the dense network's training, of the weights to start from, and of `settings`."""
        study = self.study
        return key_of(
            data=self.images.checksum,
            split=(study.held_out, study.limit),
            network=study.network_settings(),
            seen=study.view(),
            dense=study.dense,
            seed=self.seed,
            start=None if start is None else fingerprint(start),
            **settings,
        )

    def finetuning(
        self, model: nn.Module, tuned: Tuned, *, train: Literal["all", "factors"] = "all", precomputed: bool = False
    ) -> Callable[[Checkpoint], Part]:
        """What fine-tunes a copy of `model` on all training images, for `part`.

        A teacher, if there is one, is the dense network itself, or its logits for all images `precomputed`.
        """

        def finetuned(checkpoint: Checkpoint) -> Part:
            temperature, live = tuned.temperature, tuned.temperature is not None and not precomputed
            result = finetune(
                model,
                self.epochs(tuned.phase, temperature=None if live else temperature),
                teacher=self.dense if live else None,
                train=train,
                temperature=temperature or 1.0,
                loss="kl" if temperature is not None and not live else None,
                frozen_norms=tuned.frozen_norms,
                **self.options(tuned.phase, checkpoint),
            )
            return Part(result.model, result.history)

        return finetuned

    def part(self, name: str, make: Callable[[Checkpoint], Part], *, key: str, blank: nn.Module) -> Part:
        """The part in the file `name`: loaded into a copy of `blank` if its key is the same, otherwise made and saved.

        The checkpoint that `make` is given holds the epochs of an interrupted training.
        """
        network, note_file = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        with suppress(FileError):  # absent or damaged: it is made again
            note = _Note.load(note_file)
            if note.key == key:
                return Part(load(network, blank), note.curve, note.plan)
        unfinished = Checkpoint(self.folder / f"{name}.unfinished.safetensors", run=key)
        part = make(unfinished)
        save(part.model, network)
        _Note(key=key, curve=part.curve, plan=part.plan).save(note_file)
        unfinished.path.unlink(missing_ok=True)
        return part

    def trained(
        self,
        name: str,
        model: nn.Module,
        *,
        phase: Phase,
        key: str,
        temperature: float | None = None,
        keep: Literal["last", "best"] = "last",
        after_step: Callable[[Step], object] | None = None,
        resumable: bool = True,
    ) -> Part:
        """The part in the file `name`: `model` itself trained, or as it lies on disk.

        With a `temperature` the dense network is the teacher; otherwise the labels are learnt. `after_step` is called
        as a part of every optimiser step; where its state is more than a checkpoint holds, nothing is `resumable`.
        """

        def train(checkpoint: Checkpoint) -> Part:
            own = phase.model_dump(exclude={"batch"}) | {"loss": None if temperature is None else "kl"}
            training = TrainingRun(
                model,
                self.epochs(phase, temperature=temperature),
                settings=Settings(clip=None, temperature=temperature or 1.0, keep=keep, seed=self.seed, **own),
                held_out=self._held_out,
                checkpoint=checkpoint if resumable else None,
                on_step=after_step,
                on_progress=self.progress.update,
            )
            return Part(model, train_in_place(training))

        return self.part(name, train, key=key, blank=model)


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to make a low-rank network: its title in tables, what was asked, and the metric of the factorisation."""

    run: SeedRun
    title: str
    rule: Rule | None = None
    metric: Metric | None = None

    def networks(self, compress: Callable[[], Compressed], tuned: Tuned, **settings: object) -> Iterator[Network]:
        """The network as compressed, and after fine-tuning on all training images; arguments as for `compressed`."""
        run = self.run
        run.begin(f"{self.title}: compressing and fine-tuning")
        small = self.compressed(compress, **settings)
        yield self.network("zero-shot", small)
        key = run.key(start=small.model, teacher=run.key(), tuned=tuned, train="all", images=len(run.images.train))
        yield self.finetuned("fine-tuned", small, train=run.finetuning(small.model, tuned), key=key)

    def compressed(self, compress: Callable[[], Compressed], **settings: object) -> Part:
        """The part on disk, or from `compress`; `settings` are everything that it depends on."""

        def make(_: Checkpoint) -> Part:
            result = compress()
            return Part(result.model, plan=result.plan)

        name, dense = f"{file_name(self.title)}-compressed", self.run.dense
        return self.run.part(name, make, key=self.run.key(start=dense, **settings), blank=dense)

    def finetuned(
        self, label: str, small: Part, *, train: Callable[[Checkpoint], Part], key: str, name: str | None = None
    ) -> Network:
        """The network after training from `small`; the part has the name given, or one from the title."""
        part = self.run.part(name or f"{file_name(self.title)}-tuned", train, key=key, blank=self.run.dense)
        return self.network(label, part._replace(plan=small.plan))

    def network(self, label: str, part: Part) -> Network:
        """The network of a part."""
        stage: Stage = "zero-shot" if label == "zero-shot" else "fine-tuned"
        name, held_out = f"{self.title}, {label}", self.run.held_out(part.model)
        return Network(name, stage, part.model, held_out, part.curve, self.rule, self.metric, part.plan)

    def factored(self, part: Part, model: nn.Module) -> Network:
        """The factored `model`, made of a part that was trained at low rank."""
        held_out = self.run.held_out(part.model)
        return Network(self.title, "trained", model, held_out, part.curve, self.rule, reference=part.model)


def file_name(name: str) -> str:
    """A network's name as the beginning of a file's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
