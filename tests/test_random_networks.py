"""Laws of compression on random networks that do what users' networks do; `benchmarks/random_graphs.py` runs more."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as draw
from network_laws import RULES, Laws
from random_networks import BLOCKS, KNOWN, OUTPUTS, WEIGHT_READERS, Network, Step, networks

import spectrim as st

slow = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[phase for phase in Phase if phase is not Phase.explain],  # it takes many minutes
)


@slow
@given(network=networks(), rule=draw.sampled_from(list(RULES)), calibrated=draw.booleans())
def test_the_laws_hold_whatever_a_network_does(network: Network, rule: str, calibrated: bool) -> None:
    assert Laws(network, RULES[rule], calibrated).check() == {}


@pytest.mark.parametrize("block", WEIGHT_READERS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_weight_may_be_read_outside_of_its_layers_call(block: str, calibrated: bool) -> None:
    network = Network("vector", tuple(Step(name, "linear", 24) for name in ("Plain", block, "Plain")))
    assert Laws(network, st.Rank(3), calibrated).check() == {}


def test_every_block_and_output_is_drawn_but_the_known() -> None:
    assert {*BLOCKS, *OUTPUTS} >= KNOWN


def test_a_network_comes_from_its_representation() -> None:
    network = Network("image", (Step("Normed", "conv", 8), Step("Residual", "conv", 8)), hooks=("doubling layer",))
    again = eval(repr(network))
    assert again == network
    assert all(map(_equal, again.build().state_dict().values(), network.build().state_dict().values()))


def _equal(first: object, second: object) -> bool:
    return bool((first == second).all())  # type: ignore[attr-defined]
