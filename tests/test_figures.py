"""The figures do not move: plans and outputs at three budgets are those of the files in `tests/files/figures`."""

import pytest
from figures import QUICK, require_unchanged


@pytest.mark.parametrize(("network", "calibrated"), QUICK)
def test_plans_and_outputs_are_those_of_before(network: str, calibrated: bool) -> None:
    require_unchanged(network, calibrated=calibrated)
