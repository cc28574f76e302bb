"""Tables, figures and the page, from the values of a small study that was really measured."""

import html
import json
import re
import shutil
import subprocess
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
from spectrim.plan import Metric
from spectrim.report import words
from spectrim.report.figures import available
from spectrim.report.results import Results, Variant

HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=alert(1)>[bold]"


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
            made = st.compress(
                model,
                st.plan(analysis, st.Rank(rank), metric=metric),
                example_inputs=x,
                analysis=analysis,
            )
            measured = st.measure(made.model, x, reference=model, rounds=5)
            for stage, gain in (("zero-shot", 0), ("fine-tuned", 100)):
                curve = [st.Epoch(epoch=e, loss=1 / e, held_out=0.7 + e / 100, seconds=0.1) for e in (1, 2, 3)]
                runs = [run(seed, 700 + 20 * rank + 10 * seed + gain, curve if gain else ()) for seed in (0, 1)]
                variants.append(
                    Variant(
                        name=f"rank {rank}, {metric}, {stage}",
                        stage=stage,
                        rule=st.Rank(rank),
                        metric=metric,
                        plan=made.plan,
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
            st.LayerSpectrum(layer=one.name, kind=one.kind, shape=one.shape, metric=metric, values=tuple(found.values))
            for one in analysis
            for metric, found in one.spectra.items()
        ),
        published=(st.Published(source="a paper", accuracy=((None, 0.97), (8, 0.9), (2, 0.8))),),
        command="spectrim demo",
        provenance={"seeds": "0, 1"},
    )


def run(seed: int, correct: int, curve: tuple[st.Epoch, ...] | list[st.Epoch] = ()) -> st.Run:
    return st.Run(seed=seed, test=st.Accuracy(correct=correct, total=1000), curve=tuple(curve))


def bare(results: Results) -> Results:
    """The same study with every optional part absent."""
    costs = {"latency_ms": None, "threads": None, "speedup": None, "accuracy": None}

    def strip(one: Variant) -> Variant:
        measurement = one.measurement.model_copy(update=costs)
        return Variant(name=one.name, stage=one.stage, measurement=measurement)

    return Results(
        title=results.title, dense=strip(results.dense), variants=tuple(strip(one) for one in results.variants)
    )


def hostile(results: Results) -> Results:
    text = results.model_dump_json().replace("rank 8, plain, fine-tuned", json.dumps(HOSTILE)[1:-1])
    text = text.replace("A small study", json.dumps(HOSTILE)[1:-1])
    data = json.loads(text)
    for spectrum in data["spectra"]:
        spectrum["layer"] = HOSTILE + spectrum["layer"]
    for variant in data["variants"]:
        variant["plan"]["layers"][0]["name"] = HOSTILE
    data["published"][0]["source"] = data["provenance"][HOSTILE] = data["command"] = HOSTILE
    return Results.model_validate(data)


# ------------------------------------------------------------------------------------------------ results.json


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
    ],
    ids=["cut", "stage", "key", "count", "chosen", "twice"],
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
        (words.verdict(st.Interval(value=1.5, low=1.2, high=1.8)), "faster, 95 % interval 1.20_1.80*"),
        (words.verdict(st.Interval(value=0.5, low=0.4, high=0.9)), "slower, 95 % interval 0.40_0.90*"),
        (words.verdict(st.Interval(value=1.0, low=0.9, high=1.1)), "no sure difference, 95 % interval 0.90_1.10*"),
        (words.asked(st.Ratio(0.25)), "ratio 0.25"),
        (words.asked(st.Energy(0.9)), "energy 90 %"),
    ],
)
def test_numbers_in_words(said: str, expected: str) -> None:
    assert said == pretty(expected)


def test_accuracy_says_where_its_uncertainty_comes_from(results: Results) -> None:
    several = results.dense
    assert words.accuracy(several) == "98.50 % ± 0.71"
    one = several.model_copy(update={"runs": several.runs[:1]})
    assert words.accuracy(one) == pretty("98.00 % (96.93_98.70)")


# ------------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize("kind", ["analysis", "plan", "measurement", "results"])
def test_tables_fit_and_break_no_number(kind: str, width: int, analysis: st.Analysis, results: Results) -> None:
    variant = results.variants[0]
    value = {"analysis": analysis, "plan": variant.plan, "measurement": variant.measurement, "results": results}[kind]
    shown = st.text(value, width=width)
    assert all(cell_len(line) <= width for line in shown.splitlines())
    listing = st.table(value)
    hidden = " ".join(shown.split()).partition("Not shown at this width:")[2]
    numbers = {
        line
        for row in listing.rows
        for column, cell in zip(listing.columns, row, strict=True)
        if column.number and column.head.replace("\n", " ") not in hidden
        for line in cell.split("\n")
    }
    assert numbers
    assert all(number in shown for number in numbers)
    assert "…" not in shown


def test_more_columns_where_there_is_room(results: Results) -> None:
    narrow, wide = st.text(results, width=80), st.text(results, width=200)
    assert "Not shown at this width" in narrow
    assert "Not shown" not in wide
    assert all(head in wide for head in ("Rank", "Metric", "Stage", "Latency", "Speed-up"))
    assert all(head in narrow for head in ("Network", "Accuracy", "Params"))


def test_the_table_of_an_analysis_says_why_layers_stay(analysis: st.Analysis) -> None:
    shown = st.text(analysis, width=200)
    last = analysis["4"]
    assert last.refusal is not None
    assert last.refusal in shown
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
    assert row[6] == f"{words.count(plan['2'].dense.params)} →\n{words.count(plan['2'].kept.params)}"


def test_the_table_of_a_study_marks_the_chosen_network(results: Results) -> None:
    listing = st.table(results)
    assert [listing.rows[at][0] for at in listing.strong] == [results.chosen]
    assert listing.rows[0][0] == "dense"
    assert len(listing.rows) == 1 + len(results.variants)


def test_columns_that_nobody_fills_are_left_out(results: Results) -> None:
    heads = [column.head for column in st.table(bare(results)).columns]
    assert heads == ["Network", "Stage", "Params", "Bytes", "MACs"]


def test_names_are_shown_literally_in_a_terminal(results: Results) -> None:
    variant = results.variants[0].model_copy(update={"name": "[red]\x1b[31mx[/red]"})
    shown = st.text(results.model_copy(update={"variants": (variant,), "chosen": None}), width=160)
    assert "[red]�[31mx[/red]" in shown


def test_long_layer_names_fold_and_leave_the_numbers_whole(results: Results) -> None:
    plan = results.variants[0].plan
    assert plan is not None
    layers = tuple(one.model_copy(update={"name": f"model.decoder.{one.name}." + 5 * "block."}) for one in plan)
    shown = st.text(plan.model_copy(update={"layers": layers}), width=80)
    assert "8 of 48" in shown
    assert max(map(cell_len, shown.splitlines())) <= 80


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
    values = np.array(next(one for one in results.spectra if one.layer == "2" and one.metric == "plain").values)
    np.testing.assert_allclose(lines[0].y, values / values[0], rtol=1e-12)
    np.testing.assert_allclose(lines[1].y, 100 * np.cumsum(values**2) / (values**2).sum(), rtol=1e-9)
    marks = [trace for trace in figure.data if trace.mode == "markers"]
    assert [tuple(trace.x) for trace in marks] == [(8,), (8,)]
    assert len({trace.line.dash for trace in lines}) == 2


def test_spectra_of_an_analysis_with_a_plan(analysis: st.Analysis) -> None:
    figure = st.plot_spectra(analysis, plan=st.plan(analysis, st.Rank(3), metric="activation"))
    marks = [trace for trace in figure.data if trace.mode == "markers"]
    assert {trace.name.split(":")[0] for trace in marks} == {"0, activation", "2, activation"}
    assert all(tuple(trace.x) == (3,) for trace in marks)
    assert not [trace for trace in st.plot_spectra(analysis).data if trace.mode == "markers"]


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
    with pytest.raises(errors.PatternError, match=r"near it: .*2"):
        st.plot_spectra(results, layers=["22"])


@pytest.mark.parametrize("against", ["rank", "params", "macs", "latency"])
def test_accuracies_with_error_bars(results: Results, against) -> None:
    figure = st.plot_accuracy(results, against=against)
    named = {trace.name: trace for trace in figure.data if trace.name}
    tuned = named["fine-tuned, plain metric"]
    variants = sorted((one for one in results.variants if one.name.endswith("plain, fine-tuned")), key=lambda v: v.name)
    expected = {
        "rank": [2, 8],
        "params": [one.measurement.params for one in variants],
        "macs": [one.measurement.macs for one in variants],
        "latency": [one.measurement.latency_ms for one in variants],
    }[against]
    assert dict(zip(tuned.x, tuned.y, strict=True)) == pytest.approx(dict(zip(expected, (84.5, 96.5), strict=True)))
    assert list(tuned.error_y.array) == pytest.approx([100 * variants[0].spread] * 2)
    assert list(named["dense 98.50 %"].y) == pytest.approx([98.5, 98.5])
    assert ("published: a paper" in named) == (against == "rank")
    assert named["zero-shot, plain metric"].marker.symbol == "circle-open"
    assert named["fine-tuned, activation metric"].marker.symbol == "square"


def test_one_seed_shows_the_interval(results: Results) -> None:
    single = tuple(one.model_copy(update={"runs": one.runs[:1]}) for one in results.variants)
    trace = st.plot_accuracy(results.model_copy(update={"variants": single})).data[0]
    interval = single[2].runs[0].test.interval
    assert trace.error_y.arrayminus[0] == pytest.approx(100 * (interval.value - interval.low))
    assert trace.error_y.array[0] == pytest.approx(100 * (interval.high - interval.value))


def test_published_figures_stand_beside(results: Results) -> None:
    named = {trace.name: trace for trace in st.plot_accuracy(results).data}
    assert tuple(named["published: a paper"].x) == (2, 8)
    assert tuple(named["published: a paper"].y) == pytest.approx((80, 90))
    assert named["published dense 97.00 %"].y[0] == pytest.approx(97)


def test_a_zoom_is_offered_where_the_scale_hides_the_top(results: Results) -> None:
    assert not st.plot_accuracy(results).layout.meta
    low = [
        one.model_copy(update={"runs": (run(0, 100 if one.stage == "zero-shot" else 970),)}) for one in results.variants
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
    assert tuple(loss.y) == pytest.approx((1, 1 / 2, 1 / 3))
    assert tuple(held_out.y) == pytest.approx((71, 72, 73))
    assert held_out.yaxis == "y2"


def test_curves_without_held_out_accuracies(results: Results) -> None:
    data = json.loads(results.model_dump_json())
    for epoch in (epoch for one in data["variants"] for run in one["runs"] for epoch in run["curve"]):
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


@pytest.fixture(scope="module")
def page_path(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return st.report(results, tmp_path_factory.mktemp("page") / "new" / "report.html")


def test_the_page_holds_everything(page_path: Path, results: Results) -> None:
    page = Page(page_path.read_text(encoding="utf-8"))
    assert {"accuracy", "study", "spectra", "layers", "curves", "words", "provenance"} <= page.ids()
    for expected in ("A small study", "It is the best.", "spectrim demo", "98.50 %", "rank 2, activation, zero-shot"):
        assert expected in page.words
    plots = [attributes for _, attributes in page.elements if attributes.get("class") == "plot"]
    assert len(plots) == 3
    assert all(one["role"] == "img" and len(one["aria-label"] or "") > 40 for one in plots)
    scopes = [attributes.get("scope") for tag, attributes in page.elements if tag == "th"]
    assert {"col", "row"} == set(scopes)
    regions = [attributes for tag, attributes in page.elements if attributes.get("class") == "scroll"]
    assert all(one["tabindex"] == "0" and one["role"] == "region" and one["aria-label"] for one in regions)


def test_the_page_loads_nothing(page_path: Path) -> None:
    page = Page(page_path.read_text(encoding="utf-8"))
    loading = {"src", "srcset", "data", "poster", "action", "formaction", "background", "ping"}
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "base", "img", "form"}
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
    assert "<img" not in re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 5
    assert page.words.count(HOSTILE) >= 6


def test_what_is_absent_vanishes(results: Results, tmp_path: Path) -> None:
    text = st.report(bare(results), tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"accuracy", "spectra", "layers", "curves"} & page.ids()
    assert "Plotly" not in text
    assert len(text) < 60_000
    assert "None" not in page.words
    assert "smaller" in page.words


@pytest.mark.parametrize("missing", ["spectra", "published", "chosen", "variants", "command", "provenance"])
def test_each_part_may_be_absent(results: Results, tmp_path: Path, missing: str) -> None:
    empty = {"chosen": None, "command": None, "provenance": {}}.get(missing, ())
    without = {missing: empty} | ({"chosen": None} if missing == "variants" else {})
    page = Page(st.report(results.model_copy(update=without), tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "A small study" in page.words
    assert ("No network was chosen" in page.words) == (missing == "chosen")


def test_without_a_choice_the_most_accurate_come_first(results: Results, tmp_path: Path) -> None:
    free = results.model_copy(update={"chosen": None})
    page = st.report(free, tmp_path / "r.html").read_text(encoding="utf-8")
    shown = re.findall(r"<h3>(.*?)</h3>", page)
    assert shown == ["rank 8, plain, fine-tuned", "rank 8, activation, fine-tuned", "rank 8, plain, zero-shot"]


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
            st.report(results, path)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------------------------- in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page with")


def opened(path: Path, profile: Path) -> tuple[str, str]:
    """The document after its scripts ran, and the console, in a browser that can resolve no name."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"),
            *(f"--user-data-dir={profile}", "--window-size=1440,1000", "--virtual-time-budget=10000"),
            *("--enable-logging=stderr", "--dump-dom", path.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@needs_browser
def test_plots_are_drawn_without_a_network_and_nothing_is_complained_of(results: Results, tmp_path: Path) -> None:
    document, console = opened(st.report(hostile(results), tmp_path / "report.html"), tmp_path / "profile")
    assert console == ""
    galleries = re.findall(r'<figure data-gallery="(\w+)".*?</figure>', document, flags=re.DOTALL)
    assert galleries == ["accuracy", "spectra", "curves"]
    for figure in re.findall(r"<figure data-gallery.*?</figure>", document, flags=re.DOTALL):
        drawn = re.sub(r"<script.*?</script>", "", figure, flags=re.DOTALL)
        assert 'class="main-svg"' in drawn
        assert "scatterlayer" in drawn
        assert drawn.count("js-line") >= 4
    assert html.escape(HOSTILE, quote=False) in re.findall(r"<title>(.*?)</title>", document)[0]
    assert "<img" not in re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
    assert f"{html.escape(HOSTILE, quote=False)}</text>" in document, "the legend shows the name literally"


@needs_browser
def test_the_page_is_no_wider_than_a_phone(results: Results, tmp_path: Path) -> None:
    frames = "".join(
        f'<iframe style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(page)}"></iframe>'
        for page in (
            st.report(one, tmp_path / "r.html").read_text(encoding="utf-8") for one in (results, hostile(results))
        )
        for width in (390, 1440)
    )
    measure = (
        "addEventListener('load', () => setTimeout(() => { document.title = "
        "[...document.querySelectorAll('iframe')].map(f => [f.clientWidth, "
        "f.contentDocument.documentElement.scrollWidth, f.contentDocument.querySelectorAll('.plot .main-svg').length]"
        ".join(' ')).join(',') }, 2000))"
    )
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!doctype html><meta charset=utf-8><script>{measure}</script>{frames}", encoding="utf-8")
    document, console = opened(outer, tmp_path / "profile")
    assert console == ""
    found = [tuple(map(int, one.split())) for one in re.findall(r"<title>(.*?)</title>", document)[0].split(",")]
    assert [width for width, _, _ in found] == [390, 1440] * 2
    for width, scrolled, drawn in found:
        assert scrolled <= width
        assert drawn >= 3


@pytest.mark.parametrize("metric", get_args(Metric))
def test_every_metric_can_be_shown(metric: Metric, results: Results, tmp_path: Path) -> None:
    one = st.LayerSpectrum(layer="0", kind="Linear", shape=(4, 4), metric=metric, values=(2.0, 1.0))
    variants = tuple(variant.model_copy(update={"metric": metric}) for variant in results.variants)
    page = st.report(results.model_copy(update={"spectra": (one,), "variants": variants}), tmp_path / "page.html")
    assert f"{metric} metric" in page.read_text(encoding="utf-8")
