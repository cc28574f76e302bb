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
from spectrim.recipes.images import Batch, Minibatches, Part
from spectrim.recipes.tuning import Tuned
from spectrim.training import Finetuned, finetune


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
    def of(cls, model: nn.Module, layer: str, *, train: Part, held_out: Part, mirrored: bool = False) -> "Features":
        """Run the images through the network once, and once more `mirrored`.

        Raises:
            ModelError: the network's answer is not what the layer gives.
        """
        views = [train, train.mirrored()] if mirrored else [train]
        seen = [each for view in views for each in _received(model, layer, view)]
        received, labels = (torch.cat(each) for each in zip(*seen, strict=True))
        return cls(received, labels, list(_received(model, layer, held_out)), len(views))

    def answers(self, layer: nn.Module, *, label_share: float = 0.0) -> Tensor:
        """What is to be learnt of a layer: logits (V * N, C), the mean over an image's views for each of them.

        Args:
            layer: Gives the logits.
            label_share: Of the true label in the probabilities that are learnt.
        """
        with evaluating(layer):
            given: Tensor = layer(self.train).unflatten(0, (self.views, -1))
        taught = given.mean(dim=0).repeat(self.views, 1)
        if not label_share:
            return taught
        mixed = taught.log_softmax(dim=1) + log1p(-label_share)
        rows = torch.arange(len(mixed))
        mixed[rows, self.labels] = mixed[rows, self.labels].logaddexp(torch.tensor(log(label_share)))
        return mixed

    def tuned(
        self,
        model: nn.Module,
        layer: str,
        *,
        how: Tuned,
        teacher: nn.Module | None,
        seed: int,
        label_share: float = 0.0,
        **options: Any,
    ) -> tuple[nn.Module, Finetuned]:
        """A copy of the model with its layer trained, and how that went.

        Args:
            model: With the same network before the layer as the features were made by.
            layer: Its name.
            how: The phase, and the temperature where there is a teacher.
            teacher: The layer to learn from, by its mean over the views; none learns from the labels.
            seed: Of the order of the images.
            label_share: As for `answers`, where there is a teacher.
            **options: For `finetune`.
        """
        targets = self.labels if teacher is None else self.answers(teacher, label_share=label_share)
        done = finetune(
            model.get_submodule(layer),
            lambda epoch: Minibatches(self.train, targets, how.phase.batch, seed, epoch),
            temperature=how.temperature or 1.0,
            **options | {"held_out": self.held_out, "seed": seed},
        )
        better = copy.deepcopy(model)
        better.set_submodule(layer, done.model)
        return better, done


def received(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What the last layer receives (N, F) of images as the network sees them.

    Raises:
        ModelError: the network's answer is not what the layer gives.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    try:
        with evaluating(model):
            answer = model(images)
    finally:
        hook.remove()
    if len(seen) != 1 or not torch.equal(seen[0][1], answer):
        raise ModelError(f"the network does not end with {layer!r}: it cannot be tuned alone")
    return seen[0][0].detach().clone()


def _received(model: nn.Module, layer: str, part: Part) -> Iterator[Batch]:
    for images, labels in part.batches(250):
        yield received(model, layer, images), labels
