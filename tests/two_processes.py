"""Run by `torchrun` in each of two processes; the main one writes what came out, as safetensors."""

import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

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
    return Branching().eval()


def batches(sizes: tuple[int, ...] = (7, 4, 6, 5, 8)) -> list[Tensor]:
    """Only the second batch reaches the middle layer, so only one process sees it."""
    made = [torch.randn(size, 2, 5, 5, generator=torch.Generator().manual_seed(size)) + 0.5 for size in sizes]
    for number, batch in enumerate(made):
        batch[0, 0, 0, 0] = 1.0 if number == 1 else -1.0
    return made


def statistics(calibration: st.Calibration) -> dict[str, Tensor]:
    found = {"batches": torch.tensor(calibration.batches)}
    for name, one in calibration.moments.items():
        found |= {f"{name}.count": torch.tensor(one.count), f"{name}.mean": one.mean, f"{name}.cov": one.covariance}
        found |= {f"{name}.noise": torch.tensor(one.noise)} | ({} if one.felt is None else {f"{name}.felt": one.felt})
    return {name: tensor.contiguous() for name, tensor in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    found = statistics(st.calibrate(network(), batches(), gradients=True, accelerator=accelerator))
    if accelerator.is_main_process:
        save_file(found, sys.argv[1])
    accelerator.end_training()


if __name__ == "__main__":
    main()
