"""Reports in a real browser: each kind of them opened in headless Chromium, looked at, and used by keyboard."""

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import spectrim as st
from spectrim.models import mini_resnet, mlp
from spectrim.recipes.convolutional import MEANING, spectral_plan
from spectrim.recipes.images import Images, load_images
from spectrim.recipes.results import changes_of
from spectrim.reporting.results import PublishedPoint, Results, Variant, spectra_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser to drive")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed to open reports with")

PATIENCE_MS = 240_000
"""For a busy machine; nothing here is judged by its time."""


# -------------------------------------------------------------------------------------------- one report of each kind


@dataclass
class Workshop:
    """A dense network, its compressed ones with their accuracies and costs, and what the results need besides."""

    dense: nn.Module
    images: Images
    networks: dict[str, nn.Module] = field(default_factory=dict)
    variants: list[Variant] = field(default_factory=list)

    @classmethod
    def of(cls, dense: nn.Module, images: Images) -> "Workshop":
        """Train the network a little: enough for answers that compression changes."""
        done = st.finetune(dense, images.train.batches(100), epochs=2, lr=3e-3, frozen_norms=False)
        return cls(done.model, images)

    @property
    def example(self) -> torch.Tensor:
        return self.images.test.example()

    def add(self, title: str, small: st.Compressed, **how: object) -> None:
        """The network as it comes out, and after one epoch on a few images."""
        tuned = st.finetune(
            small.model,
            self.images.train.some(200, seed=0).batches(50),
            epochs=1,
            lr=1e-3,
            held_out=self.images.held_out.batches(),
        )
        first, *others = self.costs(small.model, reference=self.dense)
        for stage, model, curve in (("zero-shot", small.model, ()), ("fine-tuned", tuned.model, tuned.history)):
            name = f"{title}, {stage}"
            self.networks[name] = model
            run = self.run(model, curve)
            self.variants.append(
                Variant(
                    name=name,
                    stage=stage,
                    measurement=first,
                    in_runtimes=tuple(others),
                    plan=small.plan,
                    runs=(run,),
                    **how,
                )
            )

    def costs(self, model: nn.Module, *, reference: nn.Module | None = None) -> list[st.Measurement]:
        timed = partial(st.measure, model, self.example, reference=reference, rounds=5)
        return [timed(runtime=runtime) for runtime in ("torch", "channels_last")]

    def run(self, model: nn.Module, curve: tuple[st.Epoch, ...] = ()) -> st.Run:
        return st.Run(
            seed=0,
            test=st.accuracy(model, self.images.test.batches()),
            held_out=st.accuracy(model, self.images.held_out.batches()),
            curve=tuple(curve),
        )

    def results(self, title: str, **more: object) -> Results:
        """The last network is the chosen one."""
        first, *others = self.costs(self.dense)
        chosen = self.variants[-1].name
        return Results(
            title=title,
            summary="A small network, compressed and measured for the tests.",
            dense=Variant(
                name="dense",
                stage="dense",
                measurement=first,
                in_runtimes=tuple(others),
                runs=(self.run(self.dense),),
            ),
            variants=tuple(self.variants),
            chosen=chosen,
            chosen_because="It is the last one.",
            changes=changes_of(chosen, {0: (self.dense, self.networks[chosen])}, self.images),
            command="pytest tests/test_report_browser.py",
            provenance={"data": self.images.source},
            **more,
        )


def digits() -> Images:
    return load_images("digits", held_out=237)


def of_mlp() -> Results:
    """Ranks in two metrics, published ranks beside them."""
    torch.manual_seed(0)
    images = digits()
    flat = Workshop.of(mlp(64, 10, width=64, hidden=2), images)
    calibration = st.calibrate(flat.dense, [batch for batch, _ in images.train.batches(300)])
    analysis = st.analyze(flat.dense, flat.example, calibration=calibration, keep_last=True)
    for metric in ("plain", "activation"):
        for rank in (16, 4):
            plan = st.plan(analysis, st.Rank(rank), metric=metric)
            small = st.compress(flat.dense, plan, example_inputs=flat.example, analysis=analysis)
            flat.add(f"rank {rank}, {metric}", small, rule=plan.rule, metric=metric)
    return flat.results(
        "Digits by a fully connected network",
        spectra=spectra_of(analysis),
        published=(st.Published(source="a paper", accuracy=((None, 0.97), (16, 0.95), (4, 0.8))),),
    )


def of_mini_resnet() -> Results:
    """Energies, budgets and thresholds, each before and after fine-tuning, with a published point."""
    torch.manual_seed(0)
    images = digits()
    mini = Workshop.of(mini_resnet(10, 1, width=8, hidden=32), images)
    analysis = st.analyze(mini.dense, mini.example)
    common = {"example_inputs": mini.example, "analysis": analysis}
    for rule in (st.Energy(0.75), st.Energy(0.9)):
        plan = st.plan(analysis, rule, forms=("channel",))
        mini.add(f"{100 * rule.energy:g} % energy", st.compress(mini.dense, plan, **common), rule=rule, metric="plain")
    for threshold in ("gap", "hard"):
        plan = spectral_plan(analysis, threshold)
        mini.add(MEANING[threshold], st.compress(mini.dense, plan, **common), metric="plain")
    for share in (0.5, 0.3):
        rule = st.Budget(params=share)
        small = st.compress(mini.dense, st.plan(analysis, rule), **common)
        mini.add(f"budget, {100 * share:g} % of the parameters", small, rule=rule, metric="plain")
    point = PublishedPoint(name="75 % energy, fine-tuned", accuracy=0.9785, params_ratio=0.075, macs_ratio=0.2)
    return mini.results(
        "Digits by a mini-ResNet",
        spectra=spectra_of(analysis),
        published=(st.Published(source="the published study", accuracy=((None, 0.971),), points=(point,)),),
    )


class Coloured(nn.Module):
    """Two convolutions and a classifier on images in colour."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


def of_classifier() -> Results:
    """The last layer alone, then the whole network; two layers' spectra with their explained variance."""
    torch.manual_seed(0)
    grey = digits()
    tint = torch.tensor([1.0, 0.6, -0.8])[:, None, None]
    parts = {name: getattr(grey, name) for name in ("train", "held_out", "test")}
    coloured = {name: type(part)(part.images * tint, part.labels) for name, part in parts.items()}
    images = Images(
        **coloured,
        names=tuple(f"number <{name}>" for name in grey.names),
        source=grey.source,
        checksums=grey.checksums,
        mean=torch.full((3, 1, 1), 110.0),
        deviation=torch.full((3, 1, 1), 60.0),
    )
    work = Workshop.of(Coloured(), images)
    for rank in (5, 2):
        small = st.compress(work.dense, st.Rank(rank), example_inputs=work.example, include=("fc",))
        work.add(f"classifier at rank {rank}", small, rule=st.Rank(rank), metric="plain")
    rule = st.Budget(macs=0.5)
    small = st.compress(work.dense, rule, example_inputs=work.example)
    work.add("whole network, 50 % of the MACs", small, rule=rule, metric="plain")
    analysis = st.analyze(work.dense, work.example, include=("conv2", "fc"))
    return work.results("Digits in colour", spectra=spectra_of(analysis, cumulative=True))


def of_sixty_layers() -> Results:
    """As the benchmark makes them."""
    path = Path(__file__).parents[2] / "benchmarks" / "report_page.py"
    spec = importlib.util.spec_from_file_location("report_page", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.large(60)


KINDS: dict[str, Callable[[], Results]] = {
    "mlp": of_mlp,
    "mini-resnet": of_mini_resnet,
    "classifier": of_classifier,
    "sixty-layers": of_sixty_layers,
}


# ------------------------------------------------------------------------------------------------------- the browser


@dataclass(frozen=True)
class Opened:
    """A report in a tab, what its scripts complained of, and what it asked the network for."""

    kind: str
    path: Path
    results: Results
    tab: "playwright.Page"
    shots: Path
    said: list[str]
    asked: list[str]

    def shoot(self, name: str) -> None:
        """Keep a picture of the whole page."""
        self.tab.screenshot(path=self.shots / f"{self.kind}-{name}.png", full_page=True)

    def wide(self, width: int) -> None:
        """Make the window so many pixels wide, and wait until the figures fit it."""
        self.tab.set_viewport_size({"width": width, "height": 900})
        self.tab.wait_for_function(
            "() => [...document.querySelectorAll('.plot .main-svg')]"
            ".every(one => one.getBoundingClientRect().right <= innerWidth)"
        )


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], timeout=PATIENCE_MS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pictures are kept: SPECTRIM_TEST_ARTEFACTS, or the temporary folder of this run."""
    named = os.environ.get("SPECTRIM_TEST_ARTEFACTS")
    if not named:
        return tmp_path_factory.mktemp("test-artefacts")
    Path(named).mkdir(parents=True, exist_ok=True)
    return Path(named)


@pytest.fixture(scope="module", params=KINDS)
def opened(
    request: pytest.FixtureRequest, browser: "playwright.Browser", shots: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    """One tab a kind; every test leaves it as it was: 1440 pixels wide, light, on the screen."""
    results = KINDS[request.param]()
    path = st.report(results, tmp_path_factory.mktemp("report") / "report.html")
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE_MS)
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_function("document.querySelectorAll('[data-gallery] .plot .trace').length > 0")
    yield Opened(request.param, path, results, tab, shots, said, asked)
    context.close()


DRAWN = """() => Object.fromEntries([...document.querySelectorAll("[data-gallery]")].map(one =>
    [one.dataset.gallery, [...one.querySelectorAll(".plot .trace path")].filter(path => path.getAttribute("d")).length]
))"""


def test_every_figure_is_drawn_and_nothing_is_asked_for_or_complained_of(opened: Opened) -> None:
    drawn = opened.tab.evaluate(DRAWN)
    assert set(drawn) == {"accuracy", "classes", "spectra", "curves"}
    assert all(paths >= 2 for paths in drawn.values()), drawn
    assert opened.tab.locator("img").count() == len(opened.results.changes.flipped) > 0
    opened.tab.evaluate("document.querySelectorAll('img').forEach(one => one.loading = 'eager')")
    opened.tab.wait_for_function("[...document.querySelectorAll('img')].every(one => one.complete)")
    assert opened.tab.evaluate("[...document.querySelectorAll('img')].every(one => one.naturalWidth >= 8 && one.alt)")
    opened.shoot("1440-light")
    assert [url for url in opened.asked if not url.startswith("data:")] == [opened.path.as_uri()]
    assert opened.said == []


def test_galleries_are_used_by_keyboard(opened: Opened) -> None:
    """The arrow keys take every figure of every gallery in turn, each says something else, and all are drawn."""
    tab = opened.tab
    for gallery in tab.locator("[data-gallery]").all():
        figures = gallery.locator("option, input[type=radio]").count()
        if not figures:
            continue
        control = gallery.locator("select, input[type=radio]").first
        control.focus()
        titles = set()
        for at in range(min(figures, 6)):
            if at:
                tab.keyboard.press("ArrowDown")
            marked = gallery.locator("select").count() or gallery.locator("input[type=radio]:checked").count()
            assert marked == 1
            assert gallery.locator(".plot .trace path").count() > 0
            said = gallery.locator("figcaption").inner_text()
            assert gallery.locator(".plot").get_attribute("aria-label") == said
            titles.add((said, gallery.locator(".xtitle").first.text_content()))
        assert len(titles) == min(figures, 6)
    names = "[...document.querySelectorAll('a, select, input, summary, [tabindex=\"0\"]')]"
    assert tab.evaluate(f"{names}.every(one => one.tabIndex === 0)")
    assert opened.said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_layout_holds_and_all_text_can_be_read(opened: Opened, scheme: str) -> None:
    tab = opened.tab
    try:
        tab.emulate_media(color_scheme=scheme)
        for width in (390, 1440):
            opened.wide(width)
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            if width == 390:
                opened.shoot(f"{width}-{scheme}")
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 64) == (scheme == "dark")
        assert tab.evaluate(PALE) == []
    finally:
        tab.emulate_media(color_scheme="light")
        opened.wide(1440)
    assert opened.said == []


PALE = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = parts(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = new Set();
  const texts = "h1, h2, h3, p, a, li span, th, td, dt, dd, summary, label, figcaption, .main-svg text";
  for (const one of document.querySelectorAll(texts)) {
    const shown = one.checkVisibility() && one.textContent.trim() && !one.closest(".hoverlayer");
    if (!shown) continue;
    const style = getComputedStyle(one);
    const own = light(parts(one.closest("svg") ? style.fill : style.color));
    const [a, b] = [own, light(behind(one))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) found.add(`${one.tagName} ${one.textContent.trim().slice(0, 30)}`);
  }
  return [...found];
}"""
"""Visible texts with less than 4.5 : 1 between them and what is behind them (WCAG 2.2, 1.4.3)."""


def test_it_prints(opened: Opened) -> None:
    tab = opened.tab
    try:
        tab.emulate_media(media="print")
        hidden = "[...document.querySelectorAll('nav, .choose, .zoom')].every(one => !one.checkVisibility())"
        assert tab.evaluate(hidden)
        paper = tab.pdf(format="A4", path=opened.shots / f"{opened.kind}.pdf")
        pages = len(re.findall(rb"/Type\s*/Page\b", paper))
        assert 3 <= pages <= 40
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    finally:
        tab.emulate_media(media="screen")
        opened.wide(1440)
    assert opened.said == []


def test_sixty_layers_stay_small(opened: Opened) -> None:
    assert opened.path.stat().st_size < 8e6
    if opened.kind == "sixty-layers":
        assert opened.tab.locator("#spectra option").count() == 60
        assert opened.tab.locator("#layers details[open] tbody tr").count() == 60
