"""A published network with a small classifier: what compressing that layer gives, and what the whole network gives."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from spectrim.analysis.calibration import calibrate
from spectrim.analysis.spectra import Analysis, analyze
from spectrim.benchmark.measurement import count, measure
from spectrim.compression import compress
from spectrim.core.errors import ModelError
from spectrim.core.execution import watching
from spectrim.core.files import sha256_of
from spectrim.core.plans import Budget, Metric, Plan, Rank
from spectrim.layers.registry import LAYERS
from spectrim.layers.selection import near
from spectrim.models import imagenet, resolve
from spectrim.models.weights import fill_, read_state
from spectrim.planning.rules import require_possible
from spectrim.recipes.heads import Features, received
from spectrim.recipes.images import Augment, Images
from spectrim.recipes.outcome import Network, SeedOutcome
from spectrim.recipes.parts import Made, Trained
from spectrim.recipes.study import SeedRun, Study
from spectrim.recipes.tuning import Smaller, Tuned
from spectrim.reporting import Variant, spectra_of
from spectrim.runtimes.sessions import RuntimeName
from spectrim.training.checkpoint import Checkpoint

IMAGENET = "imagenet"


class ClassifierStudy(Study):
    """The last layer of a convolutional network at several ranks, beside the whole network under a budget of MACs.

    Attributes:
        model: Of torchvision, such as `torchvision:resnet18`; it is made with as many outputs as there are classes.
        weights: A `.safetensors` file of the trained network, which is then not trained here; or `imagenet` for
            torchvision's own weights to begin with, fetched by torchvision; none trains from scratch.
        size: Side in pixels that the network sees the images at; none leaves them.
        augmentation: How training images are varied.
        convolution: A convolution in the middle, whose spectrum is shown.
        classifier: The last layer.
        compressions: Shares of the classifier's ranks that are taken away; 0 leaves it dense.
        head: Training of the classifier alone; the dense one learns from the labels.
        head_images: On at most so many training images.
        head_mirrored: Each of them also mirrored; a classifier of low rank then learns the mean of what the dense one
            answers to both.
        head_labels: Share of the true label in that.
        macs: Share of the whole network's MACs to keep.
        metric: In which forms and ranks are chosen for that; `plain` needs no calibration and is done in seconds.
        forms: Which of them convolutions may take.
        rank_multiple: Its ranks are multiples of this number, such as the width of the processor's vectors.
        calibration_images: Training images for that, without labels.
        tuning: Fine-tuning of the whole network.
    """

    kind: Literal["classifier"] = "classifier"
    model: str = "torchvision:resnet18"
    weights: str | None = None
    size: int | None = Field(default=None, ge=1)
    augmentation: Augment = Augment()
    convolution: str = "layer2.1.conv2"
    classifier: str = "fc"
    compressions: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.0, 0.5, 0.8)
    head: Tuned
    head_images: int = Field(ge=1)
    head_mirrored: bool = False
    head_labels: float = Field(default=0.0, ge=0, lt=1)
    macs: float = Field(default=0.5, gt=0, lt=1)
    metric: Metric = "activation"
    forms: tuple[Literal["channel", "spatial", "tucker2"], ...] = Field(
        default=("channel", "spatial", "tucker2"), min_length=1
    )
    rank_multiple: int = Field(default=1, ge=1)
    calibration_images: int = Field(ge=1)
    tuning: Tuned
    runtimes: tuple[RuntimeName, ...] = ()

    @property
    def steps(self) -> int:
        """One for the spectra, one a compressed network."""
        return 2 + len(self.compressions)

    def network(self, images: Images) -> nn.Module:
        """The network, with an output a class."""
        return resolve(self.model, options={"num_classes": images.classes})

    def network_settings(self) -> Mapping[str, object]:
        """Its name, and the weights it begins with."""
        given = self.weights
        return {
            "kind": self.model,
            "weights": sha256_of(Path(given)) if given is not None and given != IMAGENET else given,
        }

    def require(self) -> None:
        """The network can be made here, and its weights can be read."""
        resolve(self.model, options={"num_classes": 2})
        if self.weights not in (None, IMAGENET):
            read_state(Path(str(self.weights)))

    def require_possible(self, model: nn.Module, example: Tensor) -> None:
        """The network has the layers named, ends with the classifier, and can be as small as the budget."""
        layers = dict(model.named_modules())
        for key, name, kinds in (("convolution", self.convolution, LAYERS), ("classifier", self.classifier, nn.Linear)):
            if name not in layers:
                raise ModelError(f"{self.model} has no layer {name!r}{near(name, layers)}; name one in the recipe")
            if not isinstance(layers[name], kinds):
                wanted = "linear layer" if key == "classifier" else "convolution"
                raise ModelError(f"{key} = {name!r} in the recipe is a {type(layers[name]).__name__}, not a {wanted}")
        analysis = analyze(model, example)
        received(model, self.classifier, example)
        require_possible(
            analysis,
            Budget(macs=self.macs),
            metric=self.metric,
            forms=self.forms,
            rank_multiple=self.rank_multiple,
        )

    def augment(self) -> Augment:
        """As the settings say."""
        return self.augmentation

    def pixels(self) -> int | None:
        """As the settings say."""
        return self.size

    def start(self, model: nn.Module) -> bool:
        """Fill in the weights of a file, if one is given, or those of ImageNet, which are then trained on."""
        if self.weights is None:
            return False
        if self.weights == IMAGENET:
            imagenet.fill_(model, self.model, head=self.classifier)
            return False
        fill_(model, read_state(Path(self.weights)), origin=Path(self.weights))
        return True

    def outcome(self, run: SeedRun) -> SeedOutcome:
        """The classifier at every rank, then the whole network."""
        dense, curve = run.dense()
        shown = (self.convolution, self.classifier)
        spectra = tuple(one for one in spectra_of(self._analysis(run, dense), cumulative=True) if one.layer in shown)
        networks = (*self._classifiers(run, dense), *self._whole(run, dense))
        return SeedOutcome(run.seed, dense, run.held_out(dense), curve, networks, spectra)

    def remark(self, images: Images, dense: nn.Module, variants: Sequence[Variant]) -> str:
        """How small a part of the network the classifier is."""
        layer, seen = dense.get_submodule(self.classifier), []
        example = images.test.example(self.latency_batch)
        with watching(dense, lambda name, module, given, output: seen.append((name, given))):
            dense.eval()(example)
        given = next(given for name, given in seen if name == self.classifier).detach()
        whole, own = count(dense, example), count(layer, given)
        times = [
            measure(one, inputs, rounds=11).latency_ms or 0.0 for one, inputs in ((dense, example), (layer, given))
        ]
        share = {name: 100 * getattr(own, name) / getattr(whole, name) for name in ("params", "macs")}
        return (
            f"The classifier {self.classifier} holds {own.params:,} of the {whole.params:,} parameters "
            f"({share['params']:.2g} %), does {share['macs']:.2g} % of the MACs and takes about "
            f"{100 * times[1] / times[0]:.1g} % of the time: whatever its rank, the network stays as large and as slow "
            "as it was. What it costs lies in its convolutions."
        )

    def _shortened(self) -> Mapping[str, object]:
        return {
            "limit": min(self.limit or 1000, 1000),
            "held_out": min(self.held_out, 500),
            "dense": self.dense.in_small_steps(2),
            "size": None,
            "head": self.head.in_small_steps(2),
            "head_images": min(self.head_images, 500),
            "calibration_images": min(self.calibration_images, 64),
            # the algebra of wide layers takes minutes in the others, however few the images
            "metric": "plain",
            "forms": ("channel",),
            "tuning": self.tuning.in_small_steps(1),
        }

    def _analysis(self, run: SeedRun, dense: nn.Module) -> Analysis:
        run.begin("spectra of a convolution and of the classifier")
        some = run.images.train.some(min(self.calibration_images, 256), seed=run.seed)
        seen = calibrate(dense, [images for images, _ in some.batches(64)], layers={self.convolution, self.classifier})
        example = run.images.train.example()
        return analyze(dense, example, calibration=seen, include=(self.convolution, self.classifier))

    def _classifiers(self, run: SeedRun, dense: nn.Module) -> Iterator[Network]:
        """The backbone frozen; the control is the dense classifier, which learns from the labels."""
        heads = _Heads(self, run, dense)
        full = min(dense.get_submodule(self.classifier).get_parameter("weight").shape)
        for share in self.compressions:
            rank = max(1, round((1 - share) * full))
            title = f"classifier at rank {rank} (-{100 * share:g} %)" if share else "classifier dense (-0 %)"
            run.begin(f"{title}: tuning the head")
            work = Smaller(run, dense, title, Rank(rank) if share else None, "plain" if share else None)
            if not share:
                yield heads.tuned(work, dense, None)
                continue

            def make(rank: int = rank) -> Made:
                example = run.images.train.example()
                done = compress(dense, Rank(rank), example_inputs=example, include=(self.classifier,))
                return done.model, done.plan

            made = work.compressed(make, classifier=self.classifier, rank=rank)
            yield work.zero_shot(*made)
            yield heads.tuned(work, *made)

    def _whole(self, run: SeedRun, dense: nn.Module) -> Iterator[Network]:
        rule = Budget(macs=self.macs)
        title = f"whole network, {100 * self.macs:g} % of the MACs"
        run.begin(f"{title}: compressing and fine-tuning")
        work = Smaller(run, dense, title, rule, self.metric)

        def make() -> Made:
            some = run.images.train.some(self.calibration_images, seed=run.seed)
            done = compress(
                dense,
                rule,
                example_inputs=run.images.train.example(),
                data=None if self.metric == "plain" else [images for images, _ in some.batches(64)],
                metric=self.metric,
                forms=self.forms,
                rank_multiple=self.rank_multiple,
                on_progress=lambda what, at, of: run.teller.tell(at, of=of, note=what),
            )
            return done.model, done.plan

        made = work.compressed(
            make,
            macs=self.macs,
            metric=self.metric,
            forms=self.forms,
            multiple=self.rank_multiple,
            images=self.calibration_images,
        )
        yield from work.networks(*made, self.tuning)


class _Heads:
    """The classifier of one seed, trained alone."""

    def __init__(self, study: ClassifierStudy, run: SeedRun, dense: nn.Module) -> None:
        self.study, self.run, self.dense = study, run, dense

    @cached_property
    def features(self) -> Features:
        """What the dense network's classifier receives."""
        some = self.run.images.train.some(self.study.head_images, seed=self.run.seed)
        return Features.of(
            self.dense,
            self.study.classifier,
            train=some,
            held_out=self.run.images.held_out,
            mirrored=self.study.head_mirrored,
        )

    def tuned(self, work: Smaller, model: nn.Module, plan: Plan | None) -> Network:
        """The network with its classifier tuned; one of low rank may learn from the dense one."""
        study, how = self.study, self.study.head
        taught = plan is not None and how.temperature is not None

        def train(checkpoint: Checkpoint) -> Trained:
            better, done = self.features.tuned(
                model,
                study.classifier,
                how=how,
                teacher=self.dense.get_submodule(study.classifier) if taught else None,
                label_share=study.head_labels,
                **self.run.options(how.phase, checkpoint),
            )
            return better, done.history

        key = self.run.key(
            start=model,
            teacher=work.dense_key,
            head=study.classifier,
            tuned=how,
            images=(study.head_images, study.head_mirrored, study.head_labels),
        )
        return work.trained(plan, "head tuned", key=key, train=train)
