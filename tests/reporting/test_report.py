"""Tables, figures and the page, from the values of a small study that was really measured."""

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import nn

import spectrim as st
from spectrim import errors
from spectrim.core.plans import Metric
from spectrim.reporting import (
    Changes,
    ClassChange,
    Flipped,
    PublishedPoint,
    changes_table,
    figures,
    plot_classes,
    published_table,
    runtimes_table,
    save_figure,
    words,
)
from spectrim.reporting.accuracy import available
from spectrim.reporting.pixels import png, png_text
from spectrim.reporting.results import Results, Tally, Variant

EARLIER = Path(__file__).parents[1] / "files" / "saved" / "run" / "results.json"
SECTIONS = ("accuracy", "study", "runtimes", "changes", "spectra", "layers", "curves", "words", "provenance")
HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=alert(1)>[bold]"


def flipped(index: int, classes: tuple[int, int, int], *, side: int = 8) -> Flipped:
    """`classes` are the true class, the dense network's answer, and the compressed network's."""
    truth, before, after = classes
    image = png_text(np.full((1, side, side), index % 256, dtype=np.uint8))
    return Flipped(index=index, truth=truth, before=before, after=after, sure_before=0.975, sure_after=0.5, image=image)


CHANGES = Changes(
    variant="rank 8, plain, fine-tuned",
    seeds=(0, 1),
    classes=(
        ClassChange(name="cat", total=400, before=380, broken=40, mended=2, confused=3),
        ClassChange(name="dog", total=400, before=360, broken=1, mended=20, confused=5),
        ClassChange(name="owl", total=200, before=180, broken=4, mended=3, confused=0),
        ClassChange(name="none", total=0, before=0, broken=0, mended=0, confused=0),
    ),
    flipped=(flipped(3, (0, 0, 1)), flipped(11, (0, 0, 2)), flipped(5, (1, 0, 1)), flipped(7, (1, 2, 0))),
)


@pytest.fixture(scope="module")
def analysis() -> st.Analysis:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
    calibration = st.calibrate(model, [torch.randn(64, 16)])
    return st.analyze(model, torch.randn(1, 16), calibration=calibration, keep_last=True)


@pytest.fixture(scope="module")
def results(analysis: st.Analysis) -> Results:
    """Two seeds, two ranks, two metrics, both stages; invented counts of correct answers, everything else measured."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
    x = torch.randn(1, 16)
    variants = []
    for metric in ("plain", "activation"):
        for rank in (8, 2):
            compressed = st.compress(
                model,
                st.plan(analysis, st.Rank(rank), metric=metric),
                example_inputs=x,
                analysis=analysis,
            )
            measured = st.measure(compressed.model, x, reference=model, rounds=5)
            for stage, gain in (("zero-shot", 0), ("fine-tuned", 100)):
                curve = [st.Epoch(epoch=e - 1, loss=1 / e, held_out=0.7 + e / 100, seconds=0.1) for e in (1, 2, 3)]
                runs = [run(seed, 700 + 20 * rank + 10 * seed + gain, curve if gain else ()) for seed in (0, 1)]
                variants.append(
                    Variant(
                        name=f"rank {rank}, {metric}, {stage}",
                        stage=stage,
                        rule=st.Rank(rank),
                        metric=metric,
                        plan=compressed.plan,
                        measurement=measured,
                        runs=tuple(runs),
                    )
                )
    return Results(
        title="A small study",
        summary="Three layers.",
        dense=Variant(
            name="dense",
            stage="dense",
            measurement=st.measure(model, x, rounds=5),
            runs=(run(0, 980), run(1, 990)),
        ),
        variants=tuple(variants),
        chosen="rank 8, plain, fine-tuned",
        chosen_because="It is the best.",
        spectra=tuple(
            st.LayerSpectrum(
                layer=layer.name, kind=layer.kind, shape=layer.shape, metric=metric, values=tuple(spectrum.values)
            )
            for layer in analysis
            for metric, spectrum in layer.spectra.items()
        ),
        published=(st.Published(source="a paper", accuracy=((None, 0.97), (8, 0.9), (2, 0.8))),),
        changes=CHANGES,
        command="spectrim demo",
        provenance={"seeds": "0, 1"},
    )


def run(seed: int, correct: int, curve: tuple[st.Epoch, ...] | list[st.Epoch] = ()) -> st.Run:
    return st.Run(seed=seed, test=st.Accuracy(correct=correct, total=1000), curve=tuple(curve))


def bare(results: Results) -> Results:
    """The same study with every optional part absent."""
    costs = {"latency_ms": None, "threads": None, "speedup": None, "accuracy": None}

    def strip(variant: Variant) -> Variant:
        measurement = variant.measurement.model_copy(update=costs)
        return Variant(name=variant.name, stage=variant.stage, measurement=measurement)

    return Results(title=results.title, dense=strip(results.dense), variants=tuple(map(strip, results.variants)))


def hostile(results: Results) -> Results:
    text = results.model_dump_json().replace("rank 8, plain, fine-tuned", json.dumps(HOSTILE)[1:-1])
    text = text.replace("A small study", json.dumps(HOSTILE)[1:-1])
    data = json.loads(text)
    for spectrum in data["spectra"]:
        spectrum["layer"] = HOSTILE + spectrum["layer"]
    for variant in data["variants"]:
        variant["plan"]["layers"][0]["name"] = HOSTILE
    data["published"][0]["source"] = data["provenance"][HOSTILE] = data["command"] = HOSTILE
    data["changes"]["classes"][0]["name"] = HOSTILE
    return Results.model_validate(data)


# ------------------------------------------------------------------------------------------------ results.json


def test_one_compressed_network_makes_results(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4)).eval(), torch.randn(1, 12)
    data = [(torch.randn(8, 12), torch.arange(8) % 4)]
    analysis = st.analyze(model, x)
    small = st.compress(model, st.Rank(2), example_inputs=x, analysis=analysis)
    dense = st.measure(model, x, latency=False)
    measured = small.measurement.model_copy(update={"accuracy": st.accuracy(small.model, data)})
    study = st.Results.of_network("mine", dense=dense, compressed=measured, plan=small.plan, analysis=analysis)
    assert study.dense.measurement == dense
    assert study.dense.accuracy is None
    assert study.chosen == "compressed"
    assert study.variant("compressed").accuracy == measured.accuracy.value
    assert study.variant("compressed").plan == small.plan
    assert [spectrum.layer for spectrum in study.spectra] == [layer.name for layer in analysis]
    page = st.report(study, tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("mine", "compressed", *(layer.name for layer in analysis)))
    alone = st.Results.of_network("mine", dense=dense)
    assert (alone.variants, alone.chosen, alone.spectra) == ((), None, ())
    st.report(alone, tmp_path / "alone.html")


def test_results_of_an_earlier_version_make_a_page(tmp_path: Path) -> None:
    earlier = Results.load(EARLIER)
    correct = {variant.name: variant.runs[0].test.correct for variant in (earlier.dense, *earlier.variants)}
    assert (len(correct), correct["dense"], correct[earlier.chosen]) == (9, 50, 46)
    assert (earlier.changes.whole.total, earlier.changes.whole.before, earlier.changes.whole.broken) == (360, 50, 4)
    page = page_of(earlier, tmp_path)
    assert {*SECTIONS} <= page.ids()
    assert all(name in page.words for name in correct)
    assert len([tag for tag, _ in page.elements if tag == "img"]) == len(earlier.changes.flipped)
    again = json.loads(earlier.save(tmp_path / "results.json").read_text(encoding="utf-8"))
    assert again == json.loads(EARLIER.read_text(encoding="utf-8"))


def test_results_survive_the_file(results: Results, tmp_path: Path) -> None:
    assert Results.load(results.save(tmp_path / "deep" / "results.json")) == results


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"stage": "dense"', '"stage": "thick"'),
        lambda text: text.replace('"title"', '"titel"'),
        lambda text: text.replace('"total": 1000', '"total": 0'),
        lambda text: text.replace('"chosen": "rank 8', '"chosen": "rank 9'),
        lambda text: text.replace('"name": "rank 2, plain, zero-shot"', '"name": "dense"'),
        lambda text: text.replace('"variant": "rank 8', '"variant": "rank 9'),
        lambda text: text.replace('"truth": 0', '"truth": 4'),
        lambda text: text.replace('"before": 380', '"before": 39'),
        lambda text: text.replace('"image": "', '"image": "\\" onload=\\"alert(1)'),
        lambda text: text.replace('"after": 2', '"after": 0'),
    ],
    ids=["cut", "stage", "key", "count", "chosen", "twice", "changes", "class", "tally", "image", "alike"],
)
def test_damaged_results_are_refused(results: Results, tmp_path: Path, damage) -> None:
    path = results.save(tmp_path / "results.json")
    whole = path.read_text(encoding="utf-8")
    path.write_text(damage(whole), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != whole
    with pytest.raises(errors.FileError, match="not a valid Results"):
        Results.load(path)


def test_missing_results_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.FileError, match="cannot read"):
        Results.load(tmp_path / "none.json")


def test_a_variant_is_found_by_name(results: Results) -> None:
    assert results.variant("dense") is results.dense
    assert results.variant("rank 2, plain, zero-shot") is results.variants[2]
    with pytest.raises(KeyError, match="no network 'rank 3'"):
        results.variant("rank 3")


def test_results_written_before_there_were_changes_still_load(results: Results, tmp_path: Path) -> None:
    old = json.loads(results.model_dump_json(exclude_none=True))
    del old["changes"]
    (tmp_path / "results.json").write_text(json.dumps(old))
    assert Results.load(tmp_path / "results.json") == results.model_copy(update={"changes": None})


def test_a_cumulative_share_belongs_to_every_value() -> None:
    with pytest.raises(ValueError, match="3 singular values, and 2 cumulative"):
        st.LayerSpectrum(
            layer="0", kind="Linear", shape=(3, 3), metric="plain", values=(3.0, 2.0, 1.0), cumulative=(0.5, 1.0)
        )


# ----------------------------------------------------------------------------------------------- what has changed


def test_tallies_add_up() -> None:
    whole = CHANGES.whole
    assert (whole.total, whole.before, whole.after) == (1000, 920, 920 - 45 + 25)
    assert (whole.broken, whole.corrected, whole.confused) == (45, 25, 8)
    assert [example.kind for example in CHANGES.flipped] == ["broken", "broken", "mended", "confused"]
    assert whole.difference.value == pytest.approx(-0.02)


def test_the_interval_of_a_difference_covers_what_it_promises() -> None:
    """10 000 pairs of networks whose answers to 500 examples change with known chances."""
    draw = np.random.default_rng(0)
    chances = (0.9, 0.06, 0.03, 0.01)
    truth = chances[2] - chances[1]
    counts = draw.multinomial(500, chances, size=10_000)
    inside = [
        Tally(total=500, before=int(same + broken), broken=int(broken), mended=int(corrected), confused=0).difference
        for same, broken, corrected, _ in counts[:2000]
    ]
    covered = np.mean([interval.low <= truth <= interval.high for interval in inside])
    assert 0.935 <= covered <= 0.97


def test_the_interval_of_few_examples_stays_within_bounds() -> None:
    for total, before, broken, corrected in ((0, 0, 0, 0), (1, 1, 1, 0), (1, 0, 0, 1), (5, 5, 5, 0), (200, 180, 0, 0)):
        interval = Tally(total=total, before=before, broken=broken, mended=corrected, confused=0).difference
        assert -1 <= interval.low <= interval.value <= interval.high <= 1
    assert interval.low < 0 < interval.high


def test_changes_in_words() -> None:
    said = words.changes_finding(CHANGES)
    assert "Of 1,000 test images (all 2 seeds together) 45 became wrong, 25 became right and 8 are wrong" in said
    assert pretty("~2.00 points, 95 % interval ~3.64 to ~0.35") in said
    assert pretty("Surely worse, in points: cat (~9.50).") in said
    assert "Surely better, in points: dog (+4.75)." in said
    assert "owl" not in said
    calm = CHANGES.model_copy(update={"classes": CHANGES.classes[2:], "flipped": ()})
    assert "No class is surely better or worse" in words.changes_finding(calm)


def test_the_table_of_changes() -> None:
    listing = changes_table(CHANGES)
    assert [row[0] for row in listing.rows] == ["all classes", "cat", "dog", "owl"]
    assert listing.rows[1][1:5] == ("400", "95.00 %", "85.50 %", pretty("~9.50"))
    assert listing.rows[1][6:] == ("40", "2", "3")
    assert "2 seeds" in listing.note


def test_the_figure_of_classes() -> None:
    figure = plot_classes(CHANGES)
    assert tuple(figure.layout.yaxis.categoryarray) == ("cat", "owl", "dog")
    marks = {trace.name: trace for trace in figure.data if trace.type == "scatter"}
    assert {name: tuple(trace.y) for name, trace in marks.items()} == {
        "surely worse": ("cat",),
        "no sure difference": ("owl",),
        "surely better": ("dog",),
    }
    worse, interval = marks["surely worse"], CHANGES.classes[0].difference
    assert worse.x[0] == pytest.approx(-9.5)
    assert worse.x[0] - worse.error_x.arrayminus[0] == pytest.approx(100 * interval.low)
    assert worse.x[0] + worse.error_x.array[0] == pytest.approx(100 * interval.high)
    assert len({trace.marker.symbol for trace in marks.values()}) == 3
    empty = CHANGES.model_copy(update={"classes": CHANGES.classes[3:], "flipped": ()})
    with pytest.raises(errors.DataError, match="nothing to plot"):
        plot_classes(empty)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 1, 1), (3, 5, 9)])
def test_pixels_come_back_from_a_png(shape: tuple[int, int, int]) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed, which reads the file back")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for each in (pixels, np.sort(pixels, axis=1), np.zeros_like(pixels)):
        seen = image.open(io.BytesIO(png(each)))
        assert (seen.format, seen.mode, seen.size) == ("PNG", "L" if shape[0] == 1 else "RGB", shape[:0:-1])
        back = np.asarray(seen).reshape(*shape[1:], shape[0])
        np.testing.assert_array_equal(np.moveaxis(back, 2, 0), each)
    assert base64.b64decode(png_text(pixels)) == png(pixels)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((1, 4, 4)), np.zeros((2, 4, 4), np.uint8), np.zeros((4, 4), np.uint8), np.zeros((3, 0, 4), np.uint8)],
)
def test_other_arrays_are_no_images(pixels: np.ndarray) -> None:
    with pytest.raises(errors.DataError, match="are no image"):
        png(pixels)


# ------------------------------------------------------------------------------------------------------- words


def pretty(text: str) -> str:
    """`*`, `_` and `~` as the signs of multiplication, range and minus."""
    return text.replace("*", words.TIMES).replace("_", words.TO).replace("~", "\N{MINUS SIGN}")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.count(0), "0"),
        (words.count(999), "999"),
        (words.count(1000), "1.00 k"),
        (words.count(999_999), "1.00 M"),
        (words.count(85_002), "85.0 k"),
        (words.size(340_448), "340 kB"),
        (words.size(12), "12 B"),
        (words.smaller(0.25), "4.0* smaller"),
        (words.smaller(0.96), "1.04* smaller"),
        (words.smaller(1.25), "1.25* larger"),
        (words.smaller(1.0), "unchanged"),
        (words.smaller(0.0), "nothing left"),
        (words.smaller(None), "_"),
        (words.share(0.0049), "0.49 %"),
        (words.milliseconds(0.019), "0.0190 ms"),
        (words.milliseconds(1234.5), "1234 ms"),
        (words.points(-0.0236), "~2.36"),
        (words.points(0.0236), "+2.36"),
        (words.points(-0.00001), "0.00"),
        (words.verdict(st.Interval(value=1.5, low=1.2, high=1.8)), "faster, 95 % interval 1.20_1.80*"),
        (words.verdict(st.Interval(value=0.5, low=0.4, high=0.9)), "slower, 95 % interval 0.40_0.90*"),
        (words.verdict(st.Interval(value=1.0, low=0.9, high=1.1)), "no sure difference, 95 % interval 0.90_1.10*"),
        (words.rule_text(st.Ratio(0.25)), "ratio 0.25"),
        (words.rule_text(st.Energy(0.9)), "energy 90 %"),
    ],
)
def test_numbers_in_words(said: str, expected: str) -> None:
    assert said == pretty(expected)


def test_accuracy_says_where_its_uncertainty_comes_from(results: Results) -> None:
    assert words.accuracy(results.dense) == "98.50 % ± 0.71"
    single = results.dense.model_copy(update={"runs": results.dense.runs[:1]})
    assert words.accuracy(single) == pretty("98.00 % (96.93_98.70)")


# ------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("kind", ["analysis", "plan", "measurement", "results"])
def test_tables_fit_and_break_no_number(kind: str, width: int, analysis: st.Analysis, results: Results) -> None:
    variant = results.variants[0]
    value = {"analysis": analysis, "plan": variant.plan, "measurement": variant.measurement, "results": results}[kind]
    printed = st.text(value, width=width)
    assert all(cell_len(line) <= width for line in printed.splitlines())
    listing = st.table(value)
    hidden = " ".join(printed.split()).partition("Not shown at this width:")[2]
    numbers = {
        line
        for row in listing.rows
        for column, cell in zip(listing.columns, row, strict=True)
        if column.number and column.head.replace("\n", " ") not in hidden
        for line in cell.split("\n")
    }
    assert numbers
    assert all(number in printed for number in numbers)
    assert "…" not in printed


def test_more_columns_where_there_is_room(results: Results) -> None:
    narrow, wide = st.text(results, width=80), st.text(results, width=200)
    assert "Not shown at this width" in narrow
    assert "Not shown" not in wide
    assert all(head in wide for head in ("Rank", "Metric", "Stage", "Latency", "Speed-up"))
    assert all(head in narrow for head in ("Network", "Accuracy", "Params"))


def test_the_table_of_an_analysis_says_why_layers_stay(analysis: st.Analysis) -> None:
    printed = st.text(analysis, width=200)
    last = analysis["4"]
    assert last.skip_reason is not None
    assert last.skip_reason in printed
    spectrum = analysis["2"].spectra["activation"]
    row = next(row for row in st.table(analysis).rows if row[0] == "2")
    assert row[5:11] == (
        f"{spectrum.effective_rank:.0f}",
        f"{spectrum.stable_rank:.1f}",
        *(str(spectrum.rank_for(energy)) for energy in (0.5, 0.75, 0.9, 0.99)),
    )


def test_the_table_of_a_plan(results: Results) -> None:
    plan = results.variants[0].plan
    assert plan is not None
    row = next(row for row in st.table(plan).rows if row[0] == "2")
    error = plan["2"].predicted_error
    assert error is not None
    assert row[1:6] == (words.shape((48, 48)), "linear", "8 of 48", str(plan["2"].break_even), f"{100 * error:.1f} %")
    own, before, after = plan["2"], plan.dense_cost, plan.kept_cost
    assert row[6] == f"{words.count(own.dense.params)} →\n{words.count(own.kept.params)}"
    assert row[7] == f"{100 * 2352 / before.params:.1f} %\n→ {100 * own.kept.params / after.params:.1f} %"
    assert row[9] == f"{100 * 2304 / before.macs:.1f} %\n→ {100 * own.kept.macs / after.macs:.1f} %"
    assert row[10] == own.reason


def test_the_table_of_a_study_marks_the_chosen_network(results: Results) -> None:
    listing = st.table(results)
    assert [listing.rows[at][0] for at in listing.strong] == [results.chosen]
    assert listing.rows[0][0] == "dense"
    assert len(listing.rows) == 1 + len(results.variants)


POINT = PublishedPoint(name="75 % energy", accuracy=0.95, params_ratio=0.25, macs_ratio=0.5, speedup=0.8)


def with_point(results: Results) -> Results:
    study = st.Published(source="a study", accuracy=((None, 0.96),), points=(POINT,))
    return results.model_copy(update={"published": (*results.published, study)})


def test_published_figures_have_their_table(results: Results) -> None:
    listing = published_table(with_point(results))
    assert listing is not None
    assert [row[:4] for row in listing.rows] == [
        ("dense", "a paper", "97.00 %", words.NOTHING),
        ("rank 8", "a paper", "90.00 %", pretty("~7.00")),
        ("rank 2", "a paper", "80.00 %", pretty("~17.00")),
        ("dense", "a study", "96.00 %", words.NOTHING),
        ("75 % energy", "a study", "95.00 %", pretty("~1.00")),
    ]
    assert listing.rows[4][4:] == (pretty("4.0* smaller"), pretty("2.0* smaller"), pretty("0.80*"))
    assert published_table(bare(results)) is None


def timed(runtime: str, gain: float) -> dict[str, object]:
    """What a measurement says of a runtime that is `gain` times as fast as dense."""
    speedup = st.Interval(value=gain, low=0.98 * gain, high=1.02 * gain)
    times = {"latency_ms": 2.0, "reference_ms": 1.0, "speedup": speedup, "drift": 1.0}
    return {"runtime": runtime, **times, "macs_ratio": 0.25, "threads": 1}


def in_two_runtimes(results: Results) -> Results:
    variants = tuple(
        variant.model_copy(
            update={
                "measurement": variant.measurement.model_copy(update=timed("torch", 0.5)),
                "in_runtimes": (variant.measurement.model_copy(update=timed("onnxruntime", 3.0)),),
            }
        )
        for variant in results.variants
    )
    return results.model_copy(update={"variants": variants})


def test_every_runtime_has_its_row(results: Results) -> None:
    listing = runtimes_table(in_two_runtimes(results))
    assert listing is not None
    rows = [row for row in listing.rows if row[0].startswith("rank 8")]
    assert [row[0] for row in rows[:2]] == ["rank 8, plain"] * 2
    slower, faster = rows[:2]
    assert slower[1:] == (
        *("torch", pretty("0.50*\n0.49_0.51"), "slower", "1.00 ms →\n2.00 ms"),
        *(pretty("4.0*"), pretty("12 %\n12.25_12.75")),
    )
    assert faster[1:4] == ("onnxruntime", pretty("3.0*\n2.94_3.06").replace("3.0", "3.00", 1), "faster")
    assert faster[6] == pretty("75 %\n73.50_76.50")
    strong = {listing.rows[at][0] for at in listing.strong}
    assert strong == {"rank 8, plain"}
    assert "Timed with 1 thread" in listing.note
    assert runtimes_table(bare(results)) is None


def test_a_latency_stands_beside_that_of_the_dense_network_in_the_same_rounds(results: Results) -> None:
    listing = st.table(in_two_runtimes(results))
    at = next(at for at, column in enumerate(listing.columns) if column.head == "Latency")
    assert listing.rows[0][at] == words.NOTHING  # timed alone, at another moment
    assert listing.rows[1][at] == "1.00 ms →\n2.00 ms"
    assert listing.rows[1][at].values == {"": 2.0, "dense": 1.0}


def test_the_first_measured_runtime_is_named_at_a_glance(results: Results, tmp_path: Path) -> None:
    both = in_two_runtimes(results)
    text = page_of(both, tmp_path).words.replace("\xa0", " ")
    for said in ("slower, 95 % interval 0.49_0.51*", "torch, 1 thread, 2.00 ms; onnxruntime: 3.00*, faster"):
        assert pretty(said) in text
    untimed = both.variant(both.chosen)
    first = untimed.measurement.model_copy(update={"speedup": None})
    changed = untimed.model_copy(update={"measurement": first})
    only = tuple(changed if variant == untimed else variant for variant in both.variants)
    text = page_of(both.model_copy(update={"variants": only}), tmp_path).words.replace("\xa0", " ")
    for said in ("faster, 95 % interval 2.94_3.06*", "onnxruntime, 1 thread, 2.00 ms\n"):
        assert pretty(said) in text


def test_a_restless_machine_is_said(results: Results) -> None:
    measured = results.variants[0].measurement
    calm = measured.model_copy(update=timed("torch", 1.1))
    assert words.timing_verdict(calm) == "faster"
    assert words.timing_verdict(calm.model_copy(update={"drift": 1.3})) == "too noisy to tell"
    assert words.timing_verdict(calm.model_copy(update={"speedup": None})) == words.NOTHING


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("rank 20, plain, zero-shot", "rank 20, activation, zero-shot"), "rank 20, zero-shot"),
        (("75 % energy, zero-shot", "75 % energy, fine-tuned"), "75 % energy"),
        (("dense",), "dense"),
        (("a, b", "c"), "a, b; c"),
        (("a", "b", "c"), "a; b; and 1 more"),
    ],
)
def test_what_names_have_in_common(names: tuple[str, ...], expected: str) -> None:
    assert words.common_name(names) == expected


def test_columns_that_nobody_fills_are_left_out(results: Results) -> None:
    heads = [column.head for column in st.table(bare(results)).columns]
    assert heads == ["Network", "Stage", "Params", "Bytes", "MACs"]


def test_names_are_shown_literally_in_a_terminal(results: Results) -> None:
    variant = results.variants[0].model_copy(update={"name": "[red]\x1b[31mx[/red]"})
    printed = st.text(results.model_copy(update={"variants": (variant,), "chosen": None}), width=160)
    assert "[red]�[31mx[/red]" in printed


def test_long_layer_names_fold_and_leave_the_numbers_whole(results: Results) -> None:
    plan = results.variants[0].plan
    assert plan is not None
    layers = tuple(layer.model_copy(update={"name": f"model.decoder.{layer.name}." + 5 * "block."}) for layer in plan)
    printed = st.text(plan.model_copy(update={"layers": layers}), width=80)
    assert "8 of 48" in printed
    assert max(map(cell_len, printed.splitlines())) <= 80


def test_a_table_prints_on_any_console(results: Results) -> None:
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(st.table(results))
    assert "rank 8" in capture.get()


@pytest.mark.parametrize("value", [None, 3, "results.json", {}])
def test_other_values_have_no_table(value: object) -> None:
    with pytest.raises(errors.DataError, match=type(value).__name__):
        st.table(value)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------- figures


def test_spectra_are_normalised_and_marked(results: Results) -> None:
    figure = st.plot_spectra(results, layers=["2"])
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert [trace.name for trace in lines] == ["plain metric"] * 2 + ["activation metric"] * 2
    values = np.array(
        next(spectrum for spectrum in results.spectra if (spectrum.layer, spectrum.metric) == ("2", "plain")).values
    )
    np.testing.assert_allclose(lines[0].y, values / values[0], rtol=1e-12)
    np.testing.assert_allclose(lines[1].y, 100 * np.cumsum(values**2) / (values**2).sum(), rtol=1e-9)
    assert figure.layout.yaxis2.title.text == "Explained variance (%)"
    marks = [trace for trace in figure.data if trace.mode == "markers"]
    assert [tuple(trace.x) for trace in marks] == [(8,), (8,)]
    assert len({trace.line.dash for trace in lines}) == 2


def test_spectra_of_an_analysis_with_a_plan(analysis: st.Analysis) -> None:
    figure = st.plot_spectra(analysis, plan=st.plan(analysis, st.Rank(3), metric="activation"))
    marks = [trace for trace in figure.data if trace.mode == "markers"]
    assert {trace.name.split(":")[0] for trace in marks} == {"0, activation", "2, activation"}
    assert all(tuple(trace.x) == (3,) for trace in marks)
    assert not [trace for trace in st.plot_spectra(analysis).data if trace.mode == "markers"]


def test_the_explained_variance_is_that_of_the_study(results: Results) -> None:
    exact = st.LayerSpectrum(
        layer="0", kind="Linear", shape=(2, 2), metric="plain", values=(2.0, 1.0), cumulative=(0.8125, 1.0)
    )
    study = results.model_copy(update={"spectra": (exact,), "chosen": None, "changes": None})
    right = next(trace for trace in st.plot_spectra(study).data if trace.yaxis == "y2" and trace.mode == "lines")
    assert tuple(right.y) == (81.25, 100.0)
    assert "explained variance" in words.spectrum_finding([exact], ())


def test_long_spectra_are_thinned_with_exact_ends(results: Results) -> None:
    values = tuple(np.linspace(5, 0.5, 4096))
    long = st.LayerSpectrum(layer="big", kind="Linear", shape=(4096, 4096), metric="plain", values=values)
    trace = st.plot_spectra(results.model_copy(update={"spectra": (long,)})).data[0]
    assert 100 <= len(trace.x) <= 200
    assert (trace.x[0], trace.x[-1]) == (1, 4096)
    assert (trace.y[0], trace.y[-1]) == (1.0, values[-1] / values[0])


def test_a_layer_of_zeros_can_be_plotted(results: Results) -> None:
    zeros = st.LayerSpectrum(layer="0", kind="Linear", shape=(4, 4), metric="plain", values=(0.0,) * 4)
    trace = st.plot_spectra(results.model_copy(update={"spectra": (zeros,)})).data[0]
    assert np.isnan(trace.y).all()


def test_unknown_layers_name_their_neighbours(results: Results) -> None:
    with pytest.raises(errors.PatternError, match=r"near names: .*2"):
        st.plot_spectra(results, layers=["22"])


@pytest.mark.parametrize("against", ["rank", "params", "macs", "latency"])
def test_accuracies_with_error_bars(results: Results, against) -> None:
    figure = st.plot_accuracy(results, against=against)
    groups = {(trace.legendgroup, trace.line.dash): trace for trace in figure.data if trace.legendgroup}
    named = {trace.name: trace for trace in figure.data if trace.showlegend is not False}
    tuned = groups["plain metric", "solid"]
    variants = [results.variant(f"rank {rank}, plain, fine-tuned") for rank in (2, 8)]
    expected = {
        "rank": [2, 8],
        "params": [variant.measurement.params for variant in variants],
        "macs": [variant.measurement.macs for variant in variants],
        "latency": [variant.measurement.latency_ms for variant in variants],
    }[against]
    assert dict(zip(tuned.x, tuned.y, strict=True)) == pytest.approx(dict(zip(expected, (84.5, 96.5), strict=True)))
    assert list(tuned.error_y.array) == pytest.approx([100 * variants[0].spread] * 2)
    assert list(named["dense 98.50 %"].y) == pytest.approx([98.5, 98.5])
    assert ("published: a paper" in named) == (against == "rank")
    assert groups["plain metric", "dot"].marker.symbol == "circle-open"
    assert groups["activation metric", "solid"].marker.symbol == "square"
    listed = {"plain metric", "activation metric", "zero-shot (open, dotted)", "fine-tuned (filled)"}
    assert listed <= set(named)
    assert not any(trace.showlegend for (_, dash), trace in groups.items() if dash == "dot")


def test_error_bars_end_where_accuracies_do(results: Results) -> None:
    best = results.variants[0].model_copy(update={"runs": (run(0, 1000), run(1, 900))})
    worst = results.variants[2].model_copy(update={"runs": (run(0, 0), run(1, 10))})
    figure = st.plot_accuracy(results.model_copy(update={"variants": (best, worst)}), against="params")
    reach = {
        round(y, 6): (y - down, y + up)
        for trace in figure.data
        if trace.error_y.array is not None
        for y, up, down in zip(trace.y, trace.error_y.array, trace.error_y.arrayminus, strict=True)
    }
    assert reach[95.0] == pytest.approx((95 - 100 * best.spread, 100))
    assert reach[0.5] == pytest.approx((0, 0.5 + 100 * worst.spread))


def test_one_seed_shows_the_interval(results: Results) -> None:
    single = tuple(variant.model_copy(update={"runs": variant.runs[:1]}) for variant in results.variants)
    trace = st.plot_accuracy(results.model_copy(update={"variants": single})).data[0]
    interval = single[3].runs[0].test.interval
    assert trace.error_y.arrayminus[0] == pytest.approx(100 * (interval.value - interval.low))
    assert trace.error_y.array[0] == pytest.approx(100 * (interval.high - interval.value))


def test_published_figures_stand_beside(results: Results) -> None:
    named = {trace.name: trace for trace in st.plot_accuracy(results).data}
    assert tuple(named["published: a paper"].x) == (2, 8)
    assert tuple(named["published: a paper"].y) == pytest.approx((80, 90))
    assert named["published dense 97.00 %"].y[0] == pytest.approx(97)


def test_published_networks_stand_at_their_share_of_our_cost(results: Results) -> None:
    both, whole = with_point(results), results.dense.measurement
    places = {"params": whole.params / 4, "macs": whole.macs / 2, "latency": whole.latency_ms / 0.8}
    for against, place in places.items():
        named = {trace.name: trace for trace in st.plot_accuracy(both, against=against).data}
        point = named["published: a study, placed by kept / dense"]
        assert (tuple(point.x), tuple(point.y)) == ((pytest.approx(place),), (95.0,))
        assert tuple(point.customdata) == ("75 % energy",)
        assert named["published dense 96.00 %"].y[0] == 96
        assert "published: a paper, placed by kept / dense" not in named
    assert "published: a study" not in {trace.name for trace in st.plot_accuracy(both).data}
    said = words.accuracy_finding(both)
    assert "Published (a study): dense 96.00 %; 75 % energy 95.00 % with 25 % of the parameters and 50 % of" in said


def call_factory(results: Results, name: str, rule: object, metric: str, stage: str) -> Variant:
    update = {"name": f"{name}, {stage}", "rule": rule, "metric": metric, "stage": stage}
    return results.variants[0].model_copy(update=update)


def test_networks_made_in_one_way_are_one_family(results: Results) -> None:
    studies = (
        ("50 % energy", st.Energy(0.5), "plain"),
        ("75 % energy", st.Energy(0.75), "plain"),
        ("largest spectral gap", None, "plain"),
        ("held-out", st.Budget(params=0.3), "plain"),
        ("budget, 30 % of the MACs", st.Budget(macs=0.3), "activation"),
        ("budget, 20 % of the MACs", st.Budget(macs=0.2), "activation"),
    )
    variants = [call_factory(results, *study, stage) for study in studies for stage in ("zero-shot", "fine-tuned")]
    families = words.families(variants)
    assert [families[f"{name}, fine-tuned"] for name, _, _ in studies] == [
        *("energy, plain metric", "energy, plain metric", "largest spectral gap", "held-out"),
        *("budget, activation metric", "budget, activation metric"),
    ]
    assert list(words.grouped(variants))[:4] == [
        *("zero-shot, energy, plain metric", "fine-tuned, energy, plain metric"),
        *("largest spectral gap, zero-shot", "largest spectral gap, fine-tuned"),
    ]
    study = results.model_copy(update={"variants": tuple(variants), "chosen": None, "changes": None})
    figure = st.plot_accuracy(study, against="params")
    drawn = [trace for trace in figure.data if trace.legendgroup]
    assert len(drawn) == 8
    assert [trace.name for trace in drawn if trace.showlegend] == [*dict.fromkeys(families.values())]
    styles = {(trace.legendgroup, trace.line.color, trace.marker.symbol.removesuffix("-open")) for trace in drawn}
    assert len(styles) == len({colour for _, colour, _ in styles}) == len({symbol for *_, symbol in styles}) == 4
    assert "Budget, 30 % of the MACs" not in words.accuracy_finding(study)
    assert "Held-out, zero-shot: " in words.accuracy_finding(study)


def test_the_rank_comes_last_where_some_networks_have_none(results: Results) -> None:
    assert available(results)[0] == "rank"
    free = results.variants[0].model_copy(update={"rule": st.Energy(0.5), "plan": None})
    some = results.model_copy(update={"variants": (free, *results.variants[1:])})
    assert available(some) == ("params", "macs", "latency", "rank")
    few = results.model_copy(update={"variants": (free, results.variants[1])})
    assert available(few) == ("params", "macs", "latency")
    assert available(results.model_copy(update={"variants": ()})) == ()


def test_a_zoom_is_offered_where_the_scale_hides_the_top(results: Results) -> None:
    assert not st.plot_accuracy(results).layout.meta
    low = [
        variant.model_copy(update={"runs": (run(0, 100 if variant.stage == "zero-shot" else 970),)})
        for variant in results.variants
    ]
    figure = st.plot_accuracy(results.model_copy(update={"variants": tuple(low)}))
    bottom, top = figure.layout.meta["zoom"]
    assert 90 < bottom < 97 < 98.5 < top < 100


def test_different_ranks_by_layer_are_no_rank_axis(results: Results, analysis: st.Analysis) -> None:
    plan = st.plan(analysis, st.Ratio(0.2), metric="plain")
    free = results.variants[0].model_copy(update={"rule": plan.rule, "plan": plan})
    only = results.model_copy(update={"variants": (free,), "chosen": None})
    assert available(only) == ("params", "macs", "latency")
    assert words.ranks(free) == pretty("3_9")
    with pytest.raises(errors.DataError, match="both an accuracy and a rank"):
        st.plot_accuracy(only)
    with pytest.raises(errors.DataError, match="give one of rank"):
        st.plot_accuracy(results, against="flops")  # type: ignore[arg-type]


def test_curves_have_a_line_a_seed_and_one_legend_entry(results: Results) -> None:
    figure = st.plot_curves(results)
    assert len(figure.data) == 4 * 2 * 2
    assert sum(trace.showlegend for trace in figure.data) == 4
    loss, held_out = figure.data[0], figure.data[1]
    assert tuple(loss.x) == (1, 2, 3)
    assert tuple(loss.y) == pytest.approx((1, 1 / 2, 1 / 3))
    assert tuple(held_out.y) == pytest.approx((71, 72, 73))
    assert held_out.yaxis == "y2"


def test_curves_without_held_out_accuracies(results: Results) -> None:
    data = json.loads(results.model_dump_json())
    for epoch in (epoch for variant in data["variants"] for run in variant["runs"] for epoch in run["curve"]):
        epoch["held_out"] = None
    figure = st.plot_curves(Results.model_validate(data))
    assert len(figure.data) == 4 * 2
    assert {trace.yaxis for trace in figure.data} == {None}


def test_nothing_to_plot_is_an_error(results: Results) -> None:
    nothing = bare(results)
    for plot in (st.plot_spectra, st.plot_accuracy, st.plot_curves):
        with pytest.raises(errors.DataError):
            plot(nothing)
    with pytest.raises(errors.DataError, match="this is a str"):
        st.plot_spectra("results")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """What a browser would make of the file: its elements with their attributes, and the text outside of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.styles = self.words = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        where = self._inside[-1] if self._inside else ""
        if where == "style":
            self.styles += data
        elif where != "script":
            self.words += data

    def ids(self) -> set[str | None]:
        return {attributes["id"] for _, attributes in self.elements if "id" in attributes}


def page_of(results: Results, folder: Path) -> Page:
    return Page(st.report(results, folder / "new" / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(results, tmp_path_factory.mktemp("page"))


def test_the_page_holds_everything(page: Page) -> None:
    assert {*SECTIONS} <= page.ids()
    for expected in ("A small study", "It is the best.", "spectrim demo", "98.50 %", "rank 2, activation, zero-shot"):
        assert expected in page.words
    plots = [attributes for _, attributes in page.elements if attributes.get("class") == "plot"]
    assert len(plots) == 4
    assert all(plot["role"] == "img" and len(plot["aria-label"] or "") > 40 for plot in plots)
    scopes = [attributes.get("scope") for tag, attributes in page.elements if tag == "th"]
    assert {"col", "row"} == set(scopes)
    regions = [attributes for tag, attributes in page.elements if attributes.get("class") == "scroll"]
    assert all(region["tabindex"] == "0" and region["role"] == "region" and region["aria-label"] for region in regions)


def test_the_images_that_flipped_are_shown_and_described(page: Page) -> None:
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [image["src"] for image in images] == [
        f"data:image/png;base64,{example.image}" for example in CHANGES.flipped
    ]
    assert images[0]["alt"] == "Test image 3, cat: cat (98 % sure) became dog (50 % sure)"
    assert images[3]["alt"] == "Test image 7, dog: owl (98 % sure) became cat (50 % sure)"
    headings = re.findall(r"(Right before, wrong now|Wrong before, right now|Wrong both times)", page.words)
    assert headings == ["Right before, wrong now", "Wrong before, right now", "Wrong both times"]
    assert "(2 of seed 0)" in page.words
    assert "95.00 %" in page.words


def test_the_page_loads_nothing(page: Page) -> None:
    loading = {"src", "srcset", "data", "poster", "action", "formaction", "background", "ping"}
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/png;base64,")
        else:
            assert not loading & set(attributes)
        assert (attributes.get("href") or "#").startswith("#")
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    policy = next(attributes for _, attributes in page.elements if "http-equiv" in attributes)["content"]
    assert policy is not None
    assert "default-src 'none'" in policy


def test_hostile_names_are_only_text(results: Results, tmp_path: Path) -> None:
    text = st.report(hostile(results), tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>document" not in text
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 6
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == len(CHANGES.flipped)
    assert all((image["src"] or "").startswith("data:image/png") and "onerror" not in image for image in images)
    assert HOSTILE in (images[0]["alt"] or "")
    assert page.words.count(HOSTILE) >= 8


def test_what_is_absent_vanishes(results: Results, tmp_path: Path) -> None:
    text = st.report(bare(results), tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"accuracy", "runtimes", "changes", "spectra", "layers", "curves"} & page.ids()
    assert "Plotly" not in text
    assert len(text) < 60_000
    assert "None" not in page.words
    assert "smaller" in page.words


@pytest.mark.parametrize("missing", ["spectra", "published", "changes", "chosen", "variants", "command", "provenance"])
def test_each_part_may_be_absent(results: Results, tmp_path: Path, missing: str) -> None:
    empty = {"chosen": None, "command": None, "changes": None, "provenance": {}}.get(missing, ())
    without = {missing: empty} | ({"chosen": None, "changes": None} if missing == "variants" else {})
    page = page_of(results.model_copy(update=without), tmp_path)
    assert "A small study" in page.words
    assert ("No network was chosen" in page.words) == (missing == "chosen")


def test_without_a_choice_the_most_accurate_come_first(results: Results, tmp_path: Path) -> None:
    free = results.model_copy(update={"chosen": None})
    page = st.report(free, tmp_path / "r.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h3>(.*?)</h3>", page)[:3]
    assert headings == ["rank 8, plain, fine-tuned", "rank 8, activation, fine-tuned", "rank 8, plain, zero-shot"]


def test_a_page_of_sixty_layers_stays_small(results: Results, tmp_path: Path) -> None:
    values = tuple(np.linspace(9, 1, 4096))
    spectra = tuple(
        st.LayerSpectrum(layer=f"block.{n}", kind="Linear", shape=(4096, 4096), metric=metric, values=values)
        for n in range(60)
        for metric in ("plain", "activation")
    )
    path = st.report(results.model_copy(update={"spectra": spectra}), tmp_path / "r.html")
    assert path.stat().st_size < 8e6
    page = Page(path.read_text(encoding="utf-8"))
    assert len([tag for tag, _ in page.elements if tag == "option"]) == 60


def test_a_report_of_something_else_is_refused(tmp_path: Path, analysis: st.Analysis) -> None:
    for value in (analysis, None, {}, "results.json"):
        with pytest.raises(errors.DataError, match=r"Results\.load"):
            st.report(value, tmp_path / "report.html")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written(results: Results, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "report.html", tmp_path):
        with pytest.raises(errors.FileError, match="cannot write"):
            st.report(bare(results), path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------------------------ figures as files


def test_figures_go_to_files(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("kaleido", reason="kaleido is not installed, which draws figures into files")
    figure = st.plot_accuracy(results)
    try:
        drawn = save_figure(figure, tmp_path / "new" / "figure.svg")
    except errors.EngineError as error:
        pytest.skip(f"kaleido finds no browser to draw with: {error}")
    assert drawn.read_text(encoding="utf-8").startswith("<svg")
    raster = save_figure(figure, tmp_path / "figure.png", width=300, height=200, scale=2).read_bytes()
    assert raster.startswith(b"\x89PNG")
    assert (int.from_bytes(raster[16:20]), int.from_bytes(raster[20:24])) == (600, 400)


def test_a_figure_that_cannot_be_saved_says_why(results: Results, tmp_path: Path, monkeypatch) -> None:
    figure = st.plot_accuracy(results)
    with pytest.raises(errors.DataError, match="end in png, svg, pdf"):
        save_figure(figure, tmp_path / "figure.docx")
    with pytest.raises(errors.DataError, match="is a str"):
        save_figure("figure", tmp_path / "figure.png")  # type: ignore[arg-type]
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(errors.DependencyError, match=r'pip install "spectrim\[figures\]"'):
        save_figure(figure, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("metric", get_args(Metric))
def test_every_metric_can_be_shown(metric: Metric, results: Results, tmp_path: Path) -> None:
    spectrum = st.LayerSpectrum(layer="0", kind="Linear", shape=(4, 4), metric=metric, values=(2.0, 1.0))
    variants = tuple(variant.model_copy(update={"metric": metric}) for variant in results.variants[:2])
    study = results.model_copy(update={"spectra": (spectrum,), "variants": variants, "chosen": None, "changes": None})
    page = st.report(study, tmp_path / "page.html")
    assert f"{metric} metric" in page.read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------- in a notebook


@pytest.fixture(scope="module")
def small() -> st.Compressed:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
    data = [torch.randn(64, 16) for _ in range(3)]
    return st.compress(model, st.Rank(8), example_inputs=data[0], data=data, keep_last=True)


def test_values_are_shown_as_their_tables(analysis: st.Analysis, results: Results, small: st.Compressed) -> None:
    for value in (analysis, small.plan, small.measurement, small.fidelity, small, results, st.table(results)):
        listing, markup = st.table(value), value._repr_html_()
        assert listing.title.replace("<", "&lt;") in markup
        assert all(row[0].split("\n")[0] in markup for row in listing.rows)
        assert not re.search(r"background|(?<!-)color:", markup)  # of the notebook's theme
        assert value._repr_mimebundle_() == {"text/plain": str(value)}
    assert str(small.plan) == st.text(small.plan)
    assert str(small.fidelity) in st.text(small.fidelity, width=1000)


def test_what_compress_returns_is_printed_in_a_few_lines(small: st.Compressed) -> None:
    text = str(small)
    assert len(text.splitlines()) <= 10
    assert "Rank 8, activation metric: 2 of 3 factored" in text
    assert re.search(r"Parameters +3.36 k → 1.57 k +47 % +2.1\S smaller", text)
    assert str(small.fidelity) in " ".join(text.split())
    assert 'st.save(small.model, "small.safetensors")' in text


def test_narrowed_layers_are_counted_by_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(256, 16, generator=generator)
    small = st.compress(model, st.Budget(macs=0.6), example_inputs=x[:1], data=x.split(32), reconstruct=False)
    assert {layer.form for layer in small.plan} == {"width"}
    assert "0 of 2 factored, 2 narrowed" in st.text(small.plan)


def test_a_latency_that_was_refused_is_said(small: st.Compressed) -> None:
    note = st.LatencyNote(
        runtime="torch", threads=1, dense_ms=1.0, predicted=1.0, refused="nothing is faster", fingerprint=""
    )
    plan = small.plan.model_copy(update={"latency": note})
    assert "It is as it was: nothing is faster." in st.text(dataclasses.replace(small, plan=plan))


def test_hostile_names_are_only_text_in_a_notebook(results: Results) -> None:
    markup = hostile(results)._repr_html_()
    assert "<script" not in markup
    assert "<img" not in markup
    assert "&lt;script&gt;" in markup


# ------------------------------------------------------------------------------------ what is printed is what is meant


@pytest.mark.parametrize(
    ("values", "ticks"),
    [((1.0, 0.9, 0.5), {"nticks": 6}), ((1.0, 0.1, 0.01), {"dtick": "D2"}), ((1.0, 1e-3, 1e-6), {"dtick": 1})],
)
def test_labels_of_logarithmic_axes_do_not_touch(results: Results, values: tuple[float, ...], ticks: dict) -> None:
    """Left to itself, plotly labels each of 0.01, 0.02, 0.03, .. 0.9, 1 where there are one to six powers of ten."""
    spectrum = st.LayerSpectrum(layer="0", kind="Linear", shape=(3, 3), metric="plain", values=values)
    axis = st.plot_spectra(results.model_copy(update={"spectra": (spectrum,)})).layout.yaxis
    assert {name: getattr(axis, name) for name in ticks} == ticks
    epochs = [st.Epoch(epoch=at, loss=loss, seconds=0.1) for at, loss in enumerate(values)]
    axis = st.plot_history(epochs).layout.yaxis
    assert {name: getattr(axis, name) for name in ticks} == ticks


def test_speed_is_named_only_where_it_was_measured(results: Results, tmp_path: Path) -> None:
    assert "Accuracy against size and speed" in page_of(results, tmp_path).words

    def untimed(variant: Variant) -> Variant:
        blank = dict.fromkeys(("latency_ms", "reference_ms", "speedup"))
        return variant.model_copy(update={"measurement": variant.measurement.model_copy(update=blank)})

    networks = {"dense": untimed(results.dense), "variants": tuple(map(untimed, results.variants))}
    page = page_of(results.model_copy(update=networks), tmp_path)
    assert "Accuracy against size" in page.words
    assert "size and speed" not in page.words
