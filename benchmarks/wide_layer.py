"""Time and memory of `st.compress` on a wide layer, such as the first of VGG's classifier, with and without data.

    python benchmarks/wide_layer.py                      # 25088 -> 4096 at rank 64, 256 calibration vectors
    python benchmarks/wide_layer.py --inputs 4096

Each case runs in a process of its own, in which the peak is measured. The weight is random, which is the hardest: its
singular values hardly fall off. With `--least`, which takes minutes, the error is compared with the least there is.
"""

import argparse
import multiprocessing
import time

import torch
from torch import nn

import spectrim as st
from spectrim.core.memory import peak_gb


def run(options: argparse.Namespace, *, calibrated: bool) -> None:
    """Compress, and print what it took."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(options.inputs, options.outputs), nn.ReLU(), nn.Linear(options.outputs, 10)).eval()
    data = torch.randn(options.samples, options.inputs).split(64) if calibrated else None
    example, before = torch.randn(1, options.inputs), peak_gb()
    start = time.perf_counter(), time.process_time()
    small = st.compress(model, st.Rank(options.rank), example_inputs=example, data=data, keep_last=True)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    print(
        f"{options.inputs} x {options.outputs}, rank {options.rank}, {'data' if calibrated else 'plain'}: "
        f"{wall:.1f} s ({cpu:.1f} s of {options.threads} cores), peak {peak_gb():.2f} GB ({before:.2f} before), "
        f"error {small.plan.layers[0].predicted_error:.6f}"
    )
    if options.least and not calibrated:
        values = torch.linalg.svdvals(model[0].weight.detach().double())
        print(f"least error {float((values[options.rank :].square().sum() / values.square().sum()).sqrt()):.6f}")


def main() -> None:
    """Both cases, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=25088)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--least", action="store_true", help="also the least error, by a full decomposition")
    options = parser.parse_args()
    for calibrated in (False, True):
        process = multiprocessing.get_context("spawn").Process(
            target=run, args=(options,), kwargs={"calibrated": calibrated}
        )
        process.start()
        process.join()


if __name__ == "__main__":
    main()
