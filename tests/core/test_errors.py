"""Warnings name the line of the program that called the library, however many functions are between."""

import linecache
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import spectrim as st


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())


def compress(samples: int, **options: object) -> st.Compressed:
    data = torch.randn(samples, 3, 8, 8).split(8)
    return st.compress(network(), st.Budget(macs=0.6), example_inputs=data[0][:1], data=data, **options)


def same_network() -> None:
    st.distill(network(), network(), data=torch.randn(32, 3, 8, 8).split(16))


@pytest.mark.parametrize(
    ("run", "message"),
    {
        "few samples": (lambda: compress(3), "what so few cannot tell"),
        "distilled on its own": (lambda: compress(32, distill=st.Distillation(epochs=1)), "next to nothing"),
        "nothing to learn": (same_network, "left as it is"),
    }.values(),
)
def test_warnings_name_the_caller(run: Callable[[], object], message: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    (warning,) = (warning for warning in caught if message in str(warning.message))
    assert warning.filename == __file__
    assert " st." in linecache.getline(__file__, warning.lineno)
