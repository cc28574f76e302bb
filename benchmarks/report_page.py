"""Size and opening time of the report of a large network, in headless Chromium.

    python benchmarks/report_page.py [--layers 60] [--openings 7] [--browser /usr/bin/chromium] [--keep report.html]

The report is that of a network of 60 weights with the sizes of a large vision transformer's: every singular value in
two metrics, a decision for every layer, eight networks with training curves, ten classes and 48 images. An opening
lasts from the start of the navigation until every figure that stands on the page has been drawn; each has a fresh
browser context. Needs the packages of the `test` extra and an installed Chromium or Chrome.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np

import spectrim as st
from spectrim.core.plans import Cost, LayerPlan, Metric
from spectrim.reporting.pixels import png_text
from spectrim.reporting.results import Changes, ClassChange, Flipped

SHAPES = ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096))
METRICS: tuple[Metric, ...] = ("plain", "activation")
SIZE_BAR, TIME_BAR = 8e6, 2.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DRAWN = """() => {
  const plots = [...document.querySelectorAll("[data-gallery] .plot")];
  return plots.length && plots.every((one) => one.querySelector(".plot .trace")) && performance.now();
}"""


def large(layers: int) -> st.Results:
    """Results of a network of so many layers: invented figures in the amounts of real ones."""
    draw = np.random.default_rng(0)
    names = [f"encoder.blocks.{at // 4}.{_PARTS[at % 4]}" for at in range(layers)]
    shapes = [SHAPES[at % len(SHAPES)] for at in range(layers)]
    spectra = [
        st.LayerSpectrum(layer=name, kind="Linear", shape=shape, metric=metric, values=_spectrum(draw, min(shape)))
        for name, shape in zip(names, shapes, strict=True)
        for metric in METRICS
    ]
    variants = [_variant(share, stage, names, shapes) for share in (0.75, 0.5, 0.3, 0.2) for stage in _STAGES]
    dense = _measured(1.0, sum(rows * columns for rows, columns in shapes))
    return st.Results(
        title=f"A report of {layers} layers",
        dense=st.Variant(name="dense", stage="dense", measurement=dense, runs=(_run(8400, epochs=20),)),
        variants=tuple(variants),
        chosen=variants[3].name,
        spectra=tuple(spectra),
        changes=_changes(draw, variants[3].name),
    )


_PARTS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
_STAGES = ("zero-shot", "fine-tuned")


def _spectrum(draw: np.random.Generator, length: int) -> tuple[float, ...]:
    decay = np.arange(1, length + 1) ** -draw.uniform(0.3, 0.9)
    return tuple((20 * decay * np.sort(draw.uniform(0.9, 1.1, length))[::-1]).tolist())


def _variant(share: float, stage: str, names: list[str], shapes: list[tuple[int, int]]) -> st.Variant:
    layers = [_layer(name, shape, share) for name, shape in zip(names, shapes, strict=True)]
    rule = st.Budget(macs=share)
    plan = st.Plan(rule=rule, metric="activation", layers=tuple(layers))
    tuned = stage == "fine-tuned"
    return st.Variant(
        name=f"{100 * share:g} % of the MACs, {stage}",
        stage="fine-tuned" if tuned else "zero-shot",
        measurement=_measured(share, plan.dense_cost.params),
        rule=rule,
        metric="activation",
        plan=plan,
        runs=(_run(int(8400 - 900 * (1 - share) * (0.3 if tuned else 1)), epochs=10 if tuned else 0),),
    )


def _layer(name: str, shape: tuple[int, int], share: float) -> LayerPlan:
    rows, columns = shape
    rank = int(share * rows * columns / (rows + columns))
    dense, factored = rows * columns, rank * (rows + columns)
    return LayerPlan(
        name=name,
        kind="Linear",
        shape=shape,
        form="linear",
        metric="activation",
        rank=rank,
        full_rank=min(shape),
        break_even=(rows * columns - 1) // (rows + columns),
        predicted_error=0.2 * (1 - share),
        dense=Cost(params=dense, macs=197 * dense),
        kept=Cost(params=factored, macs=197 * factored),
        reason=f"rank {rank} gives the least error for its share of the budget",
    )


def _measured(share: float, params: int) -> st.Measurement:
    params = int(share * params)
    ratios = {} if share == 1 else {"params_ratio": share, "bytes_ratio": share, "macs_ratio": share}
    speedup = None if share == 1 else st.Interval(value=0.9 / share, low=0.88 / share, high=0.92 / share)
    return st.Measurement(
        params=params,
        bytes=4 * params,
        macs=197 * params,
        latency_ms=300 * share,
        runtime="torch",
        threads=1,
        speedup=speedup,
        **ratios,
    )


def _run(correct: int, *, epochs: int) -> st.Run:
    curve = [st.Epoch(epoch=at, loss=2 / at, held_out=0.8 - 0.4 / at, seconds=60.0) for at in range(1, epochs + 1)]
    return st.Run(seed=0, test=st.Accuracy(correct=correct, total=10_000), curve=tuple(curve))


def _changes(draw: np.random.Generator, name: str) -> Changes:
    classes = [
        ClassChange(name=f"class {at}", total=1000, before=840, broken=int(draw.integers(5, 40)), mended=20, confused=9)
        for at in range(10)
    ]
    predictions = [(1, 1, 2), (1, 2, 1), (1, 2, 3)]
    flipped = [
        Flipped(
            index=at,
            truth=truth,
            before=before,
            after=after,
            sure_before=0.8,
            sure_after=0.6,
            image=png_text(draw.integers(0, 256, (3, 32, 32), dtype=np.uint8)),
        )
        for at, (truth, before, after) in enumerate(16 * predictions)
    ]
    return Changes(variant=name, seeds=(0,), classes=tuple(classes), flipped=tuple(flipped))


def openings(page: Path, *, browser: str, number: int) -> list[float]:
    """Seconds from the start of the navigation until every figure is drawn."""
    from playwright.sync_api import sync_playwright  # only what opens a page needs a browser

    seconds = []
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for _ in range(number):
            context = chromium.new_context(viewport={"width": 1440, "height": 900})
            tab = context.new_page()
            tab.goto(page.as_uri())
            seconds.append(tab.wait_for_function(DRAWN).json_value() / 1000)
            context.close()
        chromium.close()
    return seconds


def main() -> None:
    """Write the report, open it, and print both figures beside their bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--openings", type=int, default=7)
    parser.add_argument("--browser", default=next(filter(None, map(shutil.which, BROWSERS)), None))
    parser.add_argument("--keep", type=Path, help="where to leave the report")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = st.report(large(options.layers), options.keep or Path(folder) / "report.html").resolve()
        size = page.stat().st_size
        print(f"{options.layers} layers: {size / 1e6:.2f} MB (bar: under {SIZE_BAR / 1e6:g})")
        if options.browser is None:
            raise SystemExit("no Chromium or Chrome here to open it with; name one with --browser")
        times = openings(page, browser=options.browser, number=options.openings)
    print(
        f"opened with every figure drawn: median {statistics.median(times):.2f} s of {len(times)} "
        f"({min(times):.2f} to {max(times):.2f}; bar: under {TIME_BAR:g})"
    )


if __name__ == "__main__":
    main()
