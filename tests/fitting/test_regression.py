"""Rows that a fit is made of."""

import torch
from torch import Tensor, nn

from spectrim.fitting.regression import InputRows
from spectrim.layers.types import layer_type_of


def test_rows_of_a_kernel_are_taken_from_its_input_when_they_are_needed() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(8, 4, 3, padding=1), torch.randn(2, 8, 5, 5)
    kind = layer_type_of(conv)

    def take(x: Tensor) -> tuple[Tensor, int]:
        taken.append(x)
        return kind.input_rows(conv, x, output=conv(x), positions=None), len(x)

    taken: list[Tensor] = []
    expected, _ = take(x)
    rows = InputRows("conv")
    rows.add(x, take)
    x.zero_()  # what follows may work in place
    assert (len(rows.rows), rows.sizes, rows.samples) == (1, [50], [2])
    assert torch.equal(rows.rows[0], expected)
    assert len(taken) == 3
    assert rows.to(torch.device("cpu")) is rows


def test_rows_that_are_the_input_itself_are_copied() -> None:
    x = torch.randn(1, 5, 3)
    rows = InputRows("linear")
    rows.add(x, lambda x: (x, 5))
    expected = x.clone()
    x.zero_()
    assert torch.equal(rows.rows[0], expected)
    assert not rows.are_tokens
