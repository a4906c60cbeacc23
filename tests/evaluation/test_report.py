"""The evaluation report, opened from disk in headless Chromium, as a user opens it."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from datasets.lists import Sample
from evaluation import plots
from evaluation.html_report import write_report
from evaluation.metrics import image_scores
from evaluation.results import draw_images, evaluate_class
from evaluation.score import ScoredImages
from evaluation.tables import with_mean
from utils.distributed import Run
from utils.signals import StopRequest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
TYPES = np.array(["good"] * 4 + ["crack"] * 3 + ["<hole> & co"] * 2)


def class_result(name, seed):
    rng = np.random.default_rng(seed)
    labels = TYPES != "good"
    samples = [Sample(f"{name}/test/{t}/{i}.png", int(t != "good"), name, "m.png") for i, t in enumerate(TYPES)]
    masks = np.zeros((len(TYPES), 24, 24), bool)
    masks[labels, 4:12, 6:14] = True
    maps = (rng.random(masks.shape) + 0.5 * masks).astype(np.float32)
    images = {i: rng.integers(0, 256, (24, 24, 3), dtype=np.uint8) for i in range(len(TYPES))}
    scored = ScoredImages(samples, maps, image_scores(maps, (8, 8)), masks, images)
    evaluated = evaluate_class(name, scored)
    run = Run(0, 1, torch.device("cpu"))
    draw_images(evaluated, scored, len(TYPES), None, run, StopRequest(run))
    evaluated.gallery[0] = replace(evaluated.gallery[0], truth=None)
    return evaluated


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    results = [class_result("bolts", 0), class_result("nuts & washers", 1)]
    path = tmp_path_factory.mktemp("report") / "report.html"
    table = with_mean({result.name: result.metrics for result in results})
    write_report(path, "RealNet on <parts>", ["a note"], table, results)
    return path, results


def test_the_report_is_well_formed_and_self_contained(report):
    path, _ = report
    text = path.read_text(encoding="utf-8")
    opened, sources = [], []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "link", "img", "input", "br", "line", "rect", "polyline", "circle"):
                opened.append(tag)
            sources.extend(value for name, value in attributes if name in ("src", "href"))

        def handle_endtag(self, tag):
            if tag not in ("line", "rect", "polyline", "circle"):
                assert opened.pop() == tag

    Parser().feed(text)
    assert opened == []
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in text
    assert "RealNet on &lt;parts&gt;" in text
    assert "&lt;hole&gt; &amp; co" in text


def test_a_threshold_above_all_scores_is_drawn_right_of_them(report, tmp_path):
    result = report[1][0]
    far = replace(result, thresholds=replace(result.thresholds, image=3 * float(result.scores.max())))
    write_report(tmp_path / "far.html", "far", [], {"bolts": result.metrics}, [far])
    text = (tmp_path / "far.html").read_text(encoding="utf-8")
    marker = float(re.search(r'<line x1="([\d.]+)"[^>]*class="marker"', text)[1])
    bars = [float(x) + float(width) for x, width in re.findall(r'<rect x="([\d.]+)"[^>]* width="([\d.]+)"', text)]
    assert bars
    assert max(bars) < (marker + plots.x_at(0)) / 2


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_filters_work_in_a_browser(report, size):
    playwright = pytest.importorskip("playwright.sync_api")
    path, results = report
    errors, requests = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        shown = page.locator("figure:visible")
        assert shown.count() == 18
        page.select_option("#class", "nuts & washers")
        assert shown.count() == 9
        assert page.locator("section:visible").count() == 1
        page.select_option("#defect", "<hole> & co")
        assert shown.count() == 2
        assert page.inner_text("#count") == "2 of 18 images"
        page.select_option("#class", "")
        page.select_option("#defect", "")
        page.check("#wrong")
        wrong = sum(card.error > 0 for result in results for card in result.gallery)
        assert shown.count() == wrong
        page.uncheck("#wrong")
        # Worst errors first, over all classes.
        scores = [float(text) for text in page.locator("figcaption b").all_inner_texts()]
        cards = sorted((card for result in results for card in result.gallery), key=lambda card: -card.error)
        assert scores == pytest.approx([card.score for card in cards], abs=1e-4)
        # Nothing is wider than the screen.
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        browser.close()
    assert errors == []
    assert all(url.startswith(("file:", "data:")) for url in requests)
