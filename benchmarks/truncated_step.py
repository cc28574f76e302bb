"""The price of truncation in every forward pass, against a dense step and against a full SVD in every step.

    python benchmarks/truncated_step.py [--repeats 20] [--exact-repeats 2] [--threads 1] [--fused]

One training step of a 784-5x1024-10 network, batch 256, Adam, rank 20 in all layers but the last. The steps are timed
in turn, and the ratios are medians over the turns. What a truncation costs is a step's time less the dense step's.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

import spectrim as st
from spectrim.models import mlp

BATCH, RANK = 256, 20
STEP_BAR, TRUNCATION_BAR = 1.6, 40.0


def trainer(prepare: Callable[[nn.Module], object], *, fused: bool) -> Callable[[], float]:
    """A function that takes one training step of a network of its own, and gives the seconds."""
    torch.manual_seed(0)
    model = mlp()
    prepare(model)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    data = torch.Generator().manual_seed(1)

    def step() -> float:
        x: Tensor = torch.rand(BATCH, 784, generator=data)
        labels = torch.randint(10, (BATCH,), generator=data)
        start = time.perf_counter()
        optimiser.zero_grad()
        functional.cross_entropy(model(x), labels).backward()
        optimiser.step()
        return time.perf_counter() - start

    return step


def main() -> None:
    """Time, print, and say whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--exact-repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fused", action="store_true", help="PyTorch's fused Adam, with the faster dense step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rule = st.Rank(RANK)
    dense = trainer(lambda model: None, fused=args.fused)
    truncated = trainer(lambda model: st.training.truncated_(model, rule, keep_last=True), fused=args.fused)
    exact = trainer(lambda model: st.training.truncated_(model, rule, keep_last=True, exact=True), fused=args.fused)
    for _ in range(3):
        dense(), truncated()
    exact()
    pairs = [(dense(), truncated()) for _ in range(args.repeats)]
    triples = [(dense(), truncated(), exact()) for _ in range(args.exact_repeats)]
    step = statistics.median(b / a for a, b in pairs)
    extra = statistics.median(b - a for a, b in pairs)
    full = statistics.median(c - a for a, _, c in triples)
    print(f"{torch.get_num_threads()} threads, {args.repeats} and {args.exact_repeats} turns")
    print(f"dense step            {1e3 * statistics.median(a for a, _ in pairs):8.1f} ms")
    print(f"truncated step        {1e3 * statistics.median(b for _, b in pairs):8.1f} ms, {step:.2f} of dense")
    print(f"with a full SVD       {1e3 * statistics.median(c for *_, c in triples):8.1f} ms")
    print(f"truncation by itself  {1e3 * extra:8.1f} ms, {full / extra:.0f} times less than with a full SVD")
    held = step <= STEP_BAR and full / extra >= TRUNCATION_BAR
    print(
        f"bars: at most {STEP_BAR} of dense, at least {TRUNCATION_BAR:.0f} times less: {'held' if held else 'missed'}"
    )


if __name__ == "__main__":
    main()
