"""The network of the files in `tests/files/saved`, which commit 25f9191 wrote."""

from pathlib import Path

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "files" / "saved"


class SavedNetwork(nn.Module):
    """Every layer type and form, one layer under two names, and two layers of one weight; (n, 3, 12, 12) -> (n, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 24, 3, padding=1, stride=2, bias=False)
        self.grouped = nn.Conv2d(24, 24, 3, groups=2, padding=1, padding_mode="circular")
        self.point = nn.Conv2d(24, 16, 1)
        self.back = nn.ConvTranspose2d(16, 12, 4, stride=2, padding=1)
        self.steps = nn.Conv1d(12, 20, 3, padding=1)
        self.first = nn.Linear(20, 20)
        self.again = self.first
        self.tied = nn.Linear(20, 20, bias=False)
        self.tied.weight = self.first.weight
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        x = torch.relu(self.back(torch.relu(self.point(torch.relu(self.grouped(x))))))
        x = torch.relu(self.steps(x.flatten(2))).mean(dim=2)
        return self.head(torch.relu(self.tied(torch.relu(self.again(torch.relu(self.first(x)))))))


def saved_network() -> SavedNetwork:
    """The network with its dense weights."""
    torch.manual_seed(0)
    return SavedNetwork().eval()


def saved_inputs() -> Tensor:
    """Eight inputs."""
    return torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
