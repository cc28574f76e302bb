"""What `analyze`, `plan`, `compress`, `evaluate` and others take; what they do is imported when they are called."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from spectrim.cli.options import CPU, DATA, Goal, Layers, Machine, Output, Source, Test, require_path, weights_option
from spectrim.cli.signatures import Group, Invocation
from spectrim.core.names import SCHEMES, LossName, Scheme

if TYPE_CHECKING:
    from spectrim.training.distillation import Distillation

MODEL, PLAN, MEASURED = "model.safetensors", "plan.json", "measurement.json"
HISTORY, HISTORY_PAGE, REPORT, SPECTRA = "history.json", "history.html", "report.html", "spectra.html"
_PARTS = ("all", "factors", "head")
_what, _how, _scheme, _score = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("What is trained", "How it is trained", "How it is quantised", "The score")
)


@dataclass(frozen=True, kw_only=True)
class Analyze:
    """Show how many dimensions each layer of a network really uses."""

    source: Source
    layers: Layers
    machine: Machine
    output: Output
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help=f"Folder for {SPECTRA}: every layer's singular values, as figures."),
    ] = None
    invocation: Invocation


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Decide the form and rank of every layer, and write that as a file to look at, edit, and apply."""

    source: Source
    layers: Layers
    goal: Goal
    machine: Machine
    output: Output
    out: Annotated[Path, typer.Option(metavar="FILE", help=f"The file to write, such as {PLAN}.")]
    invocation: Invocation


@dataclass(frozen=True, kw_only=True)
class Method:
    """What `spectrim compress` does: a plan instead of a rule, fitting, distillation, or an estimate alone."""

    plan: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Apply this plan instead of a rule; `spectrim plan` writes one.")
    ] = None
    reconstruct: Annotated[
        bool | None,
        typer.Option(
            "--reconstruct/--no-reconstruct",
            help="Fit each layer to what it receives in the compressed network (default for --macs, --params, --bytes "
            "and --latency, where there is --data).",
        ),
    ] = None
    distill: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS",
            min=1,
            help="Let the result learn from the dense network afterwards, on the calibration samples, without labels; "
            "it never ends worse on those that are kept aside.",
        ),
    ] = None
    block_by_block: Annotated[
        bool | None,
        typer.Option(
            "--block-by-block/--whole",
            help="Read, compress and write a folder of Hugging Face one block at a time (default where it does not "
            "fit into memory twice); the same command goes on with a run that was stopped.",
        ),
    ] = None
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only show how much memory this takes; nothing is written.")
    ] = False

    @property
    def fitted(self) -> Literal["auto"] | bool:
        """As the library takes it."""
        return "auto" if self.reconstruct is None else self.reconstruct

    @property
    def distillation(self) -> "Distillation | None":
        """As the library takes it."""
        from spectrim.training.distillation import Distillation

        return None if self.distill is None else Distillation(epochs=self.distill)


@dataclass(frozen=True, kw_only=True)
class Compress:
    """Make a network smaller: factor its layers, measure the result, and write it as files."""

    source: Source
    layers: Layers
    goal: Goal
    method: Method
    machine: Machine
    output: Output
    test: Test = None
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help=f"Folder for {MODEL}, {PLAN}, {MEASURED} and {REPORT}. Only those of an earlier run are replaced.",
        ),
    ]
    invocation: Invocation


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The teacher, what is held out, and what is trained."""

    teacher_weights: Annotated[
        Path | None, weights_option(help="The dense network's weights: its outputs are learnt instead of the labels.")
    ] = None
    held_out: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=DATA,
            help="Training images to leave out, for the accuracy after each epoch; by default a tenth, at most 5000.",
        ),
    ] = None
    train: Annotated[
        list[str] | None,
        _what(
            metavar="all|factors|head|PATTERN",
            help="Everything (default), the factored layers, the last layer, or what matches name patterns such as "
            "'layer3.*'. Patterns can be repeated.",
        ),
    ] = None
    unfreeze_norms: Annotated[
        bool, _what("--unfreeze-norms", help="BatchNorm statistics follow the batches; else they stay.")
    ] = False
    clip: Annotated[float, _how(metavar="NORM", help="Largest norm of the gradient; 0 for any.")] = 1.0
    save_every: Annotated[int, _how(metavar="STEPS", min=1, help="How often the state is saved.")] = 500

    @property
    def trained(self) -> str | list[str]:
        """`all`, `factors`, `head`, or patterns."""
        names = self.train or ["all"]
        if len(names) > 1 and any(name in _PARTS for name in names):
            raise typer.BadParameter(f"--train {' '.join(names)}: give one of {', '.join(_PARTS)}, or patterns only")
        return names[0] if names[0] in _PARTS else names


@dataclass(frozen=True, kw_only=True)
class Training:
    """Fields of `spectrim.training.Settings`, which checks them."""

    epochs: Annotated[int, _how(metavar="N", help="Passes over the images.")] = 3
    lr: Annotated[float, _how(metavar="RATE", help="Peak learning rate; it decays to 0.")] = 1e-3
    optimizer: Annotated[
        Literal["adamw", "sgd"], _how(metavar="adamw|sgd", help="The optimiser; SGD has --momentum.")
    ] = "adamw"
    momentum: Annotated[float, _how(metavar="SHARE", help="Momentum of SGD.")] = 0.9
    weight_decay: Annotated[float, _how(metavar="RATE", help="Weight decay of what is trained.")] = 0.0
    warm_up: Annotated[float, _how(metavar="SHARE", help="Share of all steps with a rising learning rate.")] = 0.1
    loss: Annotated[
        LossName | None,
        _how(
            metavar="cross_entropy|mse|bce",
            help="How the outputs are compared with the teacher's (KL, squared error, binary cross-entropy); labels of "
            "images take the first, which is the default.",
        ),
    ] = None
    temperature: Annotated[float, _how(metavar="T", help="Softens the teacher's outputs and the network's.")] = 4.0
    label_weight: Annotated[float, _how(metavar="SHARE", help="Share of the labels in the loss, with a teacher.")] = 0.0
    precision: Annotated[
        Literal["float32", "bf16"], _how(metavar="float32|bf16", help="Number type of the computation.")
    ] = "float32"
    keep: Annotated[
        Literal["last", "best"],
        _how(metavar="best|last", help="Weights of the best epoch on the held-out images, or of the last."),
    ] = "best"
    patience: Annotated[int | None, _how(metavar="N", help="Stop after N epochs without a better one.")] = None


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Train a compressed network a little more, to regain the accuracy that compression cost."""

    source: Annotated[Source, Group(without=("images", "cache"), required=("weights", "data"), defaults={"batch": 128})]
    tuning: Tuning
    training: Training
    machine: Machine
    output: Output
    test: Annotated[bool, typer.Option("--test/--no-test", help="Accuracy on the test images, before and after.")] = (
        True
    )
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help=f"Folder for {MODEL}, {HISTORY}, {HISTORY_PAGE} and {MEASURED}. The same command goes on with a run "
            "that was stopped.",
        ),
    ]
    invocation: Invocation


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The scheme, and how the table is measured."""

    dense_weights: Annotated[
        Path | None, weights_option(help="The weights before compression: shows whether quantisation alone would do.")
    ] = None
    scheme: Annotated[
        Scheme,
        _scheme(
            metavar="|".join(SCHEMES),
            help="int8-weights: stored as int8, computed in float32. int8-dynamic: linear layers computed in int8. "
            "int8-static: all computed in int8, needs --data. bf16: stored as bfloat16.",
        ),
    ] = "int8-weights"
    runtime: Annotated[
        Literal["onnxruntime", "openvino", "openvino-bf16"],
        _scheme(metavar="onnxruntime|openvino|openvino-bf16", help="In which the table is measured."),
    ] = "onnxruntime"
    latency_threads: Annotated[int, _scheme(metavar="N", min=1, help="Threads of that runtime.")] = 1
    no_latency: Annotated[bool, _scheme("--no-latency", help="Do not time the rows of the table.")] = False


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Write a network as an ONNX file with int8 or bfloat16 weights, and show what that and low rank gain."""

    source: Annotated[Source, Group(without=("cache",), required=("weights",), defaults={"images": 512, "batch": 64})]
    quantization: Quantization
    machine: Annotated[Machine, CPU]
    output: Output
    test: Test = None
    out: Annotated[
        Path,
        typer.Option(metavar="FILE.onnx", help="The file to write; every number goes into a .json file beside it."),
    ]
    invocation: Invocation


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is measured, on what, and what it is compared with."""

    metric: Annotated[
        str,
        _score(
            metavar="accuracy|perplexity|spearman|pkg.module:function",
            help="Share of right answers; perplexity of the next token; correlation of two texts' embeddings with gold "
            "scores, of data (inputs, inputs, scores); or the mean of what a function of the network and a batch gives "
            "for each example, which RUNS THE CODE of its module.",
        ),
    ] = "accuracy"
    against: Annotated[
        str | None, _score(metavar="REF", help="Another network, as --model names it: the difference on the same data.")
    ] = None
    against_weights: Annotated[
        Path | None,
        _score(
            metavar="FILE|DIR",
            callback=require_path,
            help="The other network's weights; it is --model without --against.",
        ),
    ] = None
    whole: Annotated[
        bool, _score("--whole", help="Score all of a text; by default its end, which nothing is calibrated on.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a network on test data, with the interval of the score, and compare it with another one."""

    source: Annotated[
        Source, Group(without=("images", "cache", "seed", "expect"), required=("data",), defaults={"batch": 16})
    ]
    scoring: Scoring
    machine: Machine
    output: Output
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every number there, of each example too.")] = (
        None
    )
    invocation: Invocation
