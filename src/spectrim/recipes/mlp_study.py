"""The classic study of a fully connected network: rank against accuracy, before and after fine-tuning the factors."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from spectrim.analyze import Analysis, analyze
from spectrim.calibrate import calibrate
from spectrim.compress import compress
from spectrim.execution import evaluating
from spectrim.files import Frozen, require_writable_folder
from spectrim.io import save
from spectrim.measure import Accuracy, accuracy
from spectrim.models import mlp
from spectrim.plan import Metric, Rank
from spectrim.ranks import plan
from spectrim.recipes.images import Images, Minibatches, load_images
from spectrim.recipes.outcome import Network, SeedOutcome, choose, provenance_of, spectra_of, summarise, variants_of
from spectrim.recipes.parts import Parts, Trained, key_of
from spectrim.recipes.progress import OnProgress, Teller, silent
from spectrim.report import Published, Results, report
from spectrim.training import finetune, fit
from spectrim.training.checkpoint import Checkpoint

METRICS: tuple[Metric, ...] = ("plain", "activation")


class Phase(Frozen):
    """A stretch of training with Adam: epochs, peak learning rate, batch size, decoupled weight decay."""

    epochs: int = Field(ge=1)
    lr: float = Field(gt=0)
    batch: int = Field(ge=1)
    weight_decay: float = Field(default=0.0, ge=0)


class MlpStudy(Frozen):
    """Everything that decides the outcome of a study.

    Attributes:
        name: Its name on the command line.
        title: One line for the report.
        dataset: As `spectrim data list` names it.
        width: Size of the hidden layers.
        hidden: How many there are.
        ranks: Applied to every layer but the last.
        held_out: Training images set aside for choices.
        limit: Use at most so many training and test images.
        calibration_images: Training images for the activation metric.
        dense: Training of the dense network, cross-entropy.
        tuning: Fine-tuning of the factored network, the dense one as the teacher.
        temperature: Of the distillation.
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
    ranks: tuple[int, ...]
    held_out: int = Field(ge=1)
    limit: int | None = Field(default=None, ge=1)
    calibration_images: int = Field(ge=1)
    dense: Phase
    tuning: Phase
    temperature: float = Field(default=4.0, gt=0)
    seeds: tuple[int, ...] = (0,)
    tolerance: float = Field(default=0.005, ge=0)
    published: tuple[Published, ...] = ()
    command: str

    def quick(self) -> "MlpStudy":
        """The same study on little data with few epochs: to see it work, not for its figures."""
        return self.model_copy(
            update={
                "title": f"{self.title} (quick look: little data, few epochs)",
                "command": f"{self.command} --quick",
                "limit": min(self.limit or 2000, 2000),
                "held_out": min(self.held_out, 1000),
                "calibration_images": min(self.calibration_images, 1000),
                "dense": self.dense.model_copy(update={"epochs": min(self.dense.epochs, 4)}),
                "tuning": self.tuning.model_copy(update={"epochs": min(self.tuning.epochs, 2)}),
            }
        )


def run_study(
    study: MlpStudy, out: Path, *, data_folder: Path | None = None, on_progress: OnProgress = silent
) -> Results:
    """Train, compress, fine-tune and measure, and write everything to a folder.

    `out` then holds `report.html`, `results.json`, `plan.json` and `model.safetensors` (the chosen network), and the
    trained parts, from which an interrupted run goes on when it is started again.

    Args:
        study: What to do.
        out: A folder; made if need be.
        data_folder: Where the data set's files lie, if not in the cache.
        on_progress: Called at every step.

    Raises:
        FileError: `out` cannot be written to; nothing has been done then.
        DataError: the data set cannot be obtained.
    """
    start = time.perf_counter()
    out = require_writable_folder(out)
    teller = Teller(on_progress, parts=1 + len(study.seeds) * (2 + len(METRICS) * len(study.ranks)) + 2)
    teller.begin(f"reading {study.dataset}")
    images = load_images(study.dataset, held_out=study.held_out, limit=study.limit, folder=data_folder)
    seeds = tuple(
        _SeedRun(study, seed, images, Parts(out / "parts" / f"seed{seed}"), teller).run() for seed in study.seeds
    )
    teller.begin("testing")
    dense, variants = variants_of(seeds, images, teller)
    chosen, because = choose(seeds, study.tolerance)
    results = Results(
        title=study.title,
        summary=summarise(dense, next(v for v in variants if v.name == chosen.name)),
        dense=dense,
        variants=variants,
        chosen=chosen.name,
        chosen_because=because,
        spectra=spectra_of(seeds[0].analysis),
        published=study.published,
        command=study.command,
        provenance=provenance_of(
            images,
            dataset=study.dataset,
            seeds=study.seeds,
            settings=study.model_dump_json(exclude={"published", "title", "name", "command"}),
            seconds=time.perf_counter() - start,
        ),
    )
    teller.begin("writing")
    save(chosen.model, out / "model.safetensors")
    chosen.plan.save(out / "plan.json")
    results.save(out / "results.json")
    report(results, out / "report.html")
    teller.end()
    return results


@dataclass(frozen=True, eq=False)
class _SeedRun:
    """One seed of a study: its dense network and all that comes of it, trained or found on disk."""

    study: MlpStudy
    seed: int
    images: Images
    parts: Parts
    teller: Teller

    def run(self) -> SeedOutcome:
        dense, curve = self._dense()
        self._begin("analysing")
        train = self.images.train
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
        some = train.images[order[: self.study.calibration_images]]
        calibration = calibrate(dense, some.split(1000))
        analysis = analyze(dense, train.images[:1], calibration=calibration, keep_last=True)
        logits = _logits(dense, train.images)
        networks = tuple(
            network
            for metric in METRICS
            for rank in self.study.ranks
            for network in self._compressed(dense, analysis, metric=metric, rank=rank, logits=logits)
        )
        return SeedOutcome(self.seed, dense, self._held_out(dense), curve, analysis, networks)

    def _dense(self) -> Trained:
        phase = self.study.dense
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            blank = mlp(
                self.images.train.images[0].numel(),
                self.images.classes,
                width=self.study.width,
                hidden=self.study.hidden,
            )
        self._begin("training the dense network")

        def train(checkpoint: Checkpoint) -> Trained:
            curve = fit(
                blank,
                self._epochs(self.images.train.labels, phase),
                epochs=phase.epochs,
                lr=phase.lr,
                weight_decay=phase.weight_decay,
                held_out=self.images.held_out.batches(),
                seed=self.seed,
                checkpoint=checkpoint,
                on_step=self.teller.training,
            )
            return blank, curve

        dense, curve = self.parts.trained("dense", key=self._key(), blank=blank, train=train)
        return dense.eval(), curve

    def _compressed(
        self, dense: nn.Module, analysis: Analysis, *, metric: Metric, rank: int, logits: Tensor
    ) -> Iterator[Network]:
        """The network of one rank and metric as factored, and after its factors were tuned."""
        self._begin(f"rank {rank}, {metric} metric: factoring and fine-tuning")
        phase = self.study.tuning
        decided = plan(analysis, Rank(rank), metric=metric)
        example = self.images.train.images[:1]
        small = compress(dense, decided, example_inputs=example, analysis=analysis)
        yield Network(metric, rank, "zero-shot", small.model, decided, self._held_out(small.model), ())

        def train(checkpoint: Checkpoint) -> Trained:
            tuned = finetune(
                small.model,
                self._epochs(logits, phase),
                train="factors",
                epochs=phase.epochs,
                lr=phase.lr,
                weight_decay=phase.weight_decay,
                temperature=self.study.temperature,
                held_out=self.images.held_out.batches(),
                seed=self.seed,
                checkpoint=checkpoint,
                on_step=self.teller.training,
            )
            return tuned.model, tuned.history

        key = self._key(
            metric=metric, rank=rank, calibration=self.study.calibration_images, tuning=(phase, self.study.temperature)
        )
        model, curve = self.parts.trained(f"rank{rank:04d}-{metric}", key=key, blank=dense, train=train)
        yield Network(metric, rank, "fine-tuned", model, decided, self._held_out(model), curve)

    def _begin(self, what: str) -> None:
        self.teller.begin(f"seed {self.seed}: {what}" if len(self.study.seeds) > 1 else what)

    def _held_out(self, model: nn.Module) -> Accuracy:
        return accuracy(model, self.images.held_out.batches())

    def _epochs(self, targets: Tensor, phase: Phase) -> Callable[[int], Minibatches]:
        return lambda epoch: Minibatches(self.images.train.images, targets, phase.batch, self.seed, epoch)

    def _key(self, **more: object) -> str:
        study = self.study
        return key_of(
            data=self.images.checksum,
            split=(study.held_out, study.limit),
            shape=(study.width, study.hidden),
            dense=study.dense,
            seed=self.seed,
            **more,
        )


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """The teacher's answers, computed once instead of in every epoch."""
    with evaluating(model):
        return torch.cat([model(some) for some in images.split(1000)])
