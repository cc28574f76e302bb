"""Run by `torchrun` in each of two processes; the main one writes the results, as safetensors."""

import os
import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import spectrim as st


class Branching(nn.Module):
    """A network whose middle layer sees only the batches with a positive first number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.rare = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        if x.flatten()[0] > 0:
            y = y + torch.relu(self.rare(y))
        return self.head(y)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Branching().double().eval()


def batches(sizes: tuple[int, ...] = (7, 4, 6, 5, 8)) -> list[Tensor]:
    """Only the second batch reaches the middle layer, so only one process sees it."""
    drawn = [torch.randn(size, 2, 5, 5, generator=torch.Generator().manual_seed(size)).double() + 0.5 for size in sizes]
    for number, batch in enumerate(drawn):
        batch[0, 0, 0, 0] = 1.0 if number == 1 else -1.0
    return drawn


def statistics(calibration: st.Calibration) -> dict[str, Tensor]:
    tensors = {"batches": torch.tensor(calibration.batches)}
    for name, moments in calibration.moments.items():
        tensors |= {f"{name}.count": torch.tensor(moments.count), f"{name}.mean": moments.mean}
        tensors |= {f"{name}.cov": moments.covariance}
        tensors |= {f"{name}.rounding_tolerance": torch.tensor(moments.rounding_tolerance)}
        if moments.output_grad_covariance is not None:
            tensors[f"{name}.output_grad_covariance"] = moments.output_grad_covariance
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def student() -> nn.Module:
    torch.manual_seed(1)
    first = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU()
    )
    dense = nn.Sequential(*first, nn.Flatten(), nn.Linear(108, 3))
    return st.compress(dense, st.Rank(4), example_inputs=torch.zeros(1, 2, 5, 5), keep_last=True).model


def labelled() -> DataLoader:
    """Batches of 8, 8, 8 and 5, shuffled anew in every epoch."""
    images = torch.randn(29, 2, 5, 5, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(images, torch.arange(29) % 3), batch_size=8, shuffle=True)


def tuned(checkpoint: str | None = None, *, accelerator: Accelerator | None = None, epochs: int = 3) -> st.Finetuned:
    """By labels and a teacher, with held-out accuracy."""
    held_out = [(batch.float(), torch.zeros(len(batch), dtype=torch.long)) for batch in batches()]
    return st.finetune(
        student(),
        labelled(),
        teacher=student(),
        label_weight=0.5,
        epochs=epochs,
        lr=1e-2,
        held_out=held_out,
        keep="best",
        checkpoint=checkpoint,
        save_every=1 if checkpoint else None,
        accelerator=accelerator,
    )


def stopped(path: str, accelerator: Accelerator) -> None:
    """Interrupted in the second epoch by an error on both sides, as when a machine is lost."""
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise ConnectionError("lost")

    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: count() if isinstance(module, DistributedDataParallel) else None
    )
    try:
        tuned(path, accelerator=accelerator)
    except st.errors.ModelError:
        return
    finally:
        handle.remove()
    raise AssertionError("it was not interrupted")


def error_of_a_small_batch(accelerator: Accelerator) -> str:
    """What is said of a batch with fewer samples than processes."""
    try:
        st.finetune(student(), [(torch.randn(1, 2, 5, 5), torch.tensor([0]))], epochs=1, accelerator=accelerator)
    except st.errors.DataError as error:
        return str(error)
    return ""


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    out = sys.argv[1]
    results = statistics(st.calibrate(network(), batches(), gradients=True, accelerator=accelerator))
    trained = tuned(accelerator=accelerator)
    results |= {f"tuned.{name}": tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    results["curve"] = torch.tensor([[epoch.loss, epoch.held_out or 0.0] for epoch in trained.history]).double()
    checkpoint = f"{out}.unfinished"
    stopped(checkpoint, accelerator)
    again = tuned(checkpoint, accelerator=accelerator)
    results |= {f"resumed.{name}": tensor.contiguous() for name, tensor in again.model.state_dict().items()}
    message = error_of_a_small_batch(accelerator)
    if accelerator.is_main_process:
        save_file(results, out, metadata={"refused": message})
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
    # Now and then gloo aborts ("terminate called without an active exception") while Python is taken down.
    os._exit(0)
