"""What a command computes with: its device, and as many threads as its network is worth and others leave free."""

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import torch
import typer

from spectrim.cli.options import Machine
from spectrim.core.memory import free_bytes
from spectrim.reporting import words
from spectrim.runtimes.sessions import own_cores, require_threads

SMALL_BATCH = 500_000_000
"""MACs of a batch below which a second thread does not pay (`python benchmarks/busy_machine.py --steps`)."""


def find_device(machine: Machine) -> torch.device:
    """The device that was asked for, and the threads checked. Raises `BadParameter` where this machine lacks it."""
    require_threads(machine.threads or 1)
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    present = [*(name for name, is_there in gpus.items() if is_there), "cpu"]
    if machine.device not in ("auto", *present):
        build = "" if torch.version.cuda else "; PyTorch is built without CUDA"
        others = f"this machine has {', '.join(present)} and no other{build}"
        raise typer.BadParameter(f"--device {machine.device}: {others}")
    return torch.device(present[0] if machine.device == "auto" else machine.device)


def set_threads(machine: Machine, macs: int, *, closing: ExitStack, say: Callable[[str], object]) -> None:
    """Set the threads for batches of so many MACs until `closing` is closed, and say what is computed with."""
    device, threads, reason = find_device(machine), machine.threads, "--threads"
    if threads is None and "OMP_NUM_THREADS" in os.environ:
        threads, reason = torch.get_num_threads(), "OMP_NUM_THREADS"
    threads, reason = (threads, reason) if threads else choose_threads(macs, cores=_cores(), busy=_busy())
    closing.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(threads)
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    memory = f"{words.size(free_bytes(device))} of {words.size(total)} free"
    say(f"{name}, {memory}; {reason}: {words.threads(threads)}")


def choose_threads(macs: int, *, cores: int, busy: float) -> tuple[int, str]:
    """How many threads compute batches of so many MACs on `cores`, of which others take `busy`; and the reason."""
    free = max(0, cores - int(busy + 0.5))
    return (1, "small network") if macs < SMALL_BATCH else (max(1, free), f"{free} of {cores} cores free")


def _busy() -> float:
    """How many of this process's cores other programs take, measured while it waits."""
    shares = psutil.cpu_percent(0.2, percpu=True)
    return float(sum(share for core, share in enumerate(shares) if core in own_cores())) / 100


def _cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many cores this process may use, within its container's limit."""
    cores = len(own_cores())
    with suppress(OSError, ValueError):  # no container, or no limit ("max")
        quota, period = map(int, limit.read_text().split())
        return max(1, min(cores, quota // period))
    return cores
