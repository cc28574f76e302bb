"""One training loop, repeatable from its seed and resumable after any step."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectrim.benchmark.measurement import Epoch, accuracy
from spectrim.core.distributed import averaging, several, share_of, total
from spectrim.core.errors import DataError, TrainingError
from spectrim.layers.selection import unique_tensors
from spectrim.training.chance import Chance, generators, put_back, seeded, states
from spectrim.training.checkpoint import Checkpoint, Progress, Saved
from spectrim.training.history import History
from spectrim.training.interrupt import Interrupts, interrupts
from spectrim.training.job import EpochData, Job, Repeated, Step, norms
from spectrim.training.objective import Outcome, outcome
from spectrim.training.settings import Settings


def fit(
    model: nn.Module,
    data: EpochData,
    *,
    epochs: int,
    lr: float,
    parameters: Iterable[nn.Parameter] | None = None,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    weight_decay: float = 0.0,
    warm_up: float = 0.1,
    clip: float | None = None,
    held_out: Sequence[Any] | None = None,
    keep: Literal["last", "best"] = "last",
    frozen_norms: bool = False,
    precision: Literal["float32", "bf16"] = "float32",
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> History:
    """Train `model` itself with Adam (decoupled weight decay), linear warm-up and cosine decay to zero.

    Targets that are class indices (batch,) give cross-entropy; targets that are a teacher's logits (batch, classes),
    or a `teacher` to ask for them, give the KL divergence at `temperature` (Hinton 2015), labels unused.

    Args:
        model: Trained in place; its training and gradient flags are put back.
        data: Gives the batches of each epoch; the same epoch must give the same batches every time.
        epochs: Passes over the data.
        lr: Peak learning rate.
        parameters: What to train; by default all that ask for gradients.
        teacher: A network with the same outputs.
        temperature: Softens both distributions.
        weight_decay: Decoupled, as in AdamW.
        warm_up: Share of all steps with rising learning rate.
        clip: Largest norm of the gradient.
        held_out: Batches on which accuracy is taken after each epoch.
        keep: The weights and buffers at the end: those of the last epoch, or of the one with the best held-out accuracy
            (the first of equals).
        frozen_norms: Leave BatchNorm statistics as they are.
        precision: `"bf16"` computes in bfloat16 where that is safe (autocast); weights and loss stay float32.
        seed: Of whatever the model and the data draw; the caller's random states are put back.
        checkpoint: Where the state is kept after each epoch and at an interrupt, and taken up from.
        on_step: Called after each step.

    Returns:
        One entry an epoch, those before an interruption included.

    Raises:
        TrainingError: settings that cannot be meant, `keep="best"` without `held_out`, or a loss that became NaN or
            infinite; says where.
        DataError: no batches, or targets that do not fit the outputs.
    """
    settings = Settings(
        epochs=epochs,
        lr=lr,
        weight_decay=weight_decay,
        warm_up=warm_up,
        clip=clip,
        temperature=temperature,
        keep=keep,
        precision=precision,
        seed=seed,
    )
    chosen = model.parameters() if parameters is None else parameters
    job = Job(
        model=model,
        data=data,
        settings=settings,
        trained=[parameter for parameter in chosen if parameter.requires_grad],
        still=norms(model) if frozen_norms else (),
        teacher=teacher,
        held_out=held_out,
        checkpoint=checkpoint,
        on_step=on_step,
    )
    return train(job)


def train(job: Job) -> History:
    """Do the job, in its model; flags of the model and random states are put back."""
    with _flags_kept(job.model), _only(job.model, job.trained):
        return _Run(job).go()


class _Run:
    """A run under way: everything that changes from step to step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.others = several(job.accelerator)
        self.runs = averaging(job.model, self.others) if self.others else job.model
        self.optimiser = job.settings.make_optimiser(job.trained)
        self.saved = Saved()
        # whether weights, optimiser and `saved` are of the same moment
        self.whole = False
        self.own = generators(job.data.batches) if isinstance(job.data, Repeated) else ()
        self.started, self.taken, self.latest = time.perf_counter(), 0, 0.0

    @property
    def progress(self) -> Progress:
        return self.saved.progress

    def go(self) -> History:
        before = states(self.own)
        try:
            with interrupts() as held_back:
                self._take_up()
                self.whole = True
                while len(self.progress.curve) < self.job.settings.epochs and not self._in_vain():
                    self._steps(held_back)
                    self._end_epoch()
        except KeyboardInterrupt:
            if self.whole:
                self._save()
            raise
        finally:
            put_back(self.own, before)
            self.optimiser.zero_grad(set_to_none=True)
        return self._finished()

    def _take_up(self) -> None:
        if self.job.checkpoint:
            self.saved = self.job.checkpoint.restore(self.job.model, self.optimiser) or self.saved
        place = torch.tensor([len(self.progress.curve), self.progress.step])
        if self.others and not torch.equal(total(place, self.others), self.others.num_processes * place):
            raise TrainingError(
                f"not every process finds the same checkpoint at {self.job.checkpoint and self.job.checkpoint.path}; "
                "put it on a disk that all of them see"
            )

    def _in_vain(self) -> bool:
        """Whether the held-out accuracy has not risen for as long as we wait."""
        patience, curve = self.job.settings.patience, self.progress.curve
        return bool(patience and curve and len(curve) - 1 - self.progress.best >= patience)

    def _steps(self, held_back: Interrupts) -> None:
        """What is left of the present epoch."""
        job, epoch = self.job, len(self.progress.curve)
        _train_mode(job.model, job.still)
        with seeded(job.model, job.settings.seed * 100_003 + epoch), torch.enable_grad():
            batches = job.data(epoch)
            steps = len(batches) if isinstance(batches, Sized) else 0
            before = time.perf_counter() - self.progress.seconds
            for position, batch in enumerate(self._remaining(batches, epoch, steps), start=self.progress.step):
                with held_back.held():
                    self.whole = False
                    self._step(batch, position=position, steps=steps, before=before)
                    self.whole = True
                    self._tell(position)
                if job.save_every and (position + 1) % job.save_every == 0 and position + 1 != steps:
                    self._save()
        if not self.progress.step:
            raise DataError(f"the training data of epoch {epoch} is empty; give at least one batch")

    def _remaining(self, batches: Iterable[Any], epoch: int, steps: int) -> Iterator[Any]:
        """The batches not yet done, in the order and with the random states of a run without an interruption.

        The order is drawn when iteration begins, from the epoch's seed or from the loader's own generator; so it begins
        again, what is done is passed over (all of it, if need be: samplers draw at their end too), and the states after
        the last step are put back.
        """
        done = self.progress.step
        if done and self.progress.steps not in (0, steps):
            raise DataError(
                f"the data of epoch {epoch} has {steps} batches, and had {self.progress.steps} when the run was "
                "interrupted; give the same data"
            )
        own = generators(batches)
        if self.saved.loaders and len(own) == len(self.saved.loaders):
            put_back(own, self.saved.loaders)
        self.saved = Saved(self.progress, self.saved.best, self.saved.chance, states(own))
        iterator = iter(batches)
        for passed in range(done):
            if next(iterator, self) is self:
                raise DataError(f"the data of epoch {epoch} ended after {passed} batches, and {done} were done already")
        if done and self.saved.chance:
            self.saved.chance.put_back(self.job.model)
        yield from iterator

    def _step(self, batch: Any, *, position: int, steps: int, before: float) -> None:
        """One optimiser step, and the note that it was taken."""
        job, old = self.job, self.progress
        epoch = len(old.curve)
        found = self._outcome(batch, position)
        loss, correct, labelled = self._together(found)
        self._update(found.loss, loss, rate=self._rate(position, steps), where=f"epoch {epoch}, step {position}")
        made = Progress.model_construct(
            curve=old.curve,
            rates=old.rates,
            step=position + 1,
            steps=steps,
            loss=old.loss + loss,
            correct=old.correct + (correct or 0),
            labelled=old.labelled + labelled,
            seconds=time.perf_counter() - before,
        )
        chance = Chance.now(job.model) if job.checkpoint else None
        self.saved = Saved(made, self.saved.best, chance, self.saved.loaders)
        self.latest = loss

    def _outcome(self, batch: Any, position: int) -> Outcome:
        """That of a batch, or of this process's share, so that the mean over processes is that of the batch."""
        job, weight = self.job, 1.0
        if self.others:
            batch, weight = share_of(batch, self.others, position=position)
        found = outcome(self.runs, batch, position=position, teacher=job.teacher, settings=job.settings)
        return replace(found, loss=weight * found.loss) if self.others else found

    def _together(self, found: Outcome) -> tuple[float, int | None, int]:
        """Loss, right answers and labelled ones, of all processes."""
        loss = float(found.loss.detach())
        if self.others is None:
            return loss, found.correct, found.labelled
        parts = torch.tensor([loss / self.others.num_processes, found.correct or 0, found.labelled]).double()
        loss, correct, labelled = total(parts, self.others).tolist()
        return loss, None if found.correct is None else round(correct), round(labelled)

    def _rate(self, position: int, steps: int) -> float:
        """The learning rate of a step of the present epoch; the same for all of them where their number is unknown."""
        done = len(self.progress.curve) + (position / steps if steps else 0)
        return self.job.settings.rate(done / self.job.settings.epochs)

    def _update(self, objective: Tensor, loss: float, *, rate: float, where: str) -> None:
        """Nothing is changed when the loss or the gradient is not finite."""
        self._require_finite(loss, what="loss", where=where)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        objective.backward()
        if self.job.settings.clip is not None:
            norm = nn.utils.clip_grad_norm_(self.job.trained, self.job.settings.clip)
            self._require_finite(float(norm), what="gradient", where=where)
        self.optimiser.step()

    def _require_finite(self, value: float, *, what: str, where: str) -> None:
        if math.isfinite(value):
            return
        place = self.job.checkpoint
        kept = ""
        if place and place.path.exists():
            epochs = "the best epoch so far" if self.saved.best else "an earlier step"
            kept = f". {place.path} holds the weights of {epochs}: spectrim.training.resumed reads them"
        raise TrainingError(f"the {what} became {value} in {where}; lower the learning rate or check the data{kept}")

    def _tell(self, position: int) -> None:
        """What the listener does, such as a projection of the weights, is part of the step."""
        job, progress = self.job, self.progress
        self.taken += 1
        if job.on_step is None:
            return
        epoch, right = len(progress.curve), progress.correct / progress.labelled if progress.labelled else None
        job.on_step(
            Step(epoch, job.settings.epochs, position, progress.steps, self.latest, right, self._seconds_left())
        )
        if job.checkpoint:
            self.saved = Saved(progress, self.saved.best, Chance.now(job.model), self.saved.loaders)

    def _seconds_left(self) -> float | None:
        progress = self.progress
        if not progress.steps:
            return None
        left = (self.job.settings.epochs - len(progress.curve)) * progress.steps - progress.step
        return (time.perf_counter() - self.started) / self.taken * left

    def _end_epoch(self) -> None:
        job, old = self.job, self.progress
        start = time.perf_counter()
        held_out = accuracy(job.model, job.held_out).value if job.held_out is not None else None
        seconds = old.seconds + time.perf_counter() - start
        ended = Epoch(epoch=len(old.curve), loss=old.loss / old.step, held_out=held_out, seconds=seconds)
        rates = (*old.rates, self._rate(old.step - 1, old.steps))
        progress = Progress(curve=(*old.curve, ended), rates=rates)
        best = self.saved.best
        if job.settings.keep == "best" and progress.best == ended.epoch:
            best = {name: tensor.clone() for name, tensor in unique_tensors(job.model)[0].items()}
        self.saved = Saved(progress, best, None, states(self.own))
        self._save()

    def _save(self) -> None:
        if self.job.checkpoint and (self.others is None or self.others.is_main_process):
            self.job.checkpoint.save(self.job.model, self.optimiser, self.saved)

    def _finished(self) -> History:
        progress = self.progress
        best = self.saved.best
        with torch.no_grad():
            for name, tensor in unique_tensors(self.job.model)[0].items() if best else ():
                tensor.copy_(best[name])
        return History(
            progress.curve,
            lr=progress.rates,
            stopped_early=len(progress.curve) < self.job.settings.epochs,
            kept=progress.best if best else len(progress.curve) - 1,
        )


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def _only(model: nn.Module, trained: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these parameters ask for gradients; afterwards the same ones as before."""
    chosen = {id(parameter) for parameter in trained}
    others: list[Tensor] = [one for one in model.parameters() if one.requires_grad and id(one) not in chosen]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _train_mode(model: nn.Module, still: Collection[nn.Module]) -> None:
    model.train()
    for module in still:
        module.eval()
