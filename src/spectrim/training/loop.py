"""What a training run is, and the loop that runs it: repeatable from its seed, resumable after any step."""

import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import nn

from spectrim.benchmark.measurement import Epoch
from spectrim.core.batches import batches_of, length_of, require_batches, source_of, split_labels
from spectrim.core.distributed import Accelerator, ddp, if_distributed, share_of, total
from spectrim.core.errors import DataError, TrainingError
from spectrim.core.execution import ForwardFunction, ProgressCallback
from spectrim.core.nested import from_numpy
from spectrim.core.state import unique_tensors
from spectrim.training.checkpoint import Checkpoint, Progress, RngState, Saved, generators, restore, seeded, states
from spectrim.training.history import History
from spectrim.training.losses import LossFunction, Objective, StepResult
from spectrim.training.settings import Settings

EpochData = Callable[[int], Iterable[Any]]
"""Batches (inputs.., targets) of an epoch, counted from 0."""


@dataclass(frozen=True)
class Step:
    """Where training stands after one optimiser step.

    Attributes:
        epoch: Counted from 0, of `epochs`.
        step: Counted from 0 within the epoch, of `steps`, which is 0 if the length of an epoch is unknown.
        loss: Of this step's batch.
        accuracy: Share of right answers in this epoch so far; None if the labels are not class indices.
        seconds_left: Estimated from the time per step so far; None if the length of an epoch is unknown.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """Everything that `train_in_place` needs; what is not explained here is as in `st.finetune`.

    Attributes:
        model: Trained in place.
        data: Batches (inputs.., targets), iterated anew each epoch, or a function of the epoch that gives them, always
            the same ones for an epoch.
        settings: How it is trained.
        loss: A function of the outputs and the labels that gives a scalar, in place of the loss that the settings name.
        forward: A function of the network and a batch's inputs that gives the outputs, in place of a plain call.
        trained: The parameters that change, among those that ask for gradients; None for all of these.
        frozen_modules: Modules that stay in evaluation mode, such as norms whose statistics must not change.
        teacher: A network with the same outputs, in evaluation mode.
        minutes: End after about so many; the learning rate decays until then.

    Raises:
        TrainingError: `keep="best"` or `patience` without `held_out`, `label_weight` without `teacher`, or
            `save_every` without `checkpoint`.
        DataError: data that cannot be iterated, or only once although it is needed again.
        FileError: the checkpoint cannot be written.
    """

    model: nn.Module
    data: Iterable[Any] | EpochData
    _: KW_ONLY
    settings: Settings
    loss: LossFunction | None = None
    forward: ForwardFunction | None = None
    trained: Sequence[nn.Parameter] | None = None
    frozen_modules: Collection[nn.Module] = ()
    teacher: nn.Module | None = None
    held_out: Iterable[Any] | None = None
    checkpoint: Checkpoint | None = None
    save_every: int | None = None
    on_step: Callable[[Step], object] | None = None
    on_progress: ProgressCallback | None = None
    accelerator: Accelerator | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        if settings.label_weight > 0 and self.teacher is None:
            raise TrainingError(f"label_weight={settings.label_weight} needs a teacher; give teacher=, or leave it out")
        if self.loss is not None and settings.loss is not None:
            raise TrainingError(f"loss={settings.loss!r} is named, and a function is given; give one of the two")
        if settings.loss == "kl" and self.teacher is not None:
            reason = "takes a teacher's logits in the place of labels"
            raise TrainingError(f'loss="kl" {reason}; leave teacher= out, or loss=')
        needing = "patience" if settings.patience is not None else "keep" if settings.keep == "best" else None
        if needing and self.held_out is None:
            raise TrainingError(f"{needing}={getattr(settings, needing)!r} goes by held-out data; give held_out=")
        self._require_data()
        if self.save_every is not None and (self.checkpoint is None or self.save_every < 1):
            raise TrainingError(f"save_every={self.save_every!r}: give at least 1 step, and a checkpoint=")
        if self.checkpoint:
            self.checkpoint.require_writable()

    def _require_data(self) -> None:
        data, held_out = source_of(self.data), source_of(self.held_out)
        if isinstance(data, Iterator) and (self.settings.epochs > 1 or self.checkpoint):
            raise DataError(
                f"the training data is a {type(data).__name__}, which is exhausted after one epoch; give a list, "
                "a DataLoader, or a function that makes the batches of an epoch: lambda epoch: .."
            )
        if isinstance(self.data, nn.Module) or not callable(self.data):
            require_batches(self.data, what="the training data")
        if self.held_out is not None:
            require_batches(self.held_out, what="held_out")
        if isinstance(held_out, Iterator):
            kind = type(held_out).__name__
            raise DataError(f"held_out is a {kind}, which is exhausted after one epoch; give a list or a DataLoader")


def train_in_place(run: TrainingRun) -> History:
    """Train the model of a run itself. Its training and gradient flags and the random states are restored.

        train_in_place(TrainingRun(model, batches, settings=Settings(epochs=2, lr=1e-2)))

    Returns:
        One entry an epoch, those before an interruption included.

    Raises:
        TrainingError: a loss or gradient that became NaN or infinite; says where.
        DataError: no batches, or targets that do not fit the outputs.
    """
    candidates = run.model.parameters() if run.trained is None else run.trained
    trained = [parameter for parameter in candidates if parameter.requires_grad]
    with _restored_flags(run.model, trained):
        return _Loop(run, trained).go()


class _Loop:
    """A run under way: everything that changes from step to step."""

    def __init__(self, run: TrainingRun, trained: Sequence[nn.Parameter]) -> None:
        self.run, self.trained = run, trained
        self.others = if_distributed(run.accelerator)
        self.network = ddp(run.model, self.others) if self.others else run.model
        self.optimiser = run.settings.make_optimiser(trained)
        self.objective = Objective(run.settings, type(run.model).__name__, run.teacher, run.loss, run.forward)
        self.saved = Saved()
        # consistent: weights, optimiser and `saved` are of the same moment
        self.consistent = self.stepping = self.interrupted = False
        self.own = generators(run.data)
        self.started, self.taken, self.latest = time.perf_counter(), 0, 0.0

    @property
    def progress(self) -> Progress:
        return self.saved.progress

    def go(self) -> History:
        before = states(self.own)
        main = threading.current_thread() is threading.main_thread()
        handling = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        try:
            self._resume()
            self.consistent = True
            if handling:
                signal.signal(signal.SIGINT, self._interrupt)
            while len(self.progress.curve) < self.run.settings.epochs and not self._is_over():
                self._steps()
                self._end_epoch()
        except KeyboardInterrupt:
            if self.consistent:
                self._save()
            raise
        finally:
            if handling:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            restore(self.own, before)
            self.optimiser.zero_grad(set_to_none=True)
        return self._finished()

    def _resume(self) -> None:
        checkpoint = self.run.checkpoint
        if checkpoint:
            self.saved = checkpoint.restore(self.run.model, self.optimiser) or self.saved
        place = torch.tensor([len(self.progress.curve), self.progress.step])
        if self.others and not torch.equal(total(place, self.others), self.others.num_processes * place):
            file = checkpoint and checkpoint.path
            raise TrainingError(f"processes find different checkpoints at {file}; put it on a disk that all can read")

    def _is_over(self) -> bool:
        """Whether patience or time is at its end."""
        patience, curve = self.run.settings.patience, self.progress.curve
        return bool(patience and curve and len(curve) - 1 - self.progress.best >= patience) or self._time_share() >= 1

    def _time_share(self) -> float:
        """Of the time that the run may take, what it has taken."""
        seconds = self.progress.seconds + sum(epoch.seconds for epoch in self.progress.curve)
        return seconds / 60 / self.run.minutes if self.run.minutes else 0.0

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-C takes effect at the end of the present step, so that the state is complete; a second one at once."""
        if self.interrupted or not self.stepping:
            signal.default_int_handler(number, frame)
        self.interrupted = True

    def _steps(self) -> None:
        """The rest of the present epoch."""
        run, epoch = self.run, len(self.progress.curve)
        run.model.train()
        for module in run.frozen_modules:
            module.eval()
        with seeded(run.model, run.settings.seed * 100_003 + epoch), torch.enable_grad():
            batches = run.data if isinstance(run.data, Iterable) or not callable(run.data) else run.data(epoch)
            steps = length_of(batches)
            before = time.perf_counter() - self.progress.seconds
            for position, batch in enumerate(self._remaining(batches, epoch, steps), start=self.progress.step):
                self.stepping, self.consistent = True, False
                try:
                    self._step(batch, position=position, steps=steps, before=before)
                    self.consistent = True
                    self._report()
                finally:
                    self.stepping = False
                if self.interrupted:
                    raise KeyboardInterrupt
                if run.save_every and (position + 1) % run.save_every == 0 and position + 1 != steps:
                    self._save()
                if self._time_share() >= 1:
                    break
        if not self.progress.step:
            raise DataError(f"the training data of epoch {epoch} is empty; give at least one batch")

    def _remaining(self, batches: Iterable[Any], epoch: int, steps: int) -> Iterator[Any]:
        """The batches not yet done, in the order and with the random states of a run without an interruption.

        The order is drawn when iteration begins, from the epoch's seed or from the loader's own generator. So iteration
        begins again and passes over what is done (all of it, if need be: samplers draw at their end too); then the
        states after the last step are restored.
        """
        done = self.progress.step
        if done and self.progress.steps not in (0, steps):
            raise DataError(
                f"the data of epoch {epoch} has {steps} batches, and had {self.progress.steps} when the run was "
                "interrupted; give the same data"
            )
        own = generators(batches)
        if self.saved.loaders and len(own) == len(self.saved.loaders):
            restore(own, self.saved.loaders)
        self.saved = replace(self.saved, loaders=states(own))
        iterator = batches_of(batches, what=f"epoch {epoch} of the training data")
        for passed in range(done):
            if next(iterator, self) is self:
                raise DataError(f"the data of epoch {epoch} ended after {passed} batches, and {done} were done already")
        if done and self.saved.rng.others:
            self.saved.rng.restore(self.run.model)
        yield from iterator

    def _step(self, batch: Any, *, position: int, steps: int, before: float) -> None:
        """One optimiser step, and the record of it. Nothing is changed if the loss or the gradient is not finite."""
        old, clip = self.progress, self.run.settings.clip
        result, self.latest = self._forward(batch, position)
        self._require_finite(self.latest, what="loss", position=position)
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(position, steps)
        self.optimiser.zero_grad(set_to_none=True)
        if result.loss.requires_grad:
            result.loss.backward()
        self._require_gradient(old)
        if clip is not None:
            norm = float(nn.utils.clip_grad_norm_(self.trained, clip))
            self._require_finite(norm, what="gradient", position=position)
        self.optimiser.step()
        sums = {
            "loss": old.loss + self.latest,
            "correct": old.correct + (result.correct or 0),
            "labelled": old.labelled + result.labelled,
            "seconds": time.perf_counter() - before,
        }
        progress = old.model_copy(update={"step": position + 1, "steps": steps, **sums})
        self.saved = replace(self.saved, progress=progress, rng=self._rng())

    def _forward(self, batch: Any, position: int) -> tuple[StepResult, float]:
        """The result, and the mean loss of the batch.

        With several processes, each weights the loss of its share so that the mean over processes is that of the batch;
        the counts are those of the whole batch.
        """
        objective, weight = self.objective, 1.0
        if self.others:
            batch, weight = share_of(from_numpy(batch), self.others, position=position)
        inputs, labels = split_labels(batch, position=position, model=self.run.model, required=objective.needs_labels)
        result = objective.step(self.network, inputs, labels, position=position)
        if self.others is None:
            return result, float(result.loss.detach())
        loss = weight * result.loss
        mean = float(loss.detach()) / self.others.num_processes
        parts = torch.tensor([mean, result.correct or 0, result.labelled]).double()
        mean, correct, labelled = total(parts, self.others).tolist()
        return StepResult(loss, None if result.correct is None else round(correct), round(labelled)), mean

    def _rate(self, position: int, steps: int) -> float:
        """The learning rate of a step of the present epoch; the same for all of them if their number is unknown."""
        done = len(self.progress.curve) + (position / steps if steps else 0)
        return self.run.settings.rate(min(1.0, max(done / self.run.settings.epochs, self._time_share())))

    def _require_finite(self, value: float, *, what: str, position: int) -> None:
        if math.isfinite(value):
            return
        checkpoint, note = self.run.checkpoint, ""
        if checkpoint and checkpoint.path.exists():
            epochs = "the best epoch so far" if self.saved.best else "an earlier step"
            note = f". {checkpoint.path} holds the weights of {epochs}: spectrim.training.resumed reads them"
        where = f"epoch {len(self.progress.curve)}, step {position}"
        raise TrainingError(f"the {what} became {value} in {where}; lower the learning rate or check the data{note}")

    def _require_gradient(self, before: Progress) -> None:
        """At the first step of a run, something must be learnt."""
        gradients = (parameter.grad for parameter in self.trained if parameter.grad is not None)
        if before.curve or before.step or any(bool(gradient.any()) for gradient in gradients):
            return
        raise TrainingError(
            f"no gradient reaches what is trained: at the first step (loss {self.latest:.4g}) all gradients are 0; do "
            "the outputs equal the targets already, does forward() detach them or work without gradients, or does the "
            "loss not fit the outputs? See loss="
        )

    def _report(self) -> None:
        """Call `on_step`, whose work, such as a projection of the weights, is part of the step; then `on_progress`."""
        run, progress = self.run, self.progress
        self.taken += 1
        epoch, epochs, seconds_left = len(progress.curve), run.settings.epochs, None
        if run.on_step is not None:
            if progress.steps:
                ahead = (epochs - epoch) * progress.steps - progress.step
                seconds_left = (time.perf_counter() - self.started) / self.taken * ahead
            right = progress.correct / progress.labelled if progress.labelled else None
            run.on_step(Step(epoch, epochs, progress.step - 1, progress.steps, self.latest, right, seconds_left))
            self.saved = replace(self.saved, rng=self._rng())
        if run.on_progress is not None:
            steps, note = progress.steps or progress.step, f"epoch {epoch + 1}/{epochs}, loss {self.latest:.3g}"
            run.on_progress(note, epoch * steps + progress.step, epochs * steps)

    def _rng(self) -> RngState:
        return RngState.now(self.run.model) if self.run.checkpoint else RngState()

    def _end_epoch(self) -> None:
        run, old = self.run, self.progress
        start = time.perf_counter()
        right = held_out_loss = None
        if run.held_out is not None:
            right, held_out_loss = self.objective.held_out(run.model, run.held_out)
            self._require_finite(held_out_loss or 0.0, what="held-out loss", position=old.step - 1)
        seconds = old.seconds + time.perf_counter() - start
        loss = old.loss / old.step
        ended = Epoch(epoch=len(old.curve), loss=loss, held_out=right, held_out_loss=held_out_loss, seconds=seconds)
        progress = Progress(curve=(*old.curve, ended), rates=(*old.rates, self._rate(old.step - 1, old.steps)))
        best = self.saved.best
        if run.settings.keep == "best" and progress.best == ended.epoch:
            best = {name: tensor.clone() for name, tensor in unique_tensors(run.model)[0].items()}
        self.saved = Saved(progress, best, loaders=states(self.own))
        self._save()

    def _save(self) -> None:
        if self.run.checkpoint and (self.others is None or self.others.process_index == 0):
            self.run.checkpoint.save(self.run.model, self.optimiser, self.saved)

    def _finished(self) -> History:
        curve, best = self.progress.curve, self.saved.best
        with torch.no_grad():
            for name, tensor in unique_tensors(self.run.model)[0].items() if best else ():
                tensor.copy_(best[name])
        position = self.progress.best if best else len(curve) - 1
        early = len(curve) < self.run.settings.epochs
        return History(curve, lr=self.progress.rates, stopped_early=early, weights_of=position)


@contextmanager
def _restored_flags(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only `trained` ask for gradients in the block; afterwards gradient and training flags are as before."""
    training = {module: module.training for module in model.modules()}
    chosen = {id(parameter) for parameter in trained}
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in chosen]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for module, flag in training.items():
            module.training = flag
