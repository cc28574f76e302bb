"""The weight of a factored layer: what would be lost with it is refused by name, and copies are its value."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import same_state, state
from torch import Tensor, nn
from torch.nn import functional, init
from torch.nn.utils import prune

import spectrim as st
from spectrim.layers.forms import LowRankLinear

ONES = torch.ones(24, 16)


def layer() -> LowRankLinear:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 24), nn.ReLU())
    small = st.compress(network, st.Rank(3), example_inputs=torch.zeros(1, 16)).model[0]
    assert isinstance(small, LowRankLinear)
    return small


@torch.no_grad()
def zero_all(parts: Any) -> None:
    for part in parts:
        part.zero_()


WRITES: dict[str, Callable[[Any], object]] = {
    "a row of data": lambda weight: weight.data[0].zero_(),
    "a view of data": lambda weight: weight.data.view(-1).mul_(2),
    "the transposed": lambda weight: weight.detach().t().mul_(0),
    "a row": lambda weight: weight[0].zero_(),
    "rows in turn": zero_all,
    "chunks": lambda weight: zero_all(weight.chunk(2)),
    "the same type": lambda weight: weight.data.float().zero_(),
    "a list": lambda weight: torch._foreach_mul_([weight], 0.0),
    "moving averages": lambda weight: torch._foreach_lerp_([weight], [ONES], 0.5),
    "relu": lambda weight: functional.relu(weight, inplace=True),
    "dropout": lambda weight: functional.dropout(weight, inplace=True),
    "an operator": lambda weight: torch.ops.aten.add_.Tensor(weight, ONES),
    "an operator's output": lambda weight: torch.ops.aten.add.out(ONES, ONES, out=weight),
    "one of two outputs": lambda weight: torch.max(torch.zeros(24, 16, 2), 2, out=(weight.data, ONES.long())),
    "data": lambda weight: setattr(weight, "data", ONES),
    "a start": init.normal_,
    "a start of a view": lambda weight: init.dirac_(weight.view(24, 16, 1)),
    "an optimizer": lambda weight: torch.optim.SGD([weight], lr=1.0),
    "a hook": lambda weight: weight.register_hook(lambda gradient: 2 * gradient),
    "a parameter": lambda weight: nn.Parameter(weight.data),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_refused(name: str) -> None:
    small = layer()
    before = state(small)
    with pytest.raises(st.errors.ModelError, match=r"cannot be written to.* st.merge\(model\).*\.clone\(\)"):
        WRITES[name](small.weight)
    assert same_state(small, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda small: setattr(small, "weight", nn.Parameter(ONES)),
        lambda small: delattr(small, "weight"),
        lambda small: prune.l1_unstructured(small, "weight", 0.5),
        lambda small: prune.l1_unstructured(small, "bias", 0.5),
        lambda small: prune.global_unstructured([(small, "weight")], prune.L1Unstructured, amount=0.5),
    ],
)
def test_another_weight_is_refused(change: Callable[[nn.Module], object]) -> None:
    small = layer()
    before = state(small)
    with pytest.raises(st.errors.ModelError, match=r"no (weight|bias) to exchange; set or prune those of its factors"):
        change(small)
    assert same_state(small, before)


def test_factors_are_pruned_and_trained() -> None:
    small = layer()
    prune.l1_unstructured(small.chain[0], "weight", 0.5)
    assert int((small.chain[0].weight == 0).sum()) == 24
    small(torch.ones(2, 16)).sum().backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()


COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of data": lambda weight: copy.deepcopy(weight.data),
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "clone": lambda weight: weight.detach().clone(),
    "a parameter": lambda weight: nn.Parameter(weight.detach().clone()),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_an_ordinary_tensor_of_its_own(name: str) -> None:
    small = layer()
    own = COPIES[name](small.weight)
    assert type(own) in (Tensor, nn.Parameter)
    assert torch.equal(own, small.weight)
    own.detach().zero_()
    assert small.weight.any()


def test_views_are_read_as_before() -> None:
    small, x = layer(), torch.randn(5, 16)
    rows, transposed = small.weight[:4], small.weight.t()
    assert rows.shape == (4, 16)
    torch.testing.assert_close(x @ transposed[:, :4], functional.linear(x, rows))
    (x @ transposed).sum().backward()
    assert all(part.weight.grad is not None for part in small.chain)
    array = small.weight.detach().numpy()
    assert np.array_equal(array, small.weight.tolist())
    assert not array.flags.writeable
