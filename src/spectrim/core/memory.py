"""Memory: how much of it is free, and where large tensors are kept."""

import ctypes
import importlib
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from spectrim.core.errors import ArgumentError, EngineError, FileError, ResourceError
from spectrim.core.execution import device_of
from spectrim.core.files import require_writable_folder

MAPPED_BYTES = 2**24
"""Size from which a tensor is worth a file: 16 MiB."""

_MUCH = 2**27
"""Bytes of freed memory that are worth the time: 128 MiB."""

_CGROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Storage:
    """Where statistics are kept.

    Attributes:
        device: Where they are added up and decomposed; None for where the model is.
        folder: Where the large ones are files mapped into memory, on a fast disk; None for memory itself.
    """

    device: torch.device | None = None
    folder: Path | None = None

    @classmethod
    def of(cls, device: str | torch.device | None, offload: str | Path | None) -> "Storage":
        """As arguments name it, once it is known to be there; with a folder the device is the CPU.

        Raises:
            EngineError: a device that this machine does not have.
            FileError: a folder that cannot be written to.
            ArgumentError: a folder, and another device than the CPU.
        """
        if device is not None:
            try:
                device = torch.empty(0, device=device).device
            except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for a device
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise EngineError(
                    f"device={str(device)!r} cannot be used: {reason}; give 'cpu' or leave it out"
                ) from error
            if device.type == "meta":
                raise EngineError("device='meta' holds no values; give 'cpu' or leave it out")
        if offload is None:
            return cls(device)
        if device is not None and device.type != "cpu":
            raise ArgumentError(
                f"offload= keeps statistics in files, not on device={str(device)!r}; give one of the two"
            )
        return cls(torch.device("cpu"), require_writable_folder(Path(offload)))

    def device_for(self, model: nn.Module) -> torch.device:
        """Where the statistics of a model are."""
        return self.device or device_of(model)

    def move(self, tensor: Tensor) -> Tensor:
        """The tensor on the device."""
        return tensor if self.device is None else tensor.to(self.device)

    def require(self, size: int, *, device: torch.device, what: str) -> None:
        """Raise `ResourceError` if a large tensor of so many bytes does not fit; `what` is its name for the message."""
        free = free_bytes(device) if size >= MAPPED_BYTES else size
        if size > free:
            raise ResourceError(
                f"{what} take {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on {device}; leave its layer out "
                "(layers=, exclude=), give fewer samples than it has inputs, or a machine with more memory"
            )

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, or if it is large and there is a folder, a copy in a file there.

        The file has no name any more once it is mapped, so that nothing is left of it, however this process ends.

        Raises:
            FileError: the disk is full.
        """
        if self.folder is None or tensor.nbytes < MAPPED_BYTES:
            return tensor
        try:
            opened, path = tempfile.mkstemp(prefix="spectrim-", suffix=".statistics", dir=self.folder)
            try:
                # the space is taken now: a write to a mapped file on a full disk ends the process
                reserve = getattr(os, "posix_fallocate", None)
                reserve(opened, 0, tensor.nbytes) if reserve else os.truncate(opened, tensor.nbytes)
                mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            finally:
                os.close(opened)
                with suppress(PermissionError):  # where a mapped file keeps its name
                    Path(path).unlink()
        except OSError as error:
            raise FileError(
                f"cannot keep {tensor.nbytes:,} bytes of statistics in {self.folder}: {error.strerror or error}; "
                "choose another folder for offload="
            ) from error
        return mapped.reshape(tensor.shape).copy_(tensor)


IN_PLACE = Storage()
"""In memory, where the model is."""


class _HeapSizes(ctypes.Structure):
    """What `mallinfo2` of the C library of Linux returns, under its names; `fordblks` are the bytes that are free."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def return_freed() -> None:
    """Give freed memory back to the system, if it is much; the C library of Linux keeps what lies between others."""
    with suppress(OSError, TypeError, AttributeError):  # of other systems, and of versions before 2021
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _HeapSizes
        if library.mallinfo2().fordblks >= _MUCH:
            library.malloc_trim(0)


def peak_gb() -> float:
    """The most memory that this process has held, in GB (2^30 bytes).

    On Linux from /proc, since `ru_maxrss` of a child starts at its parent's size.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text(encoding="utf-8").splitlines())
        return next(int(parts[1]) for parts in lines if parts[0] == "VmHWM:") / 2**20
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 2**30
    resource = importlib.import_module("resource")
    return (
        float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)) / 2**30
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still take: of a GPU's memory, or of the machine's within its containers' limits."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return min([int(psutil.virtual_memory().available), *_free_in_containers()])


def _free_in_containers() -> list[int]:
    """What the control groups of this process leave it (versions 2 and 1), their file caches counted as free."""
    free = []
    with suppress(OSError, ValueError):
        for line in _OWN_GROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            names = ("memory.max", "memory.current") if not controllers else _VERSION_1
            top = _CGROUPS / "memory" if controllers else _CGROUPS
            own = top / path.lstrip("/")
            for group in (own, *own.parents):
                if group.is_relative_to(top):
                    free += _free_in(group, *names)
    return free


_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _free_in(group: Path, limit: str, usage: str) -> list[int]:
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # version 1 has the files of groups inside this one under names of their own
        cached = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("active_file", "inactive_file"))
        return [max(0, int((group / limit).read_text()) - int((group / usage).read_text()) + cached)]
    except (OSError, ValueError):  # without a limit ("max"), or not to be read
        return []
