"""How much an error in a layer changes what a block gives: by hand where it can be said."""

import pytest
import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.analysis.block_errors import block_sensitivity, first_samples, relative_squares
from spectrim.core.execution import Inputs
from spectrim.layers.tokens import TokenMasks


class Branches(nn.Module):
    """Hidden states plus one layer's output, and plus another one's, a tenth of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small, self.unused = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.large(hidden) + 0.1 * self.small(hidden) + 0 * self.unused(hidden)


def batches(filler: float = 0.0) -> list[Inputs]:
    draw = torch.Generator().manual_seed(1)
    hidden = [torch.randn(2, 64, 16, generator=draw) for _ in range(3)]
    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[1, 40:] = 0
    for rows in hidden:
        rows[1, 40:] = filler
    return [Inputs((rows,), {}, mask) for rows in hidden]


def measured(filler: float = 0.0) -> dict[str, float]:
    model, data = Branches().eval(), batches(filler)
    analysis = st.analyze(model, data[0], calibration=st.calibrate(model, data))
    return {name: own["linear"] for name, own in block_sensitivity(model, analysis, data).items()}


def test_a_branch_counts_by_its_size() -> None:
    sensitivity = measured()
    assert sensitivity["large"] == pytest.approx(100 * sensitivity["small"], rel=0.3)
    assert 0.1 < sensitivity["large"] < 1
    assert sensitivity["unused"] == 0


def test_padding_counts_nowhere() -> None:
    assert measured() == pytest.approx(measured(filler=100.0), rel=1e-4)


def test_the_model_is_as_it_was() -> None:
    model, data = Branches().train(), batches()
    analysis = st.analyze(model, data[0], calibration=st.calibrate(model, data))
    block_sensitivity(model, analysis, data)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_first_samples_take_the_mask_along() -> None:
    inputs = Inputs((torch.zeros(3, 5, 4), torch.zeros(1, 5)), {"mask": torch.zeros(3, 1, 5, 5)}, torch.ones(3, 5))
    few = first_samples(inputs, 2)
    assert [list(tensor.shape) for tensor in few.tensors()] == [[2, 5, 4], [1, 5], [2, 1, 5, 5]]
    assert few.samples == 2


def test_each_token_counts_by_its_own_size() -> None:
    before = torch.tensor([[[3.0, 4.0], [0.0, 100.0], [9.0, 9.0]]])
    after = before + torch.tensor([[[1.0, 0.0], [0.0, 10.0], [9.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0]])
    squares = relative_squares(before, after, TokenMasks.of(nn.Identity(), Inputs((before,), {}, mask)))
    torch.testing.assert_close(squares, torch.tensor([1 / 25, 1 / 100], dtype=torch.float64))
