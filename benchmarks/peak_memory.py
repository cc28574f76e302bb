"""The largest amount of memory that this process has held."""

import resource
import sys
from pathlib import Path


def peak_gb() -> float:
    """In GB (2^30 bytes). On Linux from /proc, since `ru_maxrss` of a child starts at its parent's size."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text().splitlines())
        return next(int(parts[1]) for parts in lines if parts[0] == "VmHWM:") / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
