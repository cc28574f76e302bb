"""Seconds and peak memory of compressing ResNet-18 at 224 x 224 to half of its MACs: calibration to reconstruction.

    python benchmarks/resnet18_224.py                 # 256 CIFAR-10 training images, enlarged; needs torchvision

The network is untrained: the time does not depend on the weights' values, and the accuracy is not measured.
"""

import argparse
import time

import torch
from rich.console import Console
from torch.nn import functional

import spectrim as st
from spectrim.core.memory import peak_gb
from spectrim.data import load
from spectrim.models import cifar_inputs, resolve


def main() -> None:
    """Compress once, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.5)
    options = parser.parse_args()
    small = cifar_inputs(load("cifar10", split="train").images[: options.images])
    images = functional.interpolate(small, size=224, mode="bilinear", align_corners=False)
    torch.manual_seed(0)
    model, console = resolve("torchvision:resnet18").eval(), Console()
    start = time.perf_counter()

    def progress(what: str, done: int, of: int) -> None:
        console.print(f"{time.perf_counter() - start:6.1f} s  {done:3}/{of} {what}")

    compressed = st.compress(
        model,
        st.Budget(macs=options.share),
        example_inputs=images[:1],
        data=images.split(options.batch),
        on_progress=progress,
    )
    console.print(f"{compressed.measurement.macs_ratio:.4f} of the MACs, {torch.get_num_threads()} threads")
    console.print(f"{time.perf_counter() - start:.0f} s (bar 90 s)")
    console.print(f"peak memory {peak_gb():.2f} GB")


if __name__ == "__main__":
    main()
