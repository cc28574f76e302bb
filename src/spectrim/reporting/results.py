"""What a report shows, as one frozen value that goes to `results.json` and back."""

import math
import statistics
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from spectrim.analysis.spectra import Analysis
from spectrim.benchmark.measurement import Accuracy, Epoch, Measurement, paired_difference
from spectrim.core.display import Displayed
from spectrim.core.files import Frozen, FrozenFile
from spectrim.core.plans import Metric, Plan, Rule
from spectrim.runtimes.timing import Interval

Stage = Literal["dense", "zero-shot", "fine-tuned", "trained"]
Kind = Literal["broken", "mended", "confused"]


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

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.cumulative and len(self.cumulative) != len(self.values):
            raise ValueError(
                f"layer {self.layer!r} has {len(self.values)} singular values, and {len(self.cumulative)} cumulative "
                "shares of their energy"
            )
        return self


def spectra_of(analysis: Analysis, *, cumulative: bool = False) -> tuple[LayerSpectrum, ...]:
    """Every singular value of the analysis, with the share of the energy that the first ones hold where asked for."""
    return tuple(
        LayerSpectrum(
            layer=layer.name,
            kind=layer.kind,
            shape=layer.shape,
            metric=metric,
            values=tuple(spectrum.values.tolist()),
            cumulative=tuple(spectrum.cumulative_energy.tolist()) if cumulative else (),
        )
        for layer in analysis
        for metric, spectrum in layer.spectra.items()
    )


class Agreement(Frozen):
    """How closely a factored network answers as the one it was made from, on the test set.

    The largest difference of any two logits; for scale, the largest absolute logit; how many examples both classify
    alike, and of how many.
    """

    largest_difference: float
    largest_logit: float
    equal: int
    of: int


class Run(Frozen):
    """One seed of a variant: its accuracy on the test set and on held-out training data, and its training curve.

    `agreement` compares the network with the one that it was made from, if both should give the same outputs; `model`
    is the file of the network, relative to the folder of the run.
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

    @property
    def dense(self) -> float | None:
        """Accuracy of their dense network, if it is known."""
        return dict(self.accuracy).get(None)

    @property
    def networks(self) -> tuple[PublishedPoint, ...]:
        """Every network as a point: the dense one, those of a rank from the largest to the smallest, then `points`."""
        ranked = sorted(self.accuracy, key=lambda pair: -math.inf if pair[0] is None else -pair[0])
        names = {None: "dense"} | {rank: f"rank {rank}" for rank, _ in ranked if rank is not None}
        return (*(PublishedPoint(name=names[rank], accuracy=value) for rank, value in ranked), *self.points)


class Tally(Frozen):
    """How the answers of two networks to the same examples compare, as counts.

    Of `total` examples the first network, the dense one, gets `before` right. `broken` were right before and are wrong
    now; `corrected`, whose keyword and key in JSON is `mended`, the reverse; `confused` were wrong, and are in another
    way.
    """

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    total: int = Field(ge=0)
    before: int = Field(ge=0)
    broken: int = Field(ge=0)
    corrected: int = Field(ge=0, alias="mended")
    confused: int = Field(ge=0)

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.broken > self.before or self.corrected + self.confused > self.total - self.before:
            raise ValueError(
                f"counts do not add up: of {self.total} examples {self.before} were right and {self.broken} of them "
                f"became wrong; of the others {self.corrected} became right, {self.confused} are wrong in another way"
            )
        return self

    @property
    def after(self) -> int:
        """Examples that the second network gets right."""
        return self.before - self.broken + self.corrected

    @property
    def difference(self) -> Interval:
        """Accuracy after less before, in [-1, 1], with its 95 % interval; see `paired_difference`."""
        return paired_difference(self.total, worse=self.broken, better=self.corrected)


class ClassChange(Tally):
    """The examples of one class; `name` is what the data set calls it."""

    name: str


class Flipped(Frozen):
    """The test example at `index`, which the two networks answer differently.

    Its `truth` and both answers are classes as positions among `Changes.classes`; `sure_before` and `sure_after` are
    the probabilities that each network gave its own answer. `image` are its pixels, a PNG file in base64.
    """

    index: int = Field(ge=0)
    truth: int = Field(ge=0)
    before: int = Field(ge=0)
    after: int = Field(ge=0)
    sure_before: float = Field(ge=0, le=1)
    sure_after: float = Field(ge=0, le=1)
    image: str = Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")

    @model_validator(mode="after")
    def _did_flip(self) -> Self:
        if self.before == self.after:
            raise ValueError(f"example {self.index} has one answer before and after, {self.before}: it did not change")
        return self

    @property
    def kind(self) -> Kind:
        """`broken`: right before, wrong now; `mended`: the reverse; `confused`: wrong both times."""
        return "broken" if self.before == self.truth else "mended" if self.after == self.truth else "confused"


class Changes(Frozen):
    """What a compressed network answers differently from the dense one, on the test set.

    Attributes:
        variant: Name of the compressed network.
        seeds: That the counts are summed over; an example counts once a seed.
        classes: One entry a class, in the order of the data set.
        flipped: Examples of the first seed that were answered differently: of each kind those in which the networks'
            confidence differs most.
    """

    variant: str
    seeds: tuple[int, ...] = Field(min_length=1)
    classes: tuple[ClassChange, ...] = Field(min_length=1)
    flipped: tuple[Flipped, ...] = ()

    @model_validator(mode="after")
    def _classes_exist(self) -> Self:
        for example in self.flipped:
            if max(example.truth, example.before, example.after) >= len(self.classes):
                raise ValueError(
                    f"example {example.index} is of a class that is not among the {len(self.classes)} classes"
                )
        return self

    @property
    def whole(self) -> Tally:
        """All classes together."""
        return Tally(**{name: sum(getattr(tally, name) for tally in self.classes) for name in Tally.model_fields})


class Results(Displayed, FrozenFile):
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
        changes: What the chosen network answers differently from the dense one.
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
    changes: Changes | None = None
    command: str | None = None
    provenance: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names = [variant.name for variant in (self.dense, *self.variants)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two networks are named {twice[0]!r}")
        if self.chosen is not None and self.chosen not in names:
            raise ValueError(f"the chosen network {self.chosen!r} is not among {', '.join(map(repr, names))}")
        if self.changes is not None and self.changes.variant not in names:
            raise ValueError(f"the changes are of {self.changes.variant!r}, which is no network of these results")
        return self

    @classmethod
    def of_network(
        cls,
        title: str,
        *,
        dense: Measurement,
        compressed: Measurement | None = None,
        stage: Stage = "zero-shot",
        plan: Plan | None = None,
        analysis: Analysis | None = None,
        command: str | None = None,
    ) -> "Results":
        """One network, and what compression made of it: the results of a study of a single step.

        Args:
            title: One line.
            dense: The network as it was; its accuracy is shown where it was measured.
            compressed: The compressed network, if there is one; named `compressed`.
            stage: What has been done to that since.
            plan: What was done to each layer.
            analysis: Where the singular values come from.
            command: What repeats it.
        """
        return cls(
            title=title,
            dense=_network("dense", dense, stage="dense"),
            variants=(_network("compressed", compressed, stage=stage, plan=plan),) if compressed else (),
            chosen="compressed" if compressed else None,
            spectra=spectra_of(analysis) if analysis else (),
            command=command,
        )

    def variant(self, name: str) -> Variant:
        """The variant of this name. Raises `KeyError` when there is none."""
        variants = {variant.name: variant for variant in (self.dense, *self.variants)}
        if name not in variants:
            raise KeyError(f"the results have no network {name!r}; they have {', '.join(variants)}")
        return variants[name]


def _network(name: str, measurement: Measurement, *, stage: Stage, plan: Plan | None = None) -> Variant:
    runs = () if measurement.accuracy is None else (Run(seed=0, test=measurement.accuracy),)
    rule, metric = (plan.rule, plan.metric) if plan else (None, None)
    return Variant(name=name, stage=stage, measurement=measurement, rule=rule, metric=metric, plan=plan, runs=runs)
