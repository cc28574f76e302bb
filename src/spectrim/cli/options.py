"""The options that the commands on a network share, each declared once: dataclasses whose fields are options."""

import ast
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from spectrim.core.plans import CONVOLUTION_FORMS, Budget, Energy, FormName, Metric, Rank, Ratio, Rule
from spectrim.runtimes.sessions import RUNTIMES

_NETWORK, _DATA, _LAYERS, _RULE = (
    "The network",
    "The data",
    "Which layers",
    "How small (exactly one of the first seven)",
)
_TIMED = ("runtime", "threads", "latency_batch")
_METRICS: tuple[Metric, ...] = ("plain", "activation", "loss")
_RULES: Mapping[str, Callable[[Any], Rule]] = {
    "macs": lambda share: Budget(macs=share),
    "params": lambda share: Budget(params=share),
    "bytes": lambda share: Budget(bytes=share),
    "latency": lambda share: Budget(latency=share),  # in what runtime is added to it
    "rank": Rank,
    "ratio": Ratio,
    "energy": Energy,
}
_Name = TypeVar("_Name", bound=str)


def unfolded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of its dataclass parameters; typer knows no dataclasses."""
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if is_dataclass(kind) and isinstance(kind, type)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        parameters += _options(groups[name]) if name in groups else [parameter]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        made = {name: kind(**{one.name: given.pop(one.name) for one in fields(kind)}) for name, kind in groups.items()}
        command(**made, **given)

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # where inspect looks for it
    return run


def _options(group: type) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for name, parameter in inspect.signature(group).parameters.items():
        yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])


Model = Annotated[
    str,
    typer.Option(
        metavar="REF",
        rich_help_panel=_NETWORK,
        help="spectrim:NAME, torchvision:NAME, timm:NAME, or pkg.module:factory, which RUNS THE CODE of that "
        "module: name only code that you trust.",
    ),
]
Option = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        rich_help_panel=_NETWORK,
        help="An argument of the network's factory, such as outputs=47. Can be repeated.",
    ),
]
Flatten = Annotated[
    bool,
    typer.Option("--flatten", rich_help_panel=_NETWORK, help="The network takes vectors: (batch, C * H * W)."),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", rich_help_panel=_DATA, help="Where its raw files lie, if you have them."),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="0.5,0.5,0.5",
        rich_help_panel=_DATA,
        help="The network takes (pixel / 255 - mean) / std; one value, or one a channel. By default cifar10 is "
        "normalised as spectrim.models.cifar_inputs does, and other images are pixel / 255. Networks of "
        "`spectrim recipe mnist-mlp` want --mean 0.1307 --std 0.3081.",
    ),
]
Std = Annotated[str | None, typer.Option(metavar="0.2,0.2,0.2", rich_help_panel=_DATA, help="See --mean.")]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A network, and the images or the shape it is run on."""

    model: Model
    weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_NETWORK, help="Its trained weights, a .safetensors file."),
    ] = None
    option: Option = None
    input: Annotated[
        str | None,
        typer.Option(metavar="3,32,32", rich_help_panel=_NETWORK, help="Shape of one input, where there is no --data."),
    ] = None
    flatten: Flatten = False
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_DATA,
            help="A data set of `spectrim data list`, obtained first if need be. Calibration images come from its "
            "training split. Without --data only the weights are looked at.",
        ),
    ] = None
    data_folder: DataFolder = None
    images: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=_DATA, help="Calibration images.")] = 1024
    batch: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=_DATA, help="Images at a time.")] = 256
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, rich_help_panel=_DATA, help="Decides which images are drawn.")
    ] = 0
    cache: Annotated[
        int | None,
        typer.Option(
            metavar="MB",
            min=0,
            rich_help_panel=_DATA,
            help="Megabytes of activations kept between passes, for speed only; by default as much as the statistics "
            "take, and at least 168.",
        ),
    ] = None
    mean: Mean = None
    std: Std = None

    @property
    def cache_bytes(self) -> int | None:
        """What weighing and fitting layers may keep."""
        return None if self.cache is None else self.cache * 10**6

    @property
    def runs_code(self) -> bool:
        """Whether the reference names a module that is imported for it."""
        return self.model.partition(":")[0] not in ("spectrim", "torchvision", "timm")

    @property
    def options(self) -> dict[str, object]:
        """The arguments of the factory: numbers, True, None and the like as such, anything else as text."""
        found: dict[str, object] = {}
        for text in self.option or ():
            name, sign, value = text.partition("=")
            if not (sign and name.isidentifier()) or name in found:
                raise typer.BadParameter(f"--option {text}: write each name once, as in --option outputs=47")
            try:
                found[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                found[name] = value
        return found


@dataclass(frozen=True, kw_only=True)
class WithSource:
    """Of a group of options that has some of those of `Source` under the same names."""

    @property
    def source(self) -> Source:
        """The network as the other commands know it, without its weights, which this group gives another meaning."""
        own, known = ({one.name for one in fields(group)} for group in (self, Source))
        return Source(**{name: getattr(self, name) for name in own & known - {"weights"}})


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Which layers may be factored."""

    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", rich_help_panel=_LAYERS, help="Layers to factor, as in 'layer3.*'. Can be repeated."
        ),
    ] = None
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", rich_help_panel=_LAYERS, help="Layers to leave as they are. Can be repeated."),
    ] = None
    keep_last: Annotated[
        bool,
        typer.Option("--keep-last", rich_help_panel=_LAYERS, help="Leave the last layer that is called as it is."),
    ] = False

    @property
    def included(self) -> tuple[str, ...]:
        """The patterns to factor."""
        return tuple(self.include or ("*",))

    @property
    def excluded(self) -> tuple[str, ...]:
        """The patterns to leave."""
        return tuple(self.exclude or ())


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A rule, and in what metric and forms it is followed."""

    macs: Annotated[
        float | None,
        typer.Option(metavar="SHARE", rich_help_panel=_RULE, help="Keep this share of the network's MACs: 0.5."),
    ] = None
    params: Annotated[
        float | None, typer.Option(metavar="SHARE", rich_help_panel=_RULE, help="Keep this share of its parameters.")
    ] = None
    bytes: Annotated[
        float | None, typer.Option(metavar="SHARE", rich_help_panel=_RULE, help="Keep this share of its file size.")
    ] = None
    latency: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", rich_help_panel=_RULE, help="Keep this share of the time it takes here, see --runtime."
        ),
    ] = None
    rank: Annotated[int | None, typer.Option(metavar="N", rich_help_panel=_RULE, help="Every layer at this rank.")] = (
        None
    )
    ratio: Annotated[
        float | None,
        typer.Option(metavar="SHARE", rich_help_panel=_RULE, help="Keep this share of each layer's singular values."),
    ] = None
    energy: Annotated[
        float | None,
        typer.Option(metavar="SHARE", rich_help_panel=_RULE, help="Keep this share of each layer's energy."),
    ] = None
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="plain|activation|loss",
            rich_help_panel=_RULE,
            help="Errors count in the weights, in the layers' outputs on the data (default where there is --data), or "
            "in these outputs by how much the network's answer feels them.",
        ),
    ] = None
    form: Annotated[
        list[str] | None,
        typer.Option(
            metavar="channel|spatial|tucker2",
            rich_help_panel=_RULE,
            help="A form that convolutions may take. Can be repeated. By default any for --macs, --params, --bytes "
            "and --latency, and channel for the others.",
        ),
    ] = None
    rank_multiple: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            rich_help_panel=_RULE,
            help="Only ranks that N divides, or the step that is probed on this machine and runtime (default for "
            "--latency).",
        ),
    ] = None
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_RULE,
            help=f"What --latency, or --rank-multiple auto, is timed in: {', '.join(RUNTIMES)}; by default torch.",
        ),
    ] = None
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, rich_help_panel=_RULE, help="With so many threads; 1 by default.")
    ] = None
    latency_batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, rich_help_panel=_RULE, help="Inputs of a pass that is timed; 1 by default."),
    ] = None

    @property
    def rule(self) -> Rule:
        """The one rule that was given."""
        given = self.rules
        if len(given) != 1:
            got = f"{' and '.join(given)} are {len(given)}" if given else "none was given"
            raise typer.BadParameter(
                f"say how small by exactly one of {', '.join(map(_flag, _RULES))} (or a --plan); {got}"
            )
        ((name, value),) = given.items()
        timed = {name: one for name in _TIMED if (one := getattr(self, name)) is not None}
        if self.latency is not None:
            return Budget(latency=value, runtime=self.runtime, threads=self.threads, batch=self.latency_batch)
        if timed and self.multiple != "auto":
            raise typer.BadParameter(
                f"{' and '.join(map(_flag, timed))} say how --latency or --rank-multiple auto is timed; {name} is not"
            )
        return _RULES[name.removeprefix("--")](value)

    @property
    def multiple(self) -> int | Literal["auto"] | None:
        """What ranks are to be multiples of, if anything."""
        text = self.rank_multiple
        if text is None or text == "auto":
            return None if text is None else "auto"
        if not text.isdecimal() or int(text) < 1:
            raise typer.BadParameter(f"--rank-multiple {text}: give a whole number of at least 1, or auto")
        return int(text)

    @property
    def rules(self) -> dict[str, float]:
        """The values of all rules that were given, by option."""
        return {_flag(name): value for name in _RULES if (value := getattr(self, name)) is not None}

    @property
    def named_metric(self) -> Metric | None:
        """The metric, if one was named."""
        return None if self.metric is None else one_of(_METRICS, self.metric, option="--metric")

    @property
    def forms(self) -> tuple[FormName, ...] | None:
        """The forms, if any were named."""
        return tuple(one_of(CONVOLUTION_FORMS, form, option="--form") for form in self.form or ()) or None


def arguments(*groups: object) -> list[str]:
    """What gives these options on a command line; those at their defaults need not be given."""
    words: list[str] = []
    for group in groups:
        assert is_dataclass(group)
        for one in fields(group):
            value = getattr(group, one.name)
            if value is True:
                words.append(_flag(one.name))
            elif value != one.default:
                each = value if isinstance(value, list) else [value]
                words += [word for item in each for word in (_flag(one.name), str(item))]
    return words


def numbers(text: str, *, option: str, whole: bool = False) -> tuple[float, ...]:
    """Numbers with commas between them; finite, and at least 1 if they are to be `whole`."""
    try:
        found = tuple((int if whole else float)(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(math.isfinite(one) for one in found) or (whole and min(found) < 1):
        example = "3,32,32" if whole else "0.5,0.5,0.5"
        raise typer.BadParameter(f"{option} {text!r}: give numbers with commas between them, such as {example}")
    return found


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def one_of(allowed: Sequence[_Name], name: str, *, option: str) -> _Name:
    """The allowed word that was given."""
    for one in allowed:
        if one == name:
            return one
    raise typer.BadParameter(f"{option} {name!r}: there are {', '.join(allowed)}")
