"""A published network with a small classifier: what compressing that layer gives, and what the whole network gives."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from math import log, log1p
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from spectrim.analysis.calibration import calibrate
from spectrim.analysis.spectra import Analysis, analyze
from spectrim.benchmark.measurement import count, measure
from spectrim.compression import compress
from spectrim.core.errors import ModelError, near
from spectrim.core.execution import evaluating
from spectrim.core.files import sha256_of
from spectrim.core.plans import Budget, Metric, Rank
from spectrim.layers.types import find_layer_type
from spectrim.models import resolve
from spectrim.models.weights import fill_, fill_imagenet_, read_state
from spectrim.planning.decisions import PlanOptions
from spectrim.planning.rules import require_possible
from spectrim.recipes.convolutional import ConvolutionalStudy, ConvolutionForm
from spectrim.recipes.images import Augment, Batch, Images, Minibatches, Split
from spectrim.recipes.seed import Candidate, Network, Part, SeedRun
from spectrim.recipes.study import Task, Tuned
from spectrim.reporting import LayerSpectrum, Variant, spectra_of
from spectrim.training import finetune
from spectrim.training.checkpoint import Checkpoint

IMAGENET = "imagenet"


@dataclass(frozen=True, eq=False)
class Features:
    """What the last layer receives of training images, and of held-out ones, never mirrored, in batches.

    The backbone is frozen and images are at most mirrored, so training on these is training on the images. `train` has
    all training images as they are, then all mirrored, if they are: (views * N, F), `views` 1 or 2; `labels` are of
    every row.
    """

    train: Tensor
    labels: Tensor
    held_out: list[Batch]
    views: int = 1

    @classmethod
    def of(cls, model: nn.Module, layer: str, *, train: Split, held_out: Split, mirrored: bool = False) -> "Features":
        """Run the images through the network once, and once more `mirrored`; raises as `received` does."""

        def batches(split: Split) -> list[Batch]:
            return [(received(model, layer, images), labels) for images, labels in split.batches(250)]

        views = [train, replace(train, images=train.images.flip(3))] if mirrored else [train]
        rows = [batch for view in views for batch in batches(view)]
        features, labels = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
        return cls(features, labels, batches(held_out), len(views))

    def soft_targets(self, layer: nn.Module, *, label_share: float = 0.0) -> Tensor:
        """The logits (V * N, C) of a layer, for each view the mean over the image's views.

        Their probabilities have a `label_share` of the true label mixed in.
        """
        with evaluating(layer):
            logits: Tensor = layer(self.train).unflatten(0, (self.views, -1))
        mean = logits.mean(dim=0).repeat(self.views, 1)
        if not label_share:
            return mean
        mixed = mean.log_softmax(dim=1) + log1p(-label_share)
        rows = torch.arange(len(mixed))
        mixed[rows, self.labels] = mixed[rows, self.labels].logaddexp(torch.tensor(log(label_share)))
        return mixed

    def finetuned(self, model: nn.Module, layer: str, *, tuned: Tuned, targets: Tensor, **options: Any) -> Part:
        """A copy of the model that these features are of, with its `layer` trained; options are those of `finetune`."""
        result = finetune(
            model.get_submodule(layer),
            lambda epoch: Minibatches(self.train, targets, tuned.phase.batch, options["seed"], epoch),
            temperature=tuned.temperature or 1.0,
            loss="kl" if targets.is_floating_point() else None,
            **options | {"held_out": self.held_out},
        )
        copied = copy.deepcopy(model)
        copied.set_submodule(layer, result.model)
        return Part(copied, result.history)


def received(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What the last layer receives (N, F) of images. Raises `ModelError` where the network does not end with that
    layer.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
    try:
        with evaluating(model):
            logits = model(images)
    finally:
        hook.remove()
    if len(calls) != 1 or not torch.equal(calls[0][1], logits):
        raise ModelError(f"the network does not end with {layer!r}: it cannot be tuned alone")
    return calls[0][0].detach().clone()


class ClassifierStudy(ConvolutionalStudy):
    """The last layer of a convolutional network at several ranks, beside the whole network under a budget of MACs.

    Attributes:
        model: Of torchvision, such as `torchvision:resnet18`; it is made with as many outputs as there are classes.
        weights: A `.safetensors` file of the trained network, which is then not trained here; or `imagenet` for
            torchvision's own weights to begin with, fetched by torchvision; none trains from scratch.
        size: Side in pixels that the network sees the images at; none leaves them.
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
    """

    kind: Literal["classifier"] = "classifier"
    model: str = "torchvision:resnet18"
    weights: str | None = None
    size: int | None = Field(default=None, ge=1)
    convolution: str = "layer2.1.conv2"
    classifier: str = "fc"
    compressions: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.0, 0.5, 0.8)
    head: Tuned
    head_images: int = Field(ge=1)
    head_mirrored: bool = False
    head_labels: float = Field(default=0.0, ge=0, lt=1)
    macs: float = Field(default=0.5, gt=0, lt=1)
    metric: Metric = "activation"
    forms: tuple[ConvolutionForm, ...] = Field(default=("channel", "spatial", "tucker2"), min_length=1)
    rank_multiple: int = Field(default=1, ge=1)

    def tasks(self) -> Sequence[Task]:
        """The spectra, the classifier at every rank, then the whole network."""
        features = cache(self._features)
        heads = (partial(self._classifier, share=share, features=features) for share in self.compressions)
        analysis = partial(SeedRun.analyse, part="spectra of a convolution and of the classifier")
        return [analysis, *heads, self._whole_network]

    def view(self) -> tuple[Augment, int | None]:
        """As the settings say."""
        return self.augmentation, self.size

    def dense_network(self, images: Images) -> nn.Module:
        """The network, with an output for each class."""
        return resolve(self.model, options={"num_classes": len(images.names)})

    def network_settings(self) -> Mapping[str, object]:
        """Its name, and the weights it begins with."""
        weights = self.weights if self.weights in (None, IMAGENET) else sha256_of(Path(str(self.weights)))
        return {"kind": self.model, "weights": weights}

    def require_available(self) -> None:
        """The network can be made here, and its weights can be read."""
        resolve(self.model, options={"num_classes": 2})
        if self.weights not in (None, IMAGENET):
            read_state(Path(str(self.weights)))

    def require_possible(self, model: nn.Module, example: Tensor) -> None:
        """The network has the layers named, ends with the classifier, and can be as small as the budget."""
        layers = dict(model.named_modules())
        for key, noun in (("convolution", "convolution"), ("classifier", "linear layer")):
            name = getattr(self, key)
            if name not in layers:
                raise ModelError(f"{self.model} has no layer {name!r}{near(name, layers)}; name one in the recipe")
            kind = find_layer_type(layers[name])
            if kind is None or (key == "classifier" and kind.feature_dim(layers[name]) != -1):
                raise ModelError(f"{key} = {name!r} in the recipe is a {type(layers[name]).__name__}, not a {noun}")
        analysis = analyze(model, example)
        received(model, self.classifier, example)
        options = PlanOptions(forms=self.forms, rank_multiple=self.rank_multiple)
        require_possible(analysis, Budget(macs=self.macs), options, metric=self.metric)

    def load_weights(self, model: nn.Module) -> bool:
        """Fill in the weights of a file, or those of ImageNet, which are then trained on."""
        if self.weights == IMAGENET:
            fill_imagenet_(model, self.model, head=self.classifier)
        elif self.weights is not None:
            fill_(model, read_state(Path(self.weights)), origin=Path(self.weights))
        return self.weights not in (None, IMAGENET)

    def _shortened(self) -> Mapping[str, object]:
        return {
            **super()._shortened(),
            "dense": self.dense.in_small_steps(2),
            "size": None,
            "head": self.head.in_small_steps(2),
            "head_images": min(self.head_images, 500),
            # the other metrics and forms take minutes on wide layers, however few the images
            "metric": "plain",
            "forms": ("channel",),
        }

    def analysis(self, run: SeedRun) -> Analysis:
        """Of the convolution and the classifier, in both metrics."""
        layers, images = (self.convolution, self.classifier), run.calibration(min(self.calibration_images, 256))
        calibration = calibrate(run.dense, images, layers={*layers})
        return analyze(run.dense, run.example, calibration=calibration, include=layers)

    def spectra(self, run: SeedRun) -> tuple[LayerSpectrum, ...]:
        """Of the convolution and the classifier, with the explained variance."""
        layers = (self.convolution, self.classifier)
        return tuple(each for each in spectra_of(run.analysis, cumulative=True) if each.layer in layers)

    def _features(self, run: SeedRun) -> Features:
        images = run.images.train.sample(self.head_images, seed=run.seed)
        held_out, mirrored = run.images.held_out, self.head_mirrored
        return Features.of(run.dense, self.classifier, train=images, held_out=held_out, mirrored=mirrored)

    def _classifier(self, run: SeedRun, *, share: float, features: Callable[[SeedRun], Features]) -> Iterator[Network]:
        """The backbone frozen; the control is the dense classifier, which learns from the labels."""
        dense, name = run.dense, self.classifier
        rank = max(1, round((1 - share) * min(dense.get_submodule(name).get_parameter("weight").shape)))
        title = f"classifier at rank {rank} (-{100 * share:g} %)" if share else "classifier dense (-0 %)"
        run.begin(f"{title}: tuning the head")
        candidate = Candidate(run, title, Rank(rank) if share else None, "plain" if share else None)
        small = Part(dense)
        if share:
            make = partial(compress, dense, Rank(rank), example_inputs=run.example, include=(name,))
            small = candidate.compressed(make, classifier=name, rank=rank)
            yield candidate.network("zero-shot", small)
        # one of low rank may learn from the dense one
        has_teacher = share > 0 and self.head.temperature is not None

        def train(checkpoint: Checkpoint) -> Part:
            inputs, teacher = features(run), dense.get_submodule(name)
            targets = inputs.soft_targets(teacher, label_share=self.head_labels) if has_teacher else inputs.labels
            options = run.options(self.head.phase, checkpoint)
            return inputs.finetuned(small.model, name, tuned=self.head, targets=targets, **options)

        images = (self.head_images, self.head_mirrored, self.head_labels)
        key = run.key(start=small.model, teacher=run.key(), head=name, tuned=self.head, images=images)
        yield candidate.finetuned("head tuned", small, train=train, key=key)

    def _whole_network(self, run: SeedRun) -> Iterator[Network]:
        budget, metric, forms, multiple = Budget(macs=self.macs), self.metric, self.forms, self.rank_multiple
        candidate = Candidate(run, f"whole network, {100 * self.macs:g} % of the MACs", budget, metric)
        make = partial(self.under_budget, run, budget, metric=metric, forms=forms, multiple=multiple)
        settings = {"metric": metric, "forms": forms, "multiple": multiple, "images": self.calibration_images}
        return candidate.networks(make, self.tuning, macs=self.macs, **settings)

    def remark(self, images: Images, dense: nn.Module, variants: Sequence[Variant]) -> str:
        """How small a part of the network the classifier is."""
        layer, example = dense.get_submodule(self.classifier), images.test.example(self.latency_batch)
        features = received(dense.eval(), self.classifier, example)
        whole, own = count(dense, example), count(layer, features)
        pairs = ((dense, example), (layer, features))
        whole_ms, own_ms = (measure(model, inputs, rounds=11).latency_ms or 0.0 for model, inputs in pairs)
        shares = {cost: 100 * getattr(own, cost) / getattr(whole, cost) for cost in ("params", "macs")}
        return (
            f"The classifier {self.classifier} holds {own.params:,} of the {whole.params:,} parameters "
            f"({shares['params']:.2g} %), does {shares['macs']:.2g} % of the MACs and takes about "
            f"{100 * own_ms / whole_ms:.1g} % of the time: whatever its rank, the network stays as large and as slow "
            "as it was. What it costs lies in its convolutions."
        )
