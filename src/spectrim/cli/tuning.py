"""The options of `spectrim finetune`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli.options import DataFolder, Flatten, Mean, Model, Option, Source, Std, WithSource, one_of
from spectrim.training.settings import Settings

_DATA, _NETWORK, _WHAT, _HOW = "The data", "The network", "What is trained", "How it is trained"
_CHOICES = ("all", "factors", "head")


@dataclass(frozen=True, kw_only=True)
class Subjects(WithSource):
    """The compressed network, its teacher, and the images."""

    model: Model
    weights: Annotated[
        Path,
        typer.Option(
            metavar="FILE|DIR",
            rich_help_panel=_NETWORK,
            help="The compressed network: the folder that `spectrim compress` wrote, or a .safetensors file.",
        ),
    ]
    teacher_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_NETWORK,
            help="The dense network's weights: its answers are learnt instead of the labels.",
        ),
    ] = None
    option: Option = None
    flatten: Flatten = False
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_DATA,
            help="A data set of `spectrim data list`, obtained first if need be. Its test split serves the final "
            "figures only.",
        ),
    ]
    data_folder: DataFolder = None
    held_out: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=_DATA,
            help="Training images to leave out, for the accuracy after each epoch; by default a tenth, at most 5000.",
        ),
    ] = None
    batch: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=_DATA, help="Images at a time.")] = 128
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, rich_help_panel=_DATA, help="Decides which are left out, their order, and dropout."
        ),
    ] = 0
    mean: Mean = None
    std: Std = None

    @property
    def source(self) -> Source:
        """The same; one image is enough to see what the network takes."""
        return replace(super().source, images=1)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is trained, and how."""

    train: Annotated[
        list[str] | None,
        typer.Option(
            metavar="all|factors|head|PATTERN",
            rich_help_panel=_WHAT,
            help="Everything (default), the factored layers, the last layer, or what matches name patterns such as "
            "'layer3.*'. Patterns can be repeated.",
        ),
    ] = None
    unfreeze_norms: Annotated[
        bool,
        typer.Option(
            "--unfreeze-norms", rich_help_panel=_WHAT, help="BatchNorm statistics follow the batches; else they stay."
        ),
    ] = False
    epochs: Annotated[int, typer.Option(metavar="N", rich_help_panel=_HOW, help="Passes over the images.")] = 3
    lr: Annotated[
        float, typer.Option(metavar="RATE", rich_help_panel=_HOW, help="Peak learning rate; it decays to 0.")
    ] = 1e-3
    optimizer: Annotated[str, typer.Option(metavar="adamw|sgd", rich_help_panel=_HOW, help="SGD has --momentum.")] = (
        "adamw"
    )
    momentum: Annotated[float, typer.Option(metavar="SHARE", rich_help_panel=_HOW, help="Of SGD.")] = 0.9
    weight_decay: Annotated[float, typer.Option(metavar="RATE", rich_help_panel=_HOW, help="Of what is trained.")] = 0.0
    warm_up: Annotated[
        float, typer.Option(metavar="SHARE", rich_help_panel=_HOW, help="Of all steps, with a rising learning rate.")
    ] = 0.1
    clip: Annotated[
        float, typer.Option(metavar="NORM", rich_help_panel=_HOW, help="Largest norm of the gradient; 0 for any.")
    ] = 1.0
    temperature: Annotated[
        float, typer.Option(metavar="T", rich_help_panel=_HOW, help="Softens the teacher's answers and the network's.")
    ] = 4.0
    label_weight: Annotated[
        float, typer.Option(metavar="SHARE", rich_help_panel=_HOW, help="Of the labels, beside a teacher.")
    ] = 0.0
    precision: Annotated[
        str, typer.Option(metavar="float32|bf16", rich_help_panel=_HOW, help="Number type of the computation.")
    ] = "float32"
    keep: Annotated[
        str,
        typer.Option(
            metavar="best|last", rich_help_panel=_HOW, help="Weights of the best epoch on the held-out images, or last."
        ),
    ] = "best"
    patience: Annotated[
        int | None, typer.Option(metavar="N", rich_help_panel=_HOW, help="Stop after N epochs without a better one.")
    ] = None
    save_every: Annotated[
        int, typer.Option(metavar="STEPS", min=1, rich_help_panel=_HOW, help="How often the state is saved.")
    ] = 500

    def settings(self, *, seed: int) -> Settings:
        """All of it that `finetune` calls settings; a mistake is told before anything is loaded."""
        return Settings(
            epochs=self.epochs,
            lr=self.lr,
            optimizer=one_of(("adamw", "sgd"), self.optimizer, option="--optimizer"),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            warm_up=self.warm_up,
            clip=self.clip or None,
            temperature=self.temperature,
            label_weight=self.label_weight,
            precision=one_of(("float32", "bf16"), self.precision, option="--precision"),
            keep=one_of(("best", "last"), self.keep, option="--keep"),
            patience=self.patience,
            seed=seed,
        )

    @property
    def trained(self) -> str | list[str]:
        """One of the three words, or patterns."""
        given = self.train or ["all"]
        if len(given) > 1 and any(one in _CHOICES for one in given):
            raise typer.BadParameter(f"--train {' '.join(given)}: give one of {', '.join(_CHOICES)}, or patterns only")
        return given[0] if given[0] in _CHOICES else given
