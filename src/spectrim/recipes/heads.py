"""Tuning the last layer alone: on what the frozen network before it gives, worked out once."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import ModelError
from spectrim.execution import evaluating
from spectrim.recipes.images import Batch, Minibatches, Part
from spectrim.recipes.tuning import Tuned
from spectrim.training import Finetuned, finetune


@dataclass(frozen=True, eq=False)
class Features:
    """What the last layer receives: of training images (N, F) with their labels (N,), and of held-out ones in batches.

    The backbone is frozen and images are not varied, so that training on these is training on the images.
    """

    train: Tensor
    labels: Tensor
    held_out: list[Batch]

    @classmethod
    def of(cls, model: nn.Module, layer: str, *, train: Part, held_out: Part) -> "Features":
        """Run the images through the network once.

        Raises:
            ModelError: the network's answer is not what the layer gives.
        """
        seen = list(_received(model, layer, train))
        received, labels = (torch.cat(each) for each in zip(*seen, strict=True))
        return cls(received, labels, list(_received(model, layer, held_out)))

    def tuned(
        self, model: nn.Module, layer: str, *, how: Tuned, teacher: nn.Module | None, seed: int, **options: Any
    ) -> tuple[nn.Module, Finetuned]:
        """A copy of the model with its layer trained, and how that went.

        Args:
            model: With the same network before the layer as the features were made by.
            layer: Its name.
            how: The phase, and the temperature where there is a teacher.
            teacher: The layer to learn from; none learns from the labels.
            seed: Of the order of the images.
            **options: For `finetune`.
        """
        done = finetune(
            model.get_submodule(layer),
            lambda epoch: Minibatches(self.train, self.labels, how.phase.batch, seed, epoch),
            teacher=teacher,
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
