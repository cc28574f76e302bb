"""Tuning the last layer alone: on what the frozen network before it gives, worked out once."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from math import log, log1p
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.core.errors import ModelError
from spectrim.core.execution import evaluating
from spectrim.recipes.images import Batch, Minibatches, Split
from spectrim.recipes.seed import Part
from spectrim.recipes.study import Tuned
from spectrim.training import finetune


@dataclass(frozen=True, eq=False)
class Features:
    """What the last layer receives of training images, and of held-out ones in batches.

    The backbone is frozen and images are varied in no other way than by a mirror, so that training on these is training
    on the images.

    Attributes:
        train: All training images as they are, then all mirrored, if they are: (V * N, F) for V views.
        labels: Of every row.
        held_out: Not mirrored.
        views: V, 1 or 2.
    """

    train: Tensor
    labels: Tensor
    held_out: list[Batch]
    views: int = 1

    @classmethod
    def of(cls, model: nn.Module, layer: str, *, train: Split, held_out: Split, mirrored: bool = False) -> "Features":
        """Run the images through the network once, and once more `mirrored`.

        Raises:
            ModelError: the network's answer is not what the layer gives.
        """
        views = [train, train.mirrored()] if mirrored else [train]
        batches = [batch for view in views for batch in _received(model, layer, view)]
        features, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
        return cls(features, labels, list(_received(model, layer, held_out)), len(views))

    def soft_targets(self, layer: nn.Module, *, label_share: float = 0.0) -> Tensor:
        """What is to be learnt of a layer: logits (V * N, C), the mean over an image's views for each of them.

        Args:
            layer: Gives the logits.
            label_share: Of the true label in the probabilities that are learnt.
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

    def finetuned(
        self,
        model: nn.Module,
        layer: str,
        *,
        tuned: Tuned,
        teacher: nn.Module | None,
        seed: int,
        label_share: float = 0.0,
        **options: Any,
    ) -> Part:
        """A copy of the model with its layer trained, and the curve of that.

        Args:
            model: With the same network before the layer as the features were made by.
            layer: Its name.
            tuned: The phase, and the temperature where there is a teacher.
            teacher: The layer to learn from, by its mean over the views; none learns from the labels.
            seed: Of the order of the images.
            label_share: As for `soft_targets`, where there is a teacher.
            **options: For `finetune`.
        """
        targets = self.labels if teacher is None else self.soft_targets(teacher, label_share=label_share)
        result = finetune(
            model.get_submodule(layer),
            lambda epoch: Minibatches(self.train, targets, tuned.phase.batch, seed, epoch),
            temperature=tuned.temperature or 1.0,
            **options | {"held_out": self.held_out, "seed": seed},
        )
        copied = copy.deepcopy(model)
        copied.set_submodule(layer, result.model)
        return Part(copied, result.history)


def received(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What the last layer receives (N, F) of images as the network sees them.

    Raises:
        ModelError: the network's answer is not what the layer gives.
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


def _received(model: nn.Module, layer: str, split: Split) -> Iterator[Batch]:
    for images, labels in split.batches(250):
        yield received(model, layer, images), labels
