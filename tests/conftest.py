"""Put the shared cases on the path, and keep every test away from the user's own files."""

import functools
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

# A background job of a shell without job control ignores SIGINT, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The networks of the tests are small: threads would only get in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Untrained networks are the same in every run: what a test says of one must not hang on luck."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_table_of_onnx_operators() -> None:
    """torch builds the same table for every export, which takes longer than the export of a small network."""
    registry = getattr(sys.modules.get("torch.onnx._internal.exporter._registration"), "ONNXRegistry", None)
    if registry is not None and not hasattr(registry.from_torchlib, "cache_info"):
        registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        # by the marker, not by keywords: those hold names too, of tests, parameters and folders
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
