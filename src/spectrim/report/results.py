"""What a report shows, as one frozen value that goes to `results.json` and back."""

import statistics
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from spectrim.files import Frozen, parse, read_text, write_text
from spectrim.measure import Accuracy, Epoch, Measurement
from spectrim.plan import Metric, Plan, Rule

Stage = Literal["dense", "zero-shot", "fine-tuned", "trained"]


class LayerSpectrum(Frozen):
    """Singular values of one layer in one metric, largest first.

    Attributes:
        layer: Its name.
        kind: Its class, such as `Linear`.
        shape: The weight's, output first.
        metric: What the values are of.
        values: The singular values.
        cumulative: Share of the energy that the first 1..k of them hold (the explained variance), where a study asks
            for it.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    metric: Metric
    values: tuple[float, ...]
    cumulative: tuple[float, ...] = ()


class Agreement(Frozen):
    """How closely a factored network answers as the one it was made from, on the test set.

    Attributes:
        largest_difference: Of any two logits.
        largest_logit: For scale, the largest absolute value of a logit.
        equal: Examples that both classify alike.
        of: All examples.
    """

    largest_difference: float
    largest_logit: float
    equal: int
    of: int


class Run(Frozen):
    """One seed of a variant: its accuracy on the test set and on held-out training data, and its training curve.

    `agreement` is there where the network was made from another one with the same outputs; `model` is the file of the
    network, relative to the folder of the run.
    """

    seed: int
    test: Accuracy
    held_out: Accuracy | None = None
    curve: tuple[Epoch, ...] = ()
    agreement: Agreement | None = None
    model: str | None = None


class Variant(Frozen):
    """One network of a study.

    Attributes:
        name: Short and unique, such as `rank 20, activation, fine-tuned`.
        stage: `dense`, `zero-shot` (compressed, not trained again), `fine-tuned`, or `trained` (at low rank, with
            the SVD inside the training).
        measurement: Costs, and latency against dense; from the first seed.
        rule: What was asked of every layer.
        metric: What the approximation error was measured on.
        plan: Per layer what was done; from the first seed.
        runs: One entry a seed.
        in_runtimes: The same as `measurement` in further runtimes, each named by its own `runtime`.
    """

    name: str
    stage: Stage
    measurement: Measurement
    rule: Annotated[Rule, Field(discriminator="rule")] | None = None
    metric: Metric | None = None
    plan: Plan | None = None
    runs: tuple[Run, ...] = ()
    in_runtimes: tuple[Measurement, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """Mean test accuracy over the seeds, in [0, 1]."""
        return statistics.fmean(run.test.value for run in self.runs) if self.runs else None

    @property
    def spread(self) -> float | None:
        """Sample standard deviation of the test accuracy over the seeds; None for fewer than two."""
        return statistics.stdev(run.test.value for run in self.runs) if len(self.runs) > 1 else None


class PublishedPoint(Frozen):
    """A compressed network of somebody else.

    Attributes:
        name: What it is, such as `75 % energy, fine-tuned`.
        accuracy: In [0, 1].
        params_ratio: kept / dense, if it is known.
        macs_ratio: kept / dense, if it is known.
        speedup: Time of the dense network over its time, if it is known.
    """

    name: str
    accuracy: float = Field(ge=0, le=1)
    params_ratio: float | None = Field(default=None, gt=0)
    macs_ratio: float | None = Field(default=None, gt=0)
    speedup: float | None = Field(default=None, gt=0)


class Published(Frozen):
    """Somebody else's figures for the same study.

    Attributes:
        source: Whose.
        accuracy: In [0, 1] by rank; rank None is the dense network.
        points: Networks that no single rank describes.
    """

    source: str
    accuracy: tuple[tuple[int | None, float], ...]
    points: tuple[PublishedPoint, ...] = ()


class Results(Frozen):
    """A study, measured.

    Attributes:
        title: One line.
        summary: What was compressed and what came out, in a sentence or two for somebody who has not read the code.
        dense: The network as it was.
        variants: The compressed networks, in the order of the tables.
        chosen: Name of the variant that was saved, if any.
        chosen_because: Why it is this one.
        spectra: Singular values by layer and metric, of the first seed.
        published: Figures to compare with.
        command: What repeats the study.
        provenance: Versions, machine, seeds, data and their checksums, duration; shown at the foot.
    """

    version: Literal[1] = 1
    title: str
    summary: str = ""
    dense: Variant
    variants: tuple[Variant, ...]
    chosen: str | None = None
    chosen_because: str = ""
    spectra: tuple[LayerSpectrum, ...] = ()
    published: tuple[Published, ...] = ()
    command: str | None = None
    provenance: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names = [one.name for one in (self.dense, *self.variants)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two networks are named {twice[0]!r}")
        if self.chosen is not None and self.chosen not in names:
            raise ValueError(f"the chosen network {self.chosen!r} is not among {', '.join(map(repr, names))}")
        return self

    def variant(self, name: str) -> Variant:
        """The variant of this name. Raises `KeyError` when there is none."""
        for one in (self.dense, *self.variants):
            if one.name == name:
                return one
        raise KeyError(
            f"the results have no network {name!r}; they have {', '.join(one.name for one in self.variants)}"
        )

    def save(self, path: str | Path) -> Path:
        """Write the results as JSON. Raises `FileError` when the file cannot be written."""
        return write_text(Path(path), self.model_dump_json(indent=1, exclude_none=True) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Read results. Raises `FileError` for a missing, cut or invalid file."""
        return parse(cls, read_text(Path(path)), origin=str(path))
