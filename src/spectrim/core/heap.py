"""The heap of the C library of Linux, from which torch takes tensors; elsewhere nothing here does anything."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_MUCH = 2**28
"""Bytes of freed memory that are worth the time: 256 MiB."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_REUSING = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**28)
_USUAL = (_MMAP_MAX, 2**16), (_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**26)
"""Options by their numbers; the usual ones are those that the library comes to by itself with tensors of 32 MiB."""


class _HeapSizes(ctypes.Structure):
    """What `mallinfo2` returns, under its names; `fordblks` are the bytes that are free."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def _called(name: str, *arguments: int) -> Any:
    """What a function of the library gives; None on other systems, and in versions before 2021."""
    with suppress(OSError, TypeError, AttributeError):
        function = getattr(ctypes.CDLL(None), name)
        function.restype = _HeapSizes if name == "mallinfo2" else ctypes.c_int
        return function(*arguments)


def return_freed() -> None:
    """Give freed memory back to the system, if it is much; the library keeps what lies between others."""
    sizes = _called("mallinfo2")
    if sizes and sizes.fordblks >= _MUCH:
        _called("malloc_trim", 0)


@contextmanager
def reusing_freed() -> Iterator[None]:
    """Within this, large tensors are taken from freed memory too.

    Otherwise the system clears the pages of each anew, a quarter of the time of a pass through a network for images.
    """
    for option, value in _REUSING:
        _called("mallopt", option, value)
    try:
        yield
    finally:
        for option, value in _USUAL:
            _called("mallopt", option, value)
