"""Two real processes, through Hugging Face Accelerate, come to what one process comes to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import spectrim as st
from spectrim.core.distributed import all_reduce, shard

pytest.importorskip("accelerate", reason="needs the extra `distributed`")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from two_processes import batches, network, statistics, student, tuned  # noqa: E402


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], str]:
    """What the main one of two processes wrote."""
    out = tmp_path_factory.mktemp("two") / "results.safetensors"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(HERE / "two_processes.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, script, str(out)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    with safe_open(out, framework="pt") as opened:
        return load_file(out), opened.metadata()["refused"]


def test_calibration_in_two_processes_equals_that_in_one(both: tuple[dict[str, Tensor], str]) -> None:
    alone = statistics(st.calibrate(network(), batches(), gradients=True))
    assert {"rare.cov", "rare.output_grad_covariance", "conv.cov", "head.output_grad_covariance"} <= set(alone)
    together = {name: tensor for name, tensor in both[0].items() if name in alone}
    assert set(together) == set(alone)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-10, atol=1e-13)


def test_fine_tuning_in_two_processes_equals_that_in_one(both: tuple[dict[str, Tensor], str]) -> None:
    alone = tuned()
    tuned_weights = {name: tensor for name, tensor in both[0].items() if name.startswith("tuned.")}
    together = {name.removeprefix("tuned."): tensor for name, tensor in tuned_weights.items()}
    assert set(together) == set(alone.model.state_dict())
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-4)
    curve = torch.tensor([[epoch.loss, epoch.held_out or 0.0] for epoch in alone.history]).double()
    torch.testing.assert_close(both[0]["curve"], curve, rtol=1e-3, atol=1e-4)
    before = student().state_dict()
    assert max(float((before[name] - tensor).abs().max()) for name, tensor in alone.model.state_dict().items()) > 0.01


def test_two_processes_go_on_from_their_checkpoint_bit_for_bit(both: tuple[dict[str, Tensor], str]) -> None:
    for name, tensor in both[0].items():
        if name.startswith("tuned."):
            assert torch.equal(tensor, both[0][name.replace("tuned.", "resumed.")]), name


def test_a_batch_with_fewer_samples_than_processes_raises(both: tuple[dict[str, Tensor], str]) -> None:
    assert "batch 0 has 1 samples, which cannot be divided among 2 processes" in both[1]
    assert "drop_last=True" in both[1]


def test_one_process_keeps_every_batch_and_its_own_sums() -> None:
    assert list(shard("abc", None)) == [(0, "a", True), (1, "b", True), (2, "c", True)]
    tensors = {"layer": torch.ones(2)}
    assert all_reduce(tensors, names=["layer", "other"], accelerator=None) == tensors
