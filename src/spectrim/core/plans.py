"""What to do with every layer, as a frozen value that a person can read, edit and keep: rules and plans."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import AliasChoices, ConfigDict, Field, model_validator

from spectrim.core.display import Displayed
from spectrim.core.errors import RuleError
from spectrim.core.files import Frozen, FrozenFile
from spectrim.core.names import Metric as Metric

DENSE = "dense"
"""The form of a layer that stays as it is; the names of the others are those of `spectrim.layers.forms`."""

CostName = Literal["macs", "params", "bytes"]
Limit = Literal["macs", "params", "bytes", "latency"]
_LIMITS: tuple[Limit, ...] = get_args(Limit)
_TIMING: Mapping[str, str | int | None] = MappingProxyType({"runtime": "torch", "batch": None, "threads": 1})
"""What only a latency has, and the default of each."""
_Name = TypeVar("_Name", bound=str)


class _InFile:
    """In a file, a field that the rule does not have is an error."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Rank(_InFile):
    """Keep `rank` singular values in every layer, a whole number from 1 to the layer's full rank."""

    rank: int
    rule: Literal["rank"] = field(default="rank", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if not _is_whole(self.rank):
            raise RuleError(f"Rank({self.rank!r}): a rank is a whole number of at least 1, such as Rank(20)")

    def __str__(self) -> str:
        return f"Rank({self.rank})"


@dataclass(frozen=True)
class Ratio(_InFile):
    """Keep this share of every layer's singular values, in (0, 1]; rounded down, at least one value stays."""

    ratio: float
    rule: Literal["ratio"] = field(default="ratio", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        _require_share(self.ratio, f"Ratio({self.ratio!r}): a ratio is the share of singular values to keep")

    def __str__(self) -> str:
        return f"Ratio({self.ratio:g})"

    def rank_of(self, full: int) -> int:
        """How many of `full` singular values are kept."""
        # the small addition keeps 0.29 * 100 from becoming 28
        return max(1, int(self.ratio * full + 1e-9))


@dataclass(frozen=True)
class Energy(_InFile):
    """Keep the smallest rank whose share of the energy (sum of squared singular values) is at least this, in (0, 1]."""

    energy: float
    rule: Literal["energy"] = field(default="energy", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        _require_share(self.energy, f"Energy({self.energy!r}): an energy is a share of the squared singular values")

    def __str__(self) -> str:
        return f"Energy({self.energy:g})"


@dataclass(frozen=True, kw_only=True)
class Budget(_InFile):
    """What the whole network may cost, as a share of the dense network in (0, 1); exactly one of the four.

    Forms and ranks of all layers are then chosen together, so that the error is smallest.

    Attributes:
        macs: Multiply-accumulates of one forward pass.
        params: Parameters.
        bytes: Bytes of the weights' file.
        latency: Time of one forward pass on this machine, as it is measured.
        runtime: Of a latency: what runs the network, one of `spectrim.runtimes.RUNTIMES`; by default `torch`.
        batch: Of a latency: how many inputs a pass has; by default as many as the example inputs.
        threads: Of a latency: how many threads run it; by default 1.
        of: "body": MACs or parameters are a share of those of the layers that can shrink, not of the whole network's,
            of which embeddings may be half.
    """

    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    runtime: str | None = None
    batch: int | None = None
    threads: int | None = None
    of: Literal["body"] | None = None
    rule: Literal["budget"] = field(default="budget", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        limits, timing = self._set(_LIMITS), self._set(_TIMING)
        if len(limits) != 1:
            raise RuleError(f"a Budget limits exactly one of {', '.join(_LIMITS)}, not {len(limits)}: Budget(macs=0.5)")
        ((name, value),) = limits.items()
        if not _is_share(value) or value == 1:
            example = f"Budget({name}={value / 100 if _is_whole(value) and 1 < value < 100 else 0.5:g})"
            fault = "a budget is a share of the dense network, between 0 and 1"
            raise RuleError(f"Budget({name}={value!r}): {fault}: {example}")
        if self.of is not None and (self.of != "body" or name not in ("macs", "params")):
            raise RuleError(
                f"of={self.of!r}: a share of the layers that can shrink is Budget(params=0.7, of='body') or macs="
            )
        if self.latency is None and timing:
            named = ", ".join(f"{name}={value!r}" for name, value in timing.items())
            raise RuleError(f"{named} belongs to a latency; leave it out, or give Budget(latency=.., {named})")
        if self.latency is None:
            return
        for option, default in _TIMING.items():
            object.__setattr__(self, option, timing.get(option, default))  # a frozen value sets itself up
        if not isinstance(self.runtime, str) or not self.runtime:
            raise RuleError(f"Budget(runtime={self.runtime!r}): name a runtime, such as 'onnxruntime'")
        for option in {"batch", "threads"} & timing.keys():
            if not _is_whole(timing[option]):
                raise RuleError(f"Budget({option}={timing[option]!r}): give a whole number of at least 1")

    def _set(self, names: Iterable[_Name]) -> dict[_Name, Any]:
        """Those of the fields that have a value."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def limits(self) -> Limit:
        """What is limited."""
        return next(iter(self._set(_LIMITS)))

    @property
    def share(self) -> float:
        """The share of the dense network's cost that may be kept."""
        return float(getattr(self, self.limits))

    def __str__(self) -> str:
        timing = "".join(f", {name}={value!r}" for name, value in self._set(_TIMING).items())
        body = "" if self.of is None else f", of={self.of!r}"
        return f"Budget({self.limits}={self.share:g}{timing}{body})"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _require_share(value: float, message: str) -> None:
    if not _is_share(value):
        raise RuleError(f"{message}, above 0 and at most 1, such as 0.9")


Rule = Rank | Ratio | Energy | Budget


class Cost(Frozen):
    """What a layer costs: `params` numbers stored (weights and bias), `macs` multiply-accumulates of a forward pass."""

    params: int = Field(ge=0)
    macs: int = Field(ge=0)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(params=self.params + other.params, macs=self.macs + other.macs)


class LayerPlan(Frozen):
    """The decision for one weight.

    Attributes:
        name: The layer's dotted name in the model.
        tied_names: Other layers that use the same weight; they share its factors. In the file: `also`.
        kind: The layer's class, such as `Linear`.
        shape: The weight's shape, as it is stored.
        form: `linear` (two factors), `channel` (the kernel into fewer channels, then out of them), `spatial` (a column
            of the kernel, then a row), `tucker2` (fewer channels, the kernel between them, then out), `width` (fewer
            neurons between this layer and others), or `dense`.
        metric: The metric in which the factors are best, absent for dense layers.
        rank: How many singular values stay (in each group of a grouped convolution), absent for dense layers.
        rank_in: The tucker2 form's other rank: channels that its kernel starts from; `rank` are those it ends in.
        full_rank: The largest rank the weight can have, absent where there is none.
        break_even: The largest rank at which the factors are smaller than the layer (0: none is).
        predicted_error: The relative error of the layer's weight (plain) or of its varying output (activation).
        dense: The layer's cost before.
        kept: Its cost afterwards.
        frozen: Of a dense layer: its weight must not be touched; reconstruction fits the others anew. In the file:
            `fixed`.
        unit: Of a layer that is narrowed together with others, by `width`, the name of the one of them that reads what
            the others give; else absent.
        stack: Of an expert of a mixture what its projection of all experts is called; absent for other layers.
        reason: Why this form and rank, in words.
    """

    name: str
    tied_names: tuple[str, ...] = Field(
        default=(), validation_alias=AliasChoices("tied_names", "also"), serialization_alias="also"
    )
    kind: str
    shape: tuple[int, ...]
    form: str
    metric: Metric | None = None
    rank: int | None = Field(default=None, ge=1)
    rank_in: int | None = Field(default=None, ge=1)
    full_rank: int | None = Field(default=None, ge=0)
    break_even: int | None = Field(default=None, ge=0)
    predicted_error: float | None = Field(default=None, ge=0)
    dense: Cost
    kept: Cost
    frozen: bool = Field(default=False, validation_alias=AliasChoices("frozen", "fixed"), serialization_alias="fixed")
    unit: str | None = None
    stack: str | None = None
    reason: str

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.is_factored:
            if self.rank is not None or self.rank_in is not None or self.metric is not None:
                raise ValueError(f"layer {self.name!r} is dense, so it has neither rank nor metric")
        elif self.rank is None or self.metric is None or self.full_rank is None:
            raise ValueError(f"layer {self.name!r} in the {self.form} form needs a rank, a full_rank and a metric")
        elif self.rank > self.full_rank:
            raise ValueError(f"layer {self.name!r}: rank {self.rank} is above its full rank {self.full_rank}")
        return self

    @property
    def is_factored(self) -> bool:
        """Whether the layer is replaced."""
        return self.form != DENSE

    @property
    def names(self) -> tuple[str, ...]:
        """`name` and `tied_names`."""
        return self.name, *self.tied_names

    @property
    def ranks(self) -> tuple[int, ...]:
        """(rank,), or (rank_in, rank) in the tucker2 form; nothing for a dense layer."""
        return tuple(rank for rank in (self.rank_in, self.rank) if rank is not None)


class LatencyNote(Frozen):
    """What a plan was expected to take and what it took, as shares of the dense network in the same runtime.

    Attributes:
        runtime: What ran the networks.
        threads: With so many threads.
        batch: Inputs of one pass; absent where the example inputs were taken as they are.
        fingerprint: The machine, the runtime and the versions that the times belong to.
        dense_ms: One pass of the dense network, in milliseconds.
        predicted: The share that the table of layer latencies predicts.
        measured: The share that was measured, dense and factored passes in turn; absent if it was not.
        low: Lower end of its 95 % interval.
        high: Upper end of its 95 % interval.
        solved: How often forms and ranks were chosen: 2 where the first measurement was too far from its prediction.
        missed: Why the target was not met, if it was not.
        refused: Why every layer stays dense, if no faster network was found.
    """

    runtime: str
    threads: int = Field(ge=1)
    batch: int | None = Field(default=None, ge=1)
    fingerprint: str
    dense_ms: float = Field(gt=0)
    predicted: float
    measured: float | None = Field(default=None, gt=0)
    low: float | None = Field(default=None, gt=0)
    high: float | None = Field(default=None, gt=0)
    solved: int = Field(default=1, ge=1)
    missed: str | None = None
    refused: str | None = None

    @property
    def verified(self) -> bool:
        """Whether a network made by this plan was timed."""
        return self.measured is not None


class Plan(Displayed, FrozenFile):
    """What happens to every layer of one model. Made by `st.plan`, applied by `st.compress`, edited by hand as JSON.

    Attributes:
        rule: What was asked.
        metric: In what the errors count.
        layers: The decision for each weight.
        rank_multiple: Divides the ranks, if that was asked for or probed. Full ranks and, under a budget of latency,
            smaller ranks of small layers are exempt.
        latency: Under a budget of latency: what was predicted, and measured.
    """

    indent: ClassVar[int] = 2
    version: Literal[1] = 1
    rule: Annotated[Rule, Field(discriminator="rule")]
    metric: Metric
    rank_multiple: int | None = Field(default=None, ge=1)
    latency: LatencyNote | None = None
    layers: tuple[LayerPlan, ...]

    @model_validator(mode="after")
    def _names_once(self) -> Self:
        names = [name for layer in self.layers for name in layer.names]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"layer {twice[0]!r} stands twice in the plan")
        return self

    def __iter__(self) -> Iterator[LayerPlan]:  # type: ignore[override]  # pydantic iterates fields; layers are what is wanted
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerPlan:
        for layer in self.layers:
            if name in layer.names:
                return layer
        raise KeyError(f"the plan has no layer {name!r}; it has {', '.join(layer.name for layer in self.layers)}")

    def feeders(self, unit: str) -> tuple[str, ...]:
        """Names of the layers that are narrowed together with the one of this name, which reads them."""
        return tuple(layer.name for layer in self.layers if layer.unit == unit != layer.name)

    @property
    def factored(self) -> tuple[LayerPlan, ...]:
        """The layers that are replaced."""
        return tuple(layer for layer in self.layers if layer.is_factored)

    @property
    def dense_cost(self) -> Cost:
        """The cost of all planned layers before."""
        return sum((layer.dense for layer in self.layers), Cost(params=0, macs=0))

    @property
    def kept_cost(self) -> Cost:
        """The cost of all planned layers afterwards."""
        return sum((layer.kept for layer in self.layers), Cost(params=0, macs=0))
