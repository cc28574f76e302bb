"""Tests in bfloat16 on processors with it and without it."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from spectrim.core.errors import EngineError
from spectrim.runtimes.conversion import openvino_core


@contextmanager
def refused_without_bfloat16(runtime: str) -> Iterator[None]:
    """The block runs, unless OpenVINO is to compute in a bfloat16 that the processor lacks: that must be its error."""
    if runtime == "openvino-bf16":
        pytest.importorskip("openvino")
        if "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            with pytest.raises(EngineError, match=r"^OpenVINO computes in f32 on this processor, not in bf16$"):
                yield
            return
    yield
