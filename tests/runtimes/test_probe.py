"""The grid of the hardware: read from staircases, and probed on this machine."""

import math
import random

import pytest
import torch

from spectrim import errors
from spectrim.runtimes.rank_grid import RANKS, Grid, probe, step_of


def staircase(step: int, *, overhead: float = 10.0, penalty: float = 0.0) -> dict[int, float]:
    """Times of ranks that are padded up to a multiple, plus `penalty` off the grid."""
    return {rank: overhead + math.ceil(rank / step) * step + penalty * (rank % step > 0) for rank in RANKS}


@pytest.mark.parametrize("step", [1, 8, 16, 32])
@pytest.mark.parametrize("overhead", [0.0, 60.0])
@pytest.mark.parametrize("unit", [1e-3, 5.0])
def test_the_step_of_a_staircase(step: int, overhead: float, unit: float) -> None:
    times = {rank: unit * time for rank, time in staircase(step, overhead=overhead).items()}
    assert step_of(times) == step


@pytest.mark.parametrize("step", [1, 8, 16, 32])
def test_the_step_shows_through_noise(step: int) -> None:
    """Medians of 15 rounds are within a per cent or two; here each is off by a fiftieth."""
    for seed in range(50):
        draw = random.Random(seed)
        times = {rank: time * draw.gauss(1, 0.02) for rank, time in staircase(step).items()}
        assert step_of(times) == step


@pytest.mark.parametrize("step", [8, 16, 32])
def test_ranks_off_the_grid_may_cost_extra(step: int) -> None:
    assert step_of(staircase(step, penalty=7.0)) == step


def test_finer_steps_than_those_looked_for_are_none() -> None:
    assert step_of(staircase(2)) == 1
    assert step_of(staircase(3)) == 1


def test_times_that_do_not_grow_show_no_step() -> None:
    assert step_of(dict.fromkeys(RANKS, 1.0)) == 1
    assert step_of({rank: 1 / rank for rank in RANKS}) == 1


def test_a_grid_goes_to_json_and_back() -> None:
    grid = Grid(multiple=16, times=staircase(16), runtime="torch", threads=1, batch=1, fingerprint="a processor")
    assert Grid.model_validate_json(grid.model_dump_json()) == grid


def test_probing_this_machine_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    grid = probe(runtime="torch")
    assert capfd.readouterr() == ("", "")
    assert grid.multiple in (1, 8, 16, 32)
    assert grid.multiple == step_of(grid.times)
    assert set(grid.times) == set(RANKS)
    assert grid.times[96] > 0
    assert "torch" in grid.fingerprint


def test_probing_onnx_runtime_leaves_torch_alone() -> None:
    before = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
    grid = probe(runtime="onnxruntime", batch=4)
    assert (grid.runtime, grid.batch) == ("onnxruntime", 4)
    assert grid.multiple in (1, 8, 16, 32)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == before[1:]


def test_bad_requests_are_refused() -> None:
    with pytest.raises(errors.EngineError, match="did you mean 'openvino'"):
        probe(runtime="openvin")
    with pytest.raises(errors.EngineError, match="batch=0"):
        probe(batch=0)
    with pytest.raises(errors.EngineError, match="threads=4096"):
        probe(threads=4096)
