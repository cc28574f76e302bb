"""Free memory, and statistics in files or on another device."""

import gc
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from cases import inputs
from torch import nn

import spectrim as st
from spectrim.core import memory
from spectrim.core.memory import Storage, free_bytes

Free = namedtuple("Free", "available")


def maps(folder: Path) -> int:
    """Files of a folder that this process has mapped."""
    return Path("/proc/self/maps").read_text().count(str(folder))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10)).double()


@pytest.fixture
def _no_tensor_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAPPED_BYTES", 0)


@pytest.mark.usefixtures("_no_tensor_is_small")
def test_statistics_in_files_are_those_in_memory_and_leave_nothing(tmp_path: Path) -> None:
    batches = inputs(96, 24).split(32)
    usual = st.calibrate(network(), batches, gradients=True)
    stored = st.calibrate(network(), batches, gradients=True, offload=tmp_path)
    assert not list(tmp_path.iterdir())
    assert maps(tmp_path) == 4
    for name, moments in usual.moments.items():
        assert torch.equal(stored.moments[name].covariance, moments.covariance)
        assert moments.output_grad_covariance is not None
        assert torch.equal(stored.moments[name].output_grad_covariance, moments.output_grad_covariance)
    del stored
    gc.collect()
    assert maps(tmp_path) == 0


@pytest.mark.usefixtures("_no_tensor_is_small")
@pytest.mark.parametrize("rule", [st.Rank(4), st.Budget(params=0.6)], ids=str)
def test_a_network_is_the_same_with_statistics_in_files(rule: st.Rank | st.Budget, tmp_path: Path) -> None:
    x = inputs(96, 24)
    usual, offloaded = (
        st.compress(network(), rule, example_inputs=x[:1], data=x.split(32), keep_last=True, offload=folder)
        for folder in (None, tmp_path)
    )
    assert usual.plan == offloaded.plan
    for first, second in zip(usual.model.parameters(), offloaded.model.parameters(), strict=True):
        assert torch.equal(first, second)
    del usual, offloaded
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert maps(tmp_path) == 0


@pytest.mark.usefixtures("_no_tensor_is_small")
def test_nothing_is_left_of_a_calibration_that_fails(tmp_path: Path) -> None:
    with pytest.raises(st.errors.DataError):
        st.calibrate(network(), [inputs(8, 24), inputs(8, 24) * float("nan")], offload=tmp_path)
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert maps(tmp_path) == 0


def test_only_large_tensors_get_files(tmp_path: Path) -> None:
    small = torch.zeros(5)
    assert Storage.of(None, tmp_path).keep(small) is small
    assert Storage.of("cpu", None).keep(small) is small


def test_a_folder_that_cannot_be_written_to_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(st.errors.FileError, match="file"):
        st.compress(network(), st.Rank(2), example_inputs=inputs(1, 24), offload=tmp_path / "file")


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memory, "MAPPED_BYTES", 0)
    monkeypatch.setattr(memory.os, "posix_fallocate", full)
    with pytest.raises(st.errors.FileError, match="No space left"):
        st.calibrate(network(), [inputs(8, 24)], offload=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    for call in (
        lambda: st.calibrate(network(), [inputs(8, 24)], device=device),
        lambda: st.compress(network(), st.Rank(2), example_inputs=inputs(1, 24), device=device),
    ):
        with pytest.raises(st.errors.EngineError, match=device):
            call()


def test_files_are_for_the_cpu(tmp_path: Path) -> None:
    x = inputs(96, 24)
    named = st.compress(network(), st.Budget(params=0.6), example_inputs=x[:1], data=[x], device="cpu")
    usual = st.compress(network(), st.Budget(params=0.6), example_inputs=x[:1], data=[x])
    assert named.plan == usual.plan
    if torch.cuda.is_available():
        with pytest.raises(st.errors.ArgumentError, match="offload"):
            Storage.of("cuda", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize(("model_on", "statistics_on"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("rule", [st.Rank(4), st.Budget(params=0.6)], ids=str)
def test_statistics_are_on_another_device_than_the_model(
    rule: st.Rank | st.Budget, model_on: str, statistics_on: str
) -> None:
    x = inputs(96, 24)
    model = network().to(model_on)
    assert all(
        part.mean.device.type == statistics_on
        for part in st.calibrate(model, [x], device=statistics_on).moments.values()
    )
    small = st.compress(model, rule, example_inputs=x[:1], data=x.split(32), device=statistics_on)
    usual = st.compress(network(), rule, example_inputs=x[:1], data=x.split(32))
    assert all(parameter.device.type == model_on for parameter in small.model.parameters())
    assert small.plan.layers[0].ranks == usual.plan.layers[0].ranks
    torch.testing.assert_close(small.model(x.to(model_on)).cpu(), usual.model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_leaves_less_than_the_machine(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "memory" if version == 1 else tmp_path
    inner = top / "outer" / "inner"
    inner.mkdir(parents=True)
    limit, usage = memory._VERSION_1 if version == 1 else ("memory.max", "memory.current")
    for group, most in ((top / "outer", "900"), (inner, "max")):
        (group / limit).write_text(most + "\n")
        (group / usage).write_text("500\n")
        names, own = ("active_file", "inactive_file"), ""
        if version == 1:  # which counts the group alone first
            own = "active_file 1\ninactive_file 0\n"
            names = ("total_active_file", "total_inactive_file")
        cached = f"{own}{names[0]} 150\n{names[1]} 20\n"
        (group / "memory.stat").write_text(f"anon 300\n{cached}")
    groups = tmp_path / "groups"
    groups.write_text("4:cpu,memory:/outer/inner\n" if version == 1 else "0::/outer/inner\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", groups)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Free(2000))
    assert free_bytes(torch.device("cpu")) == 900 - 500 + 170
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Free(100))
    assert free_bytes(torch.device("cpu")) == 100


@pytest.mark.parametrize("library", [OSError("no such library"), None])
def test_freed_memory_is_returned_or_nothing_happens(library: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> object:
        if isinstance(library, OSError):
            raise library
        return library  # without the function, as on other systems

    monkeypatch.setattr(memory.ctypes, "CDLL", load)
    memory.return_freed()
    monkeypatch.undo()
    memory.return_freed()
