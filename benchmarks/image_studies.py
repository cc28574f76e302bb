"""Runs of the studies of convolutional networks, compared with their bars.

    python benchmarks/image_studies.py miniresnet-mnist --out runs       # seeds 0, 1, 2; runs or resumes runs/NAME
    python benchmarks/image_studies.py miniresnet-fashion --out runs --seeds 0
    python benchmarks/image_studies.py resnet18-cifar10 --out runs

Accuracy is the mean over the seeds, on the whole test set. Times mean something when nothing else is running; a
finished study is timed anew each time.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import spectrim as st
from spectrim.recipes import Progress, find_study, run_study


@dataclass(frozen=True)
class Bar:
    """One figure that a study has to reach, or, with `at_most`, that it must not exceed."""

    what: str
    measured: float
    bar: float
    at_most: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the study meets it."""
        return self.measured <= self.bar if self.at_most else self.measured >= self.bar


def percent(variant: st.Variant) -> float:
    """Mean accuracy in per cent."""
    return 100 * (variant.accuracy or 0.0)


def tuned(results: st.Results, beginning: str) -> list[st.Variant]:
    """The fine-tuned networks whose names begin so."""
    return [each for each in results.variants if each.stage == "fine-tuned" and each.name.startswith(beginning)]


def fastest(variant: st.Variant, *, surely: bool = False) -> float:
    """The best speed-up over dense in the same runtime; `surely`, the lower end of its interval."""
    speedups = [measured.speedup for measured in (variant.measurement, *variant.in_runtimes) if measured.speedup]
    return max(speedup.low if surely else speedup.value for speedup in speedups)


def mnist(results: st.Results) -> Sequence[Bar]:
    """75 % energy, and one budget."""
    dense, (energy,), small = percent(results.dense), tuned(results, "75 %"), tuned(results, "budget")[-1]
    return (
        Bar("dense accuracy", dense, 99.3),
        Bar("75 % energy, fine-tuned: accuracy", percent(energy), 99.2),
        Bar("the same, points below dense", dense - percent(energy), 0.1, at_most=True),
        Bar(f"{small.name}: accuracy", percent(small), 99.2),
        Bar("the same, parameters kept (%)", 100 * (small.measurement.params_ratio or 1), 7.0, at_most=True),
        Bar("the same, best speed-up, lower end", fastest(small, surely=True), 1.0),
    )


def fashion(results: st.Results) -> Sequence[Bar]:
    """The first budget of at most a fifth of the parameters."""
    dense = percent(results.dense)
    small = next(each for each in tuned(results, "budget") if (each.measurement.params_ratio or 1) <= 0.2)
    return (
        Bar(f"{small.name}: points below dense", dense - percent(small), 0.3, at_most=True),
        Bar("the same, parameters kept (%)", 100 * (small.measurement.params_ratio or 1), 20.0, at_most=True),
        Bar("the same, best speed-up, lower end", fastest(small, surely=True), 1.0),
    )


def resnet18(results: st.Results) -> Sequence[Bar]:
    """The classifier at half of its ranks, and the whole network at half of its MACs."""
    dense, (half,) = percent(results.dense), tuned(results, "classifier at rank 5")
    (control,) = tuned(results, "classifier dense")
    whole = results.variant(results.chosen or "")  # zero-shot or fine-tuned, by held-out images
    return (
        Bar(f"{half.name}: points below dense", dense - percent(half), 0.2, at_most=True),
        Bar("the same, points below dense, its head tuned too", percent(control) - percent(half), 0.2, at_most=True),
        Bar(f"{whole.name}: points below dense", dense - percent(whole), 0.3, at_most=True),
        Bar("the same, MACs kept (%)", 100 * (whole.measurement.macs_ratio or 1), 50.0, at_most=True),
        Bar("the same, best speed-up", fastest(whole), 1.6),
    )


BARS: dict[str, Callable[[st.Results], Sequence[Bar]]] = {
    "miniresnet-mnist": mnist,
    "miniresnet-fashion": fashion,
    "resnet18-cifar10": resnet18,
}


def figures(results: st.Results) -> Table:
    """Every network in every runtime."""
    table = Table("network", "accuracy", "params kept", "MACs kept", "speed-up, by runtime")
    for variant in (results.dense, *results.variants):
        spread = "" if variant.spread is None else f" ({100 * variant.spread:.2f})"
        measured = variant.measurement
        speedups = ", ".join(
            f"{each.runtime} {each.speedup.value:.2f} [{each.speedup.low:.2f}, {each.speedup.high:.2f}]"
            for each in (measured, *variant.in_runtimes)
            if each.speedup
        )
        ratios = [f"{100 * (ratio or 1):.1f} %" for ratio in (measured.params_ratio, measured.macs_ratio)]
        table.add_row(variant.name, f"{percent(variant):.2f}{spread}", *ratios, speedups)
    return table


def main() -> None:
    """Run the study and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=BARS)
    parser.add_argument("--out", type=Path, required=True, help="folder for the folders of the runs")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), help="by default the recipe's")
    options = parser.parse_args()
    console, study = Console(width=160, highlight=False), find_study(options.study)
    if options.seeds:
        study = study.model_copy(update={"seeds": options.seeds})
    printed: list[str] = []

    def on_progress(event: Progress) -> None:
        if event.part not in printed:
            printed.append(event.part)
            console.print(event.part)

    results = run_study(study, options.out / study.name, on_progress=on_progress)
    bars = BARS[study.name](results)
    table = Table("", "measured", "bar", "")
    for bar in bars:
        sign, verdict = "<=" if bar.at_most else ">=", "PASS" if bar.is_met else "MISS"
        table.add_row(bar.what, f"{bar.measured:.2f}", f"{sign} {bar.bar:g}", verdict)
    console.print(figures(results))
    console.print(table)
    sys.exit(0 if all(bar.is_met for bar in bars) else 1)


if __name__ == "__main__":
    main()
