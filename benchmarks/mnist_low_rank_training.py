"""The bars of the three studies that put the SVD into training, held against runs of them.

    python benchmarks/mnist_low_rank_training.py --out spectrim-mnist-low-rank    # runs (or resumes) seeds 0, 1, 2
    python benchmarks/mnist_low_rank_training.py --figure docs/training.png       # and draws both curves; needs kaleido

The network is 784-1024x5-10, at rank 20 in every layer but the last. Accuracy is the mean over the seeds, on the whole
test set, of the factored networks. The studies share the dense networks of each seed.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import spectrim as st
from spectrim.recipes import Progress, Study, find_study, run_study

STUDIES = tuple(map(find_study, ("mnist-factors", "mnist-dynamic", "mnist-projected")))
BARS: dict[str, float | str | None] = {
    "rank 20, plain, zero-shot": None,
    "rank 20, plain, fine-tuned": 98.1,
    "rank 20, activation, zero-shot": None,
    "rank 20, activation, fine-tuned": 98.1,
    "rank 20, as published": 97.6,
    "rank 20, stabilised": 98.0,
    "ranks chosen in training": "rank 20, stabilised",  # at least as good, for no more parameters
    "rank 20, not shrunk": None,
    "rank 20, projected at every epoch": 97.9,
}


def report(event: Progress) -> None:
    """A line an epoch at most."""
    if event.done == 0 and not event.note:
        print(f"{event.parts_done + 1}/{event.parts} {event.part}", flush=True)


def line(name: str, variant: st.Variant, bar: float | None) -> tuple[str, ...]:
    """A row of the table: network, accuracy, spread, each seed, parameters, agreement, bar."""
    accuracy, spread = 100 * (variant.accuracy or 0), variant.spread
    agreements = [run.agreement for run in variant.runs if run.agreement]
    return (
        name,
        f"{accuracy:.2f}" + (f" ± {100 * spread:.2f}" if spread is not None else ""),
        " ".join(f"{100 * run.test.value:.2f}" for run in variant.runs),
        f"{variant.measurement.params:,}",
        f"{max(each.largest_difference for each in agreements):.1g}" if agreements else "",
        f"{min(each.equal for each in agreements):,} of {agreements[0].of:,}" if agreements else "",
        "" if bar is None else f"{bar:.4g}",
        "" if bar is None else "yes" if accuracy >= bar else "NO",
    )


def draw(results: st.Results, path: Path) -> None:
    """Training loss and held-out accuracy of the compressed networks by epoch, a line a seed."""
    bare = results.dense.model_copy(
        update={"runs": tuple(run.model_copy(update={"curve": ()}) for run in results.dense.runs)}
    )
    figure = st.plot_curves(results.model_copy(update={"dense": bare}))
    figure.update_layout(width=1000, height=420)
    figure.write_image(path, scale=2)


def main() -> None:
    """Run the studies and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("spectrim-mnist-low-rank"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", choices=[study.name for study in STUDIES], help="run and show this one alone")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the curves of mnist-dynamic")
    args = parser.parse_args()
    seeds = tuple(int(seed) for seed in args.seeds.split(","))
    table = Table("network", "test accuracy, %", "each seed", "parameters", "logits", "equal", "bar", "held")
    held = True
    dense = None
    for study in (study for study in STUDIES if args.only in (None, study.name)):
        results = run(study, seeds, args.out)
        if dense is None:
            dense = results.dense
            table.add_row(*line("dense", dense, None))
        for variant in results.variants:
            bar = BARS[variant.name]
            bar = 100 * (results.variant(bar).accuracy or 0) if isinstance(bar, str) else bar
            row = line(variant.name, variant, bar)
            held &= row[-1] != "NO"
            table.add_row(*row)
        if args.figure and study.name == "mnist-dynamic":
            draw(results, args.figure)
    Console(width=140).print(table)
    sys.exit(0 if held else 1)


def run(study: Study, seeds: tuple[int, ...], out: Path) -> st.Results:
    """One study in a folder of its own, its parts beside it."""
    asked = study.model_copy(update={"seeds": seeds})
    return run_study(asked, out / study.name, parts=out / "parts", on_progress=report)


if __name__ == "__main__":
    main()
