"""A compressed network and its fine-tuned self, as studies of convolutional networks make them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import Field
from torch import nn

from spectrim.files import Frozen
from spectrim.plan import Metric, Plan, Rule
from spectrim.recipes.images import Part
from spectrim.recipes.outcome import Network, file_name
from spectrim.recipes.parts import Made, Trained
from spectrim.recipes.study import Phase, SeedRun
from spectrim.surgery import Patterns
from spectrim.training import finetune
from spectrim.training.checkpoint import Checkpoint


class Tuned(Frozen):
    """How a compressed network is fine-tuned.

    Attributes:
        phase: Epochs, learning rate, batch size, weight decay.
        temperature: With the dense network as the teacher; none trains with the labels.
        frozen_norms: BatchNorm leaves its running statistics as they are. After a plain truncation they no longer fit.
    """

    phase: Phase
    temperature: float | None = Field(default=None, gt=0)
    frozen_norms: bool = True

    def in_small_steps(self, epochs: int) -> "Tuned":
        """The same with a phase for little data."""
        return self.model_copy(update={"phase": self.phase.in_small_steps(epochs)})


@dataclass(frozen=True, eq=False)
class Smaller:
    """One way to compress the dense network of a seed.

    Attributes:
        run: The seed.
        dense: Its dense network.
        title: What it is called in tables.
        rule: What was asked.
        metric: Of the factorisation.
    """

    run: SeedRun
    dense: nn.Module
    title: str
    rule: Rule | None
    metric: Metric | None

    def compressed(self, make: Callable[[], Made], **settings: object) -> tuple[nn.Module, Plan]:
        """From disk, or made now; `settings` are everything that `make` goes by."""
        key = self.run.key(start=self.dense, **settings)
        return self.run.parts.compressed(f"{file_name(self.title)}-compressed", key=key, blank=self.dense, make=make)

    def networks(
        self,
        model: nn.Module,
        plan: Plan | None,
        tuned: Tuned,
        *,
        train: str | Patterns = "all",
        data: Part | None = None,
        zero_shot: bool = True,
    ) -> Iterator[Network]:
        """The network as it was compressed, unless `zero_shot` is off, and after fine-tuning on `data`."""
        run, label = self.run, "fine-tuned" if train == "all" else f"{train} tuned"
        if zero_shot:
            yield Network(
                f"{self.title}, zero-shot",
                "zero-shot",
                model,
                run.held_out(model),
                rule=self.rule,
                metric=self.metric,
                plan=plan,
            )
        images = data or run.images.train

        def trained(checkpoint: Checkpoint) -> Trained:
            done = finetune(
                model,
                run.epochs(images.labels, tuned.phase, of=images),
                teacher=None if tuned.temperature is None else self.dense,
                temperature=tuned.temperature or 1.0,
                frozen_norms=tuned.frozen_norms,
                train=train,
                **run.options(tuned.phase, checkpoint),
            )
            return done.model, done.history

        key = run.key(start=model, teacher=self.dense_key, tuned=tuned, train=train, images=len(images))
        better, curve = run.parts.trained(f"{file_name(self.title)}-tuned", key=key, blank=self.dense, train=trained)
        yield Network(
            f"{self.title}, {label}",
            "fine-tuned",
            better,
            run.held_out(better),
            curve,
            rule=self.rule,
            metric=self.metric,
            plan=plan,
        )

    @property
    def dense_key(self) -> str:
        """What the teacher was trained from."""
        return self.run.key()
