"""The options that commands share, each declared once: dataclasses whose fields are options."""

import ast
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

import typer

from spectrim.cli.signatures import Group, flag
from spectrim.core.errors import FileError, RuleError, did_you_mean
from spectrim.core.names import RUNTIMES, Metric

if TYPE_CHECKING:
    from spectrim.core.plans import Rule
    from spectrim.layers.selection import LayerSelection

_Name = TypeVar("_Name", bound=str)

NETWORK, DATA = "The network", "The data"
_HOW_SMALL = "How small (exactly one of the first seven)"
_network, _data, _layers, _rule, _machine, _output = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in (NETWORK, DATA, "Which layers", _HOW_SMALL, "The machine", "What is printed")
)


def require_path(path: Path | None) -> Path | None:
    """The path, if it was given. Raises `FileError` where nothing is."""
    if path is not None and not path.exists():
        hint = did_you_mean(str(path), map(str, path.parent.glob("*")) if path.parent.is_dir() else ())
        raise FileError(f"cannot read {path}: there is no such file or folder; {hint}this folder is {Path.cwd()}")
    return path


def require_share(value: float | None, param: typer.CallbackParam) -> float | None:
    """The budget, if it was given. Raises `RuleError` before anything is loaded, for what is no share."""
    if value is not None and not 0 < value < 1:
        key, share = param.opts[0], value / 100 if 2 <= value < 100 else 0.5
        raise RuleError(f"{key} {value:g}: a budget is a share of the dense network, between 0 and 1: {key} {share:g}")
    return value


def _require_runtime(name: str | None) -> str | None:
    if name is not None:
        known_names([name], RUNTIMES, option="--runtime")
    return name


weights_option = partial(_network, metavar="FILE", callback=require_path)
_budget = partial(_rule, metavar="SHARE", callback=require_share)
_number = partial(_rule, metavar="N", min=1)
_patterns = partial(_layers, metavar="PATTERN")


Test = Annotated[
    bool | None,
    typer.Option("--test/--no-test", help="Accuracy on the test images (default where the network has one)."),
]


NO_DATA = ("data", "tokenizer", "resize", "expect", "data_folder", "images", "batch", "seed", "cache", "mean", "std")
"""What a command that runs a network on random inputs leaves out of `Source`."""


CPU = Group(without=("device",))
"""The `Machine` of a command that runs on the CPU only."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """How tables are printed."""

    is_recorded: ClassVar = False

    json: Annotated[bool, _output("--json", help="The tables as JSON, and all else on standard error.")] = False
    csv: Annotated[bool, _output("--csv", help="The tables as CSV, and all else on standard error.")] = False

    def __post_init__(self) -> None:
        if self.json and self.csv:
            raise typer.BadParameter("give --json or --csv, not both")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A network, and the images or the shape it is run on."""

    model: Annotated[
        str,
        _network(
            metavar="REF",
            help="spectrim:NAME, torchvision:NAME, timm:NAME; hf:DIR, a folder of Hugging Face with its weights; or "
            "pkg.module:factory, which RUNS THE CODE of that module: name only code that you trust.",
        ),
    ]
    weights: Annotated[
        Path | None,
        _network(
            metavar="FILE|DIR",
            callback=require_path,
            help="Its trained weights: .safetensors, or .pt and the like; for a compressed network the folder that "
            "`spectrim compress` or `spectrim finetune` wrote, or the file in it.",
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        _network(metavar="NAME=VALUE", help="An argument of its factory, such as outputs=47. Can be repeated."),
    ] = None
    input: Annotated[
        str | None,
        _network(
            "--input",
            "--tokens",
            metavar="3,32,32",
            help="Shape of one input: without --data, of images in folders, or tokens of a text.",
        ),
    ] = None
    flatten: Annotated[bool, _network("--flatten", help="The network takes vectors: (batch, C * H * W).")] = False
    data: Annotated[
        str | None,
        _data(
            metavar="NAME|folder:PATH|FILE.npz|text:FILE|pkg.module:factory",
            help="A data set of `spectrim data list`, obtained first if need be; images in class folders "
            "(train/CLASS/.. and test/CLASS/.., or CLASS/..); arrays x_train, y_train, x_test, y_test; a text; or a "
            "function that returns loaders of (inputs, labels), which RUNS THE CODE of its module. The training split "
            "is for calibration and training, the test split for the final accuracy only. Without --data only the "
            "weights are used.",
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        _data(
            metavar="DIR|FILE|bytes",
            help="For a text: a folder with a tokenizer, its tokenizer.json, or bytes; by default that of hf:DIR.",
        ),
    ] = None
    resize: Annotated[
        int | None,
        _data(
            metavar="N",
            min=1,
            help="For images in folders, with --input: scale the shorter side to N before the centre is cut out; by "
            "default just enough.",
        ),
    ] = None
    expect: Annotated[
        float | None,
        _data(
            metavar="PERCENT",
            min=0,
            max=100,
            help="The accuracy that the network has, such as 91.7: a warning before any work if it is far from it.",
        ),
    ] = None
    data_folder: Annotated[
        Path | None,
        _data(metavar="DIR", exists=True, file_okay=False, help="Where its raw files lie, if you have them."),
    ] = None
    images: Annotated[int, _data("--images", "--samples", metavar="N", min=1, help="Calibration samples.")] = 1024
    batch: Annotated[
        int,
        _data(metavar="N", min=1, help="Samples at a time; of a text at most 4096 tokens. Of 16 some are kept aside."),
    ] = 256
    seed: Annotated[int, _data(metavar="N", min=0, help="Seed of the choice of images, their order and dropout.")] = 0
    cache: Annotated[
        int | None,
        _data(
            metavar="MB",
            min=0,
            help="Megabytes of activations kept between passes, for speed only; by default as much as the statistics "
            "take, or 512 to 768 by the memory that is free.",
        ),
    ] = None
    mean: Annotated[
        str | None,
        _data(
            metavar="0.5,0.5,0.5",
            help="The network takes (pixel / 255 - mean) / std; one value, or one a channel. By default cifar10 is "
            "normalised as spectrim.models.cifar_inputs does, and other images are pixel / 255. Networks of "
            "`spectrim recipe mnist-mlp` want --mean 0.1307 --std 0.3081.",
        ),
    ] = None
    std: Annotated[str | None, _data(metavar="0.2,0.2,0.2", help="See --mean.")] = None

    @property
    def folder(self) -> Path | None:
        """The folder of Hugging Face that holds the network, if one does."""
        kind, colon, path = self.model.partition(":")
        if not colon and Path(kind).is_dir():
            raise typer.BadParameter(f"--model {kind} is a folder; write --model hf:{kind}")
        return Path(path).expanduser() if kind == "hf" else None

    @property
    def cache_bytes(self) -> int | None:
        """The bytes of activations that are kept."""
        return None if self.cache is None else self.cache * 10**6

    @property
    def expected(self) -> float | None:
        """The accuracy that the network should have, in [0, 1]."""
        return self.expect / 100 if self.expect is not None and self.expect > 1 else self.expect

    @property
    def options(self) -> dict[str, object]:
        """The arguments of the factory: numbers, True, None and the like as such, anything else as text."""
        values: dict[str, object] = {}
        for text in self.option or ():
            name, sign, value = text.partition("=")
            if not (sign and name.isidentifier()) or name in values:
                raise typer.BadParameter(f"--option {text}: write each name once, as in --option outputs=47")
            try:
                values[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                values[name] = value
        return values

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input, where there is no data set."""
        if self.input is None:
            raise typer.BadParameter("give --data or the shape of an input: --input 3,32,32, or --tokens 128 of a text")
        return tuple(int(size) for size in numbers(self.input, option="--input", whole=True))


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Which layers may be factored."""

    include: Annotated[list[str] | None, _patterns(help="Layers to factor, as in 'layer3.*'. Can be repeated.")] = None
    exclude: Annotated[list[str] | None, _patterns(help="Layers to leave as they are. Can be repeated.")] = None
    keep_last: Annotated[bool, _layers("--keep-last", help="Leave the last layer that is called as it is.")] = False

    @property
    def selection(self) -> "LayerSelection":
        """As the library takes it."""
        from spectrim.layers.selection import LayerSelection

        return LayerSelection(self.include or ("*",), self.exclude or (), self.keep_last)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What computes."""

    threads: Annotated[
        int | None,
        _machine(
            metavar="N",
            min=1,
            help="Threads that compute; by default $OMP_NUM_THREADS, or 1 for small networks, else all free cores.",
        ),
    ] = None
    device: Annotated[
        Literal["cpu", "cuda", "mps", "auto"],
        _machine(metavar="cpu|cuda|mps|auto", help="Where the network is run; auto: a GPU, if there is one."),
    ] = "cpu"


_LAYER_RULES = {"rank": "Rank", "ratio": "Ratio", "energy": "Energy"}
_RULES = ("macs", "params", "bytes", "latency", *_LAYER_RULES)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """How small: a rule, and in what metric and forms it is followed."""

    macs: Annotated[float | None, _budget(help="Keep this share of the network's MACs: 0.5.")] = None
    params: Annotated[float | None, _budget(help="Keep this share of its parameters.")] = None
    bytes: Annotated[float | None, _budget(help="Keep this share of its file size.")] = None
    latency: Annotated[float | None, _budget(help="Keep this share of its time, see --runtime.")] = None
    of: Annotated[
        Literal["network", "body"],
        _rule(
            metavar="network|body",
            help="What --macs and --params are a share of: the network, or the layers in it that can shrink.",
        ),
    ] = "network"
    rank: Annotated[int | None, _rule(metavar="N", help="Every layer at this rank.")] = None
    ratio: Annotated[float | None, _rule(metavar="SHARE", help="Keep this share of a layer's singular values.")] = None
    energy: Annotated[float | None, _rule(metavar="SHARE", help="Keep this share of each layer's energy.")] = None
    metric: Annotated[
        Metric | None,
        _rule(
            metavar="plain|activation|loss",
            help="Errors count in the weights (default without --data), in the layers' outputs on the data (default "
            "for --rank, --ratio and --energy), or in these outputs weighted by how much the network's output depends "
            "on them (default for the other rules).",
        ),
    ] = None
    form: Annotated[
        list[str] | None,
        _rule(
            metavar="channel|spatial|tucker2|interpolative|width|head_vo|head_qk",
            help="A form that layers may take besides linear. Can be repeated. By default any, interpolative only for "
            "--params and --bytes without --of, channel for rules.",
        ),
    ] = None
    rank_multiple: Annotated[
        str | None,
        _rule(
            metavar="N|auto",
            help="Only ranks that N divides, or the step that is probed on this machine and runtime (default for "
            "--latency).",
        ),
    ] = None
    runtime: Annotated[
        str | None,
        _rule(
            metavar="NAME",
            callback=_require_runtime,
            help=f"What --latency, or --rank-multiple auto, is timed in: {', '.join(RUNTIMES)}; by default torch.",
        ),
    ] = None
    latency_threads: Annotated[int | None, _number(help="Threads of a pass that is timed; 1 by default.")] = None
    latency_batch: Annotated[int | None, _number(help="Inputs of a pass that is timed; 1 by default.")] = None

    @property
    def rule(self) -> "Rule":
        """The one rule that was given."""
        from spectrim.core import plans

        names = [name for name in _RULES if getattr(self, name) is not None]
        flags = " and ".join(map(flag, names))
        if len(names) != 1:
            raise typer.BadParameter(
                f"say how small by exactly one of {', '.join(map(flag, _RULES))} (or a --plan); "
                + (f"{flags} are {len(names)}" if names else "none was given")
            )
        timing = [name for name in ("runtime", "latency_threads", "latency_batch") if getattr(self, name) is not None]
        if timing and self.latency is None and self.multiple != "auto":
            raise typer.BadParameter(
                f"{' and '.join(map(flag, timing))} say how --latency or --rank-multiple auto is timed; {flags} is not"
            )
        value = getattr(self, names[0])
        if self.of == "body" and names[0] not in ("macs", "params"):
            raise typer.BadParameter(f"--of body goes with --macs or --params; {flags} is not a share of the body")
        if self.latency is not None:
            threads, batch = self.latency_threads, self.latency_batch
            return plans.Budget(latency=value, runtime=self.runtime, threads=threads, batch=batch)
        part = {"of": "body"} if self.of == "body" else {}
        rule: Rule = getattr(plans, _LAYER_RULES.get(names[0], "Budget"))(**{names[0]: value}, **part)
        return rule

    @property
    def multiple(self) -> int | Literal["auto"] | None:
        """What ranks are to be multiples of, if anything."""
        return whole_or_auto(self.rank_multiple, option="--rank-multiple")

    @property
    def forms(self) -> tuple[str, ...] | None:
        """The forms, if any were named."""
        from spectrim.layers.forms import selected_forms

        return known_names(self.form or (), selected_forms(None), option="--form") or None


def known_names(names: Iterable[str], known: Sequence[_Name], *, option: str) -> tuple[_Name, ...]:
    """The names, each once, if all of them are known."""
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{option} {name!r}: there are {', '.join(known)}")
    return tuple(dict.fromkeys(same for name in names for same in known if same == name))


def numbers(text: str, *, option: str, whole: bool = False) -> tuple[float, ...]:
    """Numbers with commas between them; finite, and at least 1 if they are to be `whole`."""
    try:
        values = tuple((int if whole else float)(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)) or (whole and min(values) < 1):
        example = "3,32,32" if whole else "0.5,0.5,0.5"
        raise typer.BadParameter(f"{option} {text!r}: give numbers with commas between them, such as {example}")
    return values


def whole_or_auto(text: str | None, *, option: str) -> int | Literal["auto"] | None:
    """A whole number of at least 1, or `auto`."""
    if text is None or text == "auto":
        return None if text is None else "auto"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{option} {text}: give a whole number of at least 1, or auto")
    return int(text)
