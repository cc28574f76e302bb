"""The factored layer as a module among others."""

import copy

import pytest
import torch
from cases import inputs
from torch import nn

import spectrim as st
from spectrim import errors
from spectrim.layers.factored import _LowRank


def layer(*, bias: bool = True) -> st.LowRankLinear:
    torch.manual_seed(0)
    return st.LowRankLinear(nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product_of_its_factors(bias: bool) -> None:
    made, x = layer(bias=bias), inputs(3, 4, 6, dtype=torch.float32)
    expected = nn.functional.linear(x, made.weight, made.bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)
    assert (made.in_features, made.out_features, made.rank) == (6, 5, 2)
    assert (made.bias is not None) == bias
    assert "rank=2" in repr(made)


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(errors.ModelError, match="no bias"):
        st.LowRankLinear(nn.Linear(6, 2), nn.Linear(2, 5))
    with pytest.raises(errors.ModelError, match="as many outputs"):
        st.LowRankLinear(nn.Linear(6, 2, bias=False), nn.Linear(3, 5))


def test_an_empty_one_draws_no_random_numbers_and_takes_after_its_model() -> None:
    dense = nn.Linear(6, 5, dtype=torch.float16).eval().requires_grad_(False)
    random = torch.get_rng_state()
    made = st.LowRankLinear.empty_like(dense, ranks=(2,), bias=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert made.weight.dtype == torch.float16
    assert not made.training
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_gradients_reach_both_factors() -> None:
    made = layer()
    made(torch.ones(2, 6)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in made.parameters())


def test_copies_state_and_exported_programs_just_work() -> None:
    model, x = nn.Sequential(layer(), nn.ReLU()), torch.randn(3, 6)
    assert list(model.state_dict()) == ["0.down.weight", "0.up.weight", "0.up.bias"]
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        torch.testing.assert_close(exported(x), model(x))


def test_a_low_rank_layer_without_its_parts_cannot_be_made() -> None:
    class Unfinished(_LowRank[nn.Linear]):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()
