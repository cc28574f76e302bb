"""Seconds and peak memory of compressing a network at 224 x 224 to half of its MACs: calibration to reconstruction.

    python benchmarks/time_224.py                                     # ResNet-18, 256 CIFAR-10 images, enlarged
    python benchmarks/time_224.py --network vgg16 --images 128        # or another one of torchvision

The network is untrained: the time does not depend on the weights' values, and the accuracy is not measured. Seconds are
processor time of all threads; those on the wall are less with several (`OMP_NUM_THREADS=2`).
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

BARS = {("resnet18", 256): (90, 2.5), ("resnet50", 256): (240, 4.0), ("vgg16", 128): (240, 6.0)}
"""By network and number of images the seconds on the wall, with two threads, and the GB that are aimed at."""


def main() -> None:
    """Compress once, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet18", help="name of one of torchvision's")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--cache", type=int, help="MiB of activations that may be kept; by default what spectrim takes")
    options = parser.parse_args()
    small = cifar_inputs(load("cifar10", split="train").images[: options.images])
    images = functional.interpolate(small, size=224, mode="bilinear", align_corners=False)
    torch.manual_seed(0)
    model, console = resolve(f"torchvision:{options.network}").eval(), Console()
    start, begun = time.process_time(), time.perf_counter()

    def progress(what: str, done: int, of: int) -> None:
        console.print(f"{time.process_time() - start:6.1f} s  {done:3}/{of} {what}")

    compressed = st.compress(
        model,
        st.Budget(macs=options.share),
        example_inputs=images[:1],
        data=images.split(options.batch),
        cache=None if options.cache is None else options.cache * 2**20,
        on_progress=progress,
    )
    console.print(f"{compressed.measurement.macs_ratio:.4f} of the MACs, {torch.get_num_threads()} threads")
    seconds, most = BARS.get((options.network, options.images), (None, None))
    wall = time.perf_counter() - begun
    console.print(f"{time.process_time() - start:.0f} s of the processor, all threads together")
    console.print(f"{wall:.0f} s on the wall" + (f" (aim with two threads: {seconds} s)" if seconds else ""))
    console.print(f"peak memory {peak_gb():.2f} GB" + (f" (aim: {most} GB)" if most else ""))


if __name__ == "__main__":
    main()
