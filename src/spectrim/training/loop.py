"""One training loop, repeatable from its seed and resumable between epochs."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from spectrim.errors import DataError, TrainingError
from spectrim.execution import call, device_of, split_labels
from spectrim.measure import Epoch, accuracy
from spectrim.training.checkpoint import Checkpoint

EpochData = Callable[[int], Iterable[Any]]
"""Batches (inputs.., targets) of an epoch, counted from 0."""


@dataclass(frozen=True)
class Step:
    """Where training stands after one optimiser step; `steps` is 0 while the length of an epoch is unknown."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float


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
    frozen_norms: bool = False,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> tuple[Epoch, ...]:
    """Train `model` itself with Adam (decoupled weight decay), linear warm-up and cosine decay to zero.

    Targets that are class indices (batch,) give cross-entropy; targets that are a teacher's logits (batch, classes),
    or a `teacher` to ask for them, give the KL divergence at `temperature` (Hinton 2015), labels unused.

    Args:
        model: Trained in place; its training flags are put back.
        data: Gives the batches of each epoch; the same epoch must give as many batches every time.
        epochs: Passes over the data.
        lr: Peak learning rate.
        parameters: What to train; by default all that ask for gradients.
        teacher: A network with the same outputs.
        temperature: Softens both distributions.
        weight_decay: Decoupled, as in AdamW.
        warm_up: Share of all steps with rising learning rate.
        clip: Largest norm of the gradient.
        held_out: Batches on which accuracy is taken after each epoch.
        frozen_norms: Leave BatchNorm statistics as they are.
        seed: Of whatever the model draws (dropout); the caller's random state is put back.
        checkpoint: Where the state is kept after each epoch, and taken up from.
        on_step: Called after each step.

    Returns:
        One entry an epoch, those before an interruption included.

    Raises:
        TrainingError: the loss became NaN or infinite; says where.
        DataError: no batches, or targets that do not fit the outputs.
    """
    trained = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    # the fused update reads and writes every number once; on a CPU it is a third of a step otherwise
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained)
    optimiser = AdamW(trained, lr=lr, weight_decay=weight_decay, fused=fused)
    curve = list(checkpoint.restore(model, optimiser)) if checkpoint else []
    flags = {module: module.training for module in model.modules()}
    try:
        for epoch in range(len(curve), epochs):
            start = time.perf_counter()
            _train_mode(model, frozen_norms=frozen_norms)
            batches = data(epoch)
            steps = len(batches) if isinstance(batches, Sized) else 0
            losses: list[float] = []
            with _seeded(model, seed * 100_003 + epoch), torch.enable_grad():
                for position, batch in enumerate(batches):
                    at = (epoch + position / steps) / epochs if steps else epoch / epochs
                    rate = lr * _schedule(at, warm_up=warm_up)
                    loss = _loss(model, batch, position=position, teacher=teacher, temperature=temperature)
                    losses.append(
                        _update(loss, optimiser, rate=rate, clip=clip, trained=trained, where=(epoch, position))
                    )
                    if on_step:
                        on_step(Step(epoch, epochs, position, steps, losses[-1]))
            if not losses:
                raise DataError(f"the training data of epoch {epoch} is empty; give at least one batch")
            kept = accuracy(model, held_out).value if held_out is not None else None
            mean = sum(losses) / len(losses)
            curve.append(Epoch(epoch=epoch, loss=mean, held_out=kept, seconds=time.perf_counter() - start))
            if checkpoint:
                checkpoint.save(model, optimiser, curve=curve)
    finally:
        for module, flag in flags.items():
            module.training = flag
    return tuple(curve)


def _update(
    loss: Tensor,
    optimiser: Optimizer,
    *,
    rate: float,
    clip: float | None,
    trained: Sequence[nn.Parameter],
    where: tuple[int, int],
) -> float:
    """One optimiser step; nothing is changed when the loss is not finite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss became {value} in epoch {where[0]}, step {where[1]}; lower the learning rate or check the data"
        )
    for group in optimiser.param_groups:
        group["lr"] = rate
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(trained, clip)
    optimiser.step()
    return value


def _loss(model: nn.Module, batch: Any, *, position: int, teacher: nn.Module | None, temperature: float) -> Tensor:
    inputs, targets = split_labels(batch, position=position)
    outputs = call(model, inputs, what=f"batch {position}")
    if teacher is not None:
        with torch.no_grad():
            targets = call(teacher, inputs, what=f"batch {position}")
    targets = torch.as_tensor(targets).to(outputs.device)
    if targets.is_floating_point():
        if targets.shape != outputs.shape:
            raise DataError(f"the teacher's logits {list(targets.shape)} do not fit the outputs {list(outputs.shape)}")
        return _distillation(outputs, targets, temperature)
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
        raise DataError(f"labels {list(targets.shape)} do not fit the outputs {list(outputs.shape)}")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < outputs.shape[1]:
        raise DataError(f"batch {position} has labels outside 0..{outputs.shape[1] - 1}, the model's classes")
    return functional.cross_entropy(outputs, targets)


def _distillation(outputs: Tensor, logits: Tensor, temperature: float) -> Tensor:
    student = functional.log_softmax(outputs / temperature, dim=1)
    master = functional.log_softmax(logits / temperature, dim=1)
    return functional.kl_div(student, master, reduction="batchmean", log_target=True) * temperature**2


def _schedule(done: float, *, warm_up: float) -> float:
    """Share of the peak learning rate when `done` of all steps, in [0, 1], are taken."""
    if done < warm_up:
        return 0.04 + 0.96 * done / warm_up
    return 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


def _train_mode(model: nn.Module, *, frozen_norms: bool) -> None:
    model.train()
    if frozen_norms:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
