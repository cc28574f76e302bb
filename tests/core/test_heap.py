"""Freed memory is taken again within passes, and given back after them."""

import platform
import sys

import pytest
import torch

from spectrim.core import heap

_HAS_OPTIONS = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


@pytest.mark.parametrize("library", [OSError("no such library"), None])
def test_freed_memory_is_returned_or_nothing_happens(library: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: object) -> object:
        if isinstance(library, OSError):
            raise library
        return library  # without the function, as on other systems

    monkeypatch.setattr(heap.ctypes, "CDLL", load)
    for _ in range(2):
        heap.return_freed()
        with heap.reusing_freed():
            pass
        monkeypatch.undo()


@pytest.mark.skipif(not _HAS_OPTIONS, reason="another C library")
def test_the_pages_of_large_tensors_are_cleared_once_within_and_each_time_outside() -> None:
    import resource

    def faults(times: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            torch.ones(2**24)  # 64 MiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    once = faults(1)
    with heap.reusing_freed():
        assert faults(9) < 4 * once
    heap.return_freed()
    assert faults(9) > 8 * once
