"""A compressed network and its fine-tuned self, as studies of convolutional networks make them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import Field
from torch import nn

from spectrim.benchmark.measurement import Epoch
from spectrim.core.files import Frozen
from spectrim.core.plans import Metric, Plan, Rule
from spectrim.recipes.outcome import Network, file_name
from spectrim.recipes.parts import Made, Trained
from spectrim.recipes.study import Phase, SeedRun
from spectrim.reporting.results import Stage
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

    def networks(self, model: nn.Module, plan: Plan | None, tuned: Tuned) -> Iterator[Network]:
        """The network as it was compressed, and after fine-tuning on all training images."""
        images = self.run.images.train

        def trained(checkpoint: Checkpoint) -> Trained:
            done = finetune(
                model,
                self.run.epochs(images.labels, tuned.phase),
                teacher=None if tuned.temperature is None else self.dense,
                temperature=tuned.temperature or 1.0,
                frozen_norms=tuned.frozen_norms,
                **self.run.options(tuned.phase, checkpoint),
            )
            return done.model, done.history

        yield self.zero_shot(model, plan)
        key = self.run.key(start=model, teacher=self.dense_key, tuned=tuned, train="all", images=len(images))
        yield self.trained(plan, "fine-tuned", key=key, train=trained)

    def zero_shot(self, model: nn.Module, plan: Plan | None) -> Network:
        """The network as it was compressed."""
        return self._network("zero-shot", "zero-shot", model, (), plan)

    def trained(self, plan: Plan | None, label: str, *, key: str, train: Callable[[Checkpoint], Trained]) -> Network:
        """The network after training: from disk where it was trained from the same, by `train` otherwise."""
        name = f"{file_name(self.title)}-tuned"
        better, curve = self.run.parts.trained(name, key=key, blank=self.dense, train=train)
        return self._network(label, "fine-tuned", better, curve, plan)

    def _network(
        self, label: str, stage: Stage, model: nn.Module, curve: tuple[Epoch, ...], plan: Plan | None
    ) -> Network:
        return Network(
            f"{self.title}, {label}",
            stage,
            model,
            self.run.held_out(model),
            curve,
            rule=self.rule,
            metric=self.metric,
            plan=plan,
        )

    @property
    def dense_key(self) -> str:
        """What the teacher was trained from."""
        return self.run.key()
