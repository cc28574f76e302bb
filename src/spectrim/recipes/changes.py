"""What a compressed network predicts differently from the dense one."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from spectrim.recipes.images import Images
from spectrim.reporting.pixels import png_text
from spectrim.reporting.results import Changes, ClassChange, Flipped, Kind

_MOST_SHOWN: Mapping[Kind, int] = {"broken": 24, "mended": 12, "confused": 12}
"""Images of each kind that a report holds, broken ones first. In colour, 32 pixels wide, they come to 150 kB."""

_COUNTS = ("total", "before", *_MOST_SHOWN)


class _Predictions:
    """Of two networks for the test images: the probabilities (N, classes) and classes (N,) of both."""

    def __init__(self, dense: nn.Module, small: nn.Module, images: Images) -> None:
        self.labels = images.test.labels
        self.dense, self.small = (images.test.logits(model).softmax(dim=1) for model in (dense, small))
        self.before, self.after = self.dense.argmax(dim=1), self.small.argmax(dim=1)
        right, right_after = self.before == self.labels, self.after == self.labels
        # which images count where, bool (N,) by the names in _COUNTS
        self.masks = {
            "total": self.labels >= 0,
            "before": right,
            "broken": right & ~right_after,
            "mended": ~right & right_after,
            "confused": ~right & ~right_after & (self.before != self.after),
        }

    def counts(self, classes: int) -> Tensor:
        """Of every class, int64 (len(_COUNTS), classes)."""
        return torch.stack([torch.bincount(self.labels[self.masks[name]], minlength=classes) for name in _COUNTS])

    def most_moved(self, kind: Kind) -> list[int]:
        """The images of a kind to show: the largest changes of probability first, of equal ones the first image."""
        change = self.small - self.dense
        # how much more the second network believes in the new class, and how much less in the old one
        moved = (change.gather(1, self.after[:, None]) - change.gather(1, self.before[:, None]))[:, 0]
        index = self.masks[kind].nonzero()[:, 0]
        order = moved[index].argsort(descending=True, stable=True)
        return [int(position) for position in index[order[: _MOST_SHOWN[kind]]]]

    def flipped(self, images: Images) -> Iterator[Flipped]:
        """The images to show."""
        for kind in _MOST_SHOWN:
            for index in self.most_moved(kind):
                pixels = images.test.images[index] * images.deviation + images.mean
                yield Flipped(
                    index=index,
                    truth=int(self.labels[index]),
                    before=int(self.before[index]),
                    after=int(self.after[index]),
                    sure_before=round(min(1.0, float(self.dense[index].max())), 4),
                    sure_after=round(min(1.0, float(self.small[index].max())), 4),
                    image=png_text(pixels.round().clamp(0, 255).byte().numpy()),
                )


def changes_of(variant: str, pairs: Mapping[int, tuple[nn.Module, nn.Module]], images: Images) -> Changes:
    """Compare two networks on the test images: by seed, the dense one and the compressed one, named `variant`.

    Counts are summed over the seeds; images are shown of the first.
    """
    predictions = [_Predictions(dense, small, images) for dense, small in pairs.values()]
    columns = torch.stack([each.counts(len(images.names)) for each in predictions]).sum(dim=0).T.tolist()
    classes = tuple(
        ClassChange(name=name, **dict(zip(_COUNTS, column, strict=True)))
        for name, column in zip(images.names, columns, strict=True)
    )
    flipped = tuple(predictions[0].flipped(images))
    return Changes(variant=variant, seeds=tuple(pairs), classes=classes, flipped=flipped)
