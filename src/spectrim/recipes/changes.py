"""What a compressed network answers differently from the dense one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.core.execution import evaluating
from spectrim.recipes.images import Images
from spectrim.reporting.pixels import png_text
from spectrim.reporting.results import Changes, ClassChange, Flipped, Kind

Pair = tuple[nn.Module, nn.Module]

_SHOWN: Mapping[Kind, int] = {"broken": 24, "mended": 12, "confused": 12}
"""Images of each kind that a report holds: what was lost first. In colour, 32 pixels wide, they come to 150 kB."""


@dataclass(frozen=True, eq=False)
class _Answers:
    """Of two networks to the test images: both answers (N,), and their probabilities (N,)."""

    truth: Tensor
    before: Tensor
    after: Tensor
    sure_before: Tensor
    sure_after: Tensor
    moved: Tensor

    @classmethod
    def of(cls, dense: nn.Module, small: nn.Module, images: Images) -> "_Answers":
        first, second = _probabilities(dense, images), _probabilities(small, images)
        (sure_before, before), (sure_after, after) = first.max(dim=1), second.max(dim=1)
        change = second - first
        # how much more the second one believes in the new answer, and how much less in the old one
        moved = (change.gather(1, after[:, None]) - change.gather(1, before[:, None]))[:, 0]
        return cls(images.test.labels, before, after, sure_before, sure_after, moved)

    def of_kind(self, kind: Kind) -> Tensor:
        """Which images, bool (N,)."""
        match kind:
            case "broken":
                return (self.before == self.truth) & (self.after != self.truth)
            case "mended":
                return (self.before != self.truth) & (self.after == self.truth)
            case "confused":
                return (self.before != self.truth) & (self.after != self.truth) & (self.before != self.after)

    def most_moved(self, kind: Kind) -> list[int]:
        """The images of a kind to show: the largest moves first, of equal ones the first image."""
        which = self.of_kind(kind).nonzero()[:, 0]
        order = self.moved[which].argsort(descending=True, stable=True)
        return [int(at) for at in which[order[: _SHOWN[kind]]]]


def changes_of(variant: str, pairs: Mapping[int, Pair], images: Images) -> Changes:
    """Compare two networks on the test images.

    Args:
        variant: Name of the compressed one.
        pairs: By seed, the dense network and the compressed one; images are shown of the first.
        images: The data set.
    """
    answers = [_Answers.of(dense, small, images) for dense, small in pairs.values()]
    counted = [_counted(one, len(images.names)) for one in answers]
    # by class, summed over the seeds: total, before, broken, mended, confused
    columns = torch.stack(counted).sum(dim=0).T.tolist()
    classes = tuple(
        ClassChange(name=name, **dict(zip(_COUNTS, column, strict=True)))
        for name, column in zip(images.names, columns, strict=True)
    )
    return Changes(variant=variant, seeds=tuple(pairs), classes=classes, flipped=tuple(_flipped(answers[0], images)))


_COUNTS = ("total", "before", *_SHOWN)


def _counted(answers: _Answers, classes: int) -> Tensor:
    """The counts of every class, int64 (len(_COUNTS), classes)."""
    truth = answers.truth
    which = (truth >= 0, answers.before == truth, *map(answers.of_kind, _SHOWN))
    return torch.stack([torch.bincount(truth[one], minlength=classes) for one in which])


def _flipped(answers: _Answers, images: Images) -> Iterator[Flipped]:
    for kind in _SHOWN:
        for at in answers.most_moved(kind):
            pixels = images.test.images[at] * images.deviation + images.mean
            yield Flipped(
                index=at,
                truth=int(answers.truth[at]),
                before=int(answers.before[at]),
                after=int(answers.after[at]),
                sure_before=_short(answers.sure_before[at]),
                sure_after=_short(answers.sure_after[at]),
                image=png_text(pixels.round().clamp(0, 255).byte().numpy()),
            )


def _short(probability: Tensor) -> float:
    return round(min(1.0, float(probability)), 4)


def _probabilities(model: nn.Module, images: Images) -> Tensor:
    """Of every class, float32 (N, classes), in the order of the test set."""
    with evaluating(model):
        return torch.cat([model(some) for some, _ in images.test.batches()]).softmax(dim=1)
