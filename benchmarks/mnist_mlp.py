"""A run of the MNIST study, compared with its bars.

    python benchmarks/mnist_mlp.py --out spectrim-mnist-mlp          # runs (or resumes) seeds 0, 1, 2, then compares

Zero-shot is the activation metric without any training after compression; fine-tuned adds at most 5 epochs of the
factors with the dense network as the teacher. Accuracy is the mean over the seeds, on the whole test set.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import spectrim as st
from spectrim.recipes import find_study, run_study

PUBLISHED = {None: 97.0, 200: 96.8, 100: 95.5, 50: 94.1, 20: 91.1, 10: 87.5}
ZERO_SHOT = {None: 98.3, 200: 98.2, 100: 98.2, 50: 98.1, 20: 96.3, 10: 86.0}
FINE_TUNED = {50: 98.3, 20: 98.1, 10: 96.8}


def percent(variant: st.Variant) -> float:
    """Mean accuracy in per cent."""
    return 100 * (variant.accuracy or 0.0)


def rows(results: st.Results) -> list[tuple[str, str, float, float, float | None]]:
    """Network, what is measured, figure, bar, published figure."""
    figures = [("dense", "accuracy", percent(results.dense), ZERO_SHOT[None], PUBLISHED[None])]
    for stage, bars in (("zero-shot", ZERO_SHOT), ("fine-tuned", FINE_TUNED)):
        for rank, bar in bars.items():
            if rank is not None:
                variant = results.variant(f"rank {rank}, activation, {stage}")
                figures.append((f"rank {rank}, {stage}", "accuracy", percent(variant), bar, PUBLISHED[rank]))
    small = results.variant("rank 20, activation, fine-tuned").measurement
    dense = results.dense.measurement
    figures.append(("rank 20", "times fewer parameters", dense.params / small.params, 20.0, None))
    figures.append(("rank 20", "times fewer bytes on disk", dense.bytes / small.bytes, 20.0, None))
    figures.append(
        ("rank 20", "times faster, one image, one thread", small.speedup.value if small.speedup else 0, 5.0, None)
    )
    return figures


def main() -> None:
    """Run the study and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("spectrim-mnist-mlp"))
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    study = find_study("mnist-mlp").model_copy(update={"seeds": tuple(int(seed) for seed in options.seeds.split(","))})
    results = run_study(study, options.out)
    table = Table("network", "figure", "measured", "bar", "published", "met")
    all_met = True
    for name, what, value, bar, published in rows(results):
        all_met &= value >= bar
        table.add_row(
            name,
            what,
            f"{value:.2f}",
            f"{bar:.1f}",
            f"{published:.1f}" if published else "",
            "yes" if value >= bar else "NO",
        )
    Console().print(st.table(results), table)
    sys.exit(0 if all_met else 1)


if __name__ == "__main__":
    main()
