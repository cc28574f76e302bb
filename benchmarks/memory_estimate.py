"""What `st.estimate_memory` says, against what `st.compress` takes.

    python benchmarks/memory_estimate.py                 # all networks
    python benchmarks/memory_estimate.py resnet18 wide   # some of them

Each case runs in a process of its own. What is measured is the peak above what the process holds with the model, the
data and the libraries loaded, for which a tiny network is compressed first.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import spectrim as st
from spectrim.core.memory import peak_gb
from spectrim.models import resnet20


def wide() -> tuple[nn.Module, list[Tensor]]:
    """One layer of 4096 x 4096."""
    return nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)), [torch.randn(64, 4096)] * 4


def transformer() -> tuple[nn.Module, list[Tensor]]:
    """Four encoder layers of torch."""
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), [torch.randn(16, 128, 512) for _ in range(4)]


def small_images() -> tuple[nn.Module, list[Tensor]]:
    """ResNet-20."""
    return resnet20(), [torch.randn(256, 3, 32, 32) for _ in range(2)]


def large_images() -> tuple[nn.Module, list[Tensor]]:
    """ResNet-18 of torchvision."""
    from torchvision.models import resnet18

    return resnet18(num_classes=10), [torch.randn(16, 3, 224, 224) for _ in range(4)]


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, list[Tensor]]], st.Rank | st.Energy | st.Budget, bool]] = {
    "resnet20": (small_images, st.Budget(macs=0.5), True),
    "resnet20-rank": (small_images, st.Rank(8), True),
    "wide-plain": (wide, st.Rank(64), False),
    "wide-energy": (wide, st.Energy(0.9), True),
    "wide-budget": (wide, st.Budget(params=0.5), True),
    "transformer-rank": (transformer, st.Rank(64), True),
    "transformer": (transformer, st.Budget(params=0.5), True),
    "resnet18-rank": (large_images, st.Rank(16), True),
    "resnet18": (large_images, st.Budget(macs=0.5), True),
}


def run(name: str, threads: int) -> None:
    """Estimate, compress, and print both."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    build, rule, calibrated = CASES[name]
    tiny = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    st.compress(tiny, st.Budget(params=0.8), example_inputs=torch.randn(1, 8), data=[torch.randn(32, 8)])
    network, batches = build()
    network.eval()
    options: dict[str, Any] = {"example_inputs": batches[0][:1], "data": batches if calibrated else None}
    options["keep_last"] = True
    with torch.no_grad():
        network(batches[0][:1])
    start = time.perf_counter()
    estimate = st.estimate_memory(network, rule, **options)
    estimating = time.perf_counter() - start
    before, start = peak_gb(), time.perf_counter()
    st.compress(network, rule, **options)
    measured, seconds = peak_gb() - before, time.perf_counter() - start
    parts = ", ".join(f"{part} {getattr(estimate, part) / 2**30:.2f}" for part in st.MemoryEstimate.PARTS)
    print(
        f"{name:17} measured {measured:.2f} GB, estimate {estimate.peak / 2**30:.2f} GB, "
        f"ratio {estimate.peak / 2**30 / max(measured, 1e-3):.2f}; {estimating:.1f} s of {seconds:.0f} s; {parts}",
        flush=True,
    )


def main() -> None:
    """The cases, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks; all by default")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for name in options.names or CASES:
        process = multiprocessing.get_context("spawn").Process(target=run, args=(name, options.threads))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
