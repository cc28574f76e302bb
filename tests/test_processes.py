"""Two real processes, through Hugging Face Accelerate, come to what one process comes to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import spectrim as st
from spectrim.processes import in_turn, summed

pytest.importorskip("accelerate", reason="needs the extra `distributed`")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from two_processes import batches, network, statistics  # noqa: E402


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What the main one of two processes wrote."""
    out = tmp_path_factory.mktemp("two") / "found.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(HERE / "two_processes.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, script, str(out)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(out)


def test_calibration_in_two_processes_equals_that_in_one(both: dict[str, Tensor]) -> None:
    alone = statistics(st.calibrate(network(), batches(), gradients=True))
    assert {"rare.cov", "rare.felt", "conv.cov", "head.felt"} <= set(alone)
    found = {name: tensor for name, tensor in both.items() if name in alone}
    assert set(found) == set(alone)
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-13)


def test_one_process_keeps_every_batch_and_its_own_sums() -> None:
    assert list(in_turn("abc", None)) == [(0, "a", True), (1, "b", True), (2, "c", True)]
    tensors = {"layer": torch.ones(2)}
    assert summed(tensors, names=["layer", "other"], accelerator=None) == tensors
