"""The report of an evaluation, opened in headless Chromium as a user opens it: from disk."""

import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from evaluation.html_report import write_report
from evaluation.metrics import image_scores
from evaluation.results import ScoredPictures, Shown, evaluate_class
from evaluation.tables import with_mean

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
KINDS = np.array(["good"] * 4 + ["crack"] * 3 + ["<hole> & co"] * 2)


def result(name, seed):
    rng = np.random.default_rng(seed)
    labels = KINDS != "good"
    masks = np.zeros((len(KINDS), 24, 24), bool)
    masks[labels, 4:12, 6:14] = True
    maps = (rng.random(masks.shape) + 0.5 * masks).astype(np.float32)
    scores = image_scores(maps, (8, 8))
    found = evaluate_class(name, ScoredPictures(maps, scores, masks, np.ones(len(KINDS), bool), labels, KINDS))
    threshold = found.thresholds.image
    for i, kind in enumerate(KINDS):
        error = float((threshold - found.scores[i]) * (1 if labels[i] else -1))
        picture = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        truth = masks[i].astype(np.uint8) * 255 if i else None
        shown = (f"{name}/{i}.png", str(kind), int(labels[i]), float(found.scores[i]), error, picture, picture, truth)
        found.gallery.append(Shown(*shown))
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    results = [result("bolts", 0), result("nuts & washers", 1)]
    path = tmp_path_factory.mktemp("report") / "report.html"
    table = with_mean({found.name: found.metrics for found in results})
    write_report(path, "RealNet on <parts>", ["a note"], table, results)
    return path, results


def test_the_report_is_well_formed_and_needs_nothing_else(report):
    path, _ = report
    text = path.read_text(encoding="utf-8")
    opened, sources = [], []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in ("meta", "link", "img", "input", "br", "line", "rect", "polyline"):
                opened.append(tag)
            sources.extend(value for name, value in attributes if name in ("src", "href"))

        def handle_endtag(self, tag):
            if tag not in ("line", "rect", "polyline"):
                assert opened.pop() == tag

    Parser().feed(text)
    assert opened == []
    assert all(source.startswith("data:") for source in sources)
    assert "http" not in text
    assert "RealNet on &lt;parts&gt;" in text
    assert "&lt;hole&gt; &amp; co" in text


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
        page.select_option("#kind", "<hole> & co")
        assert shown.count() == 2
        assert page.inner_text("#count") == "2 of 18 pictures"
        page.select_option("#class", "")
        page.select_option("#kind", "")
        page.check("#wrong")
        wrong = sum(card.error > 0 for found in results for card in found.gallery)
        assert shown.count() == wrong
        page.uncheck("#wrong")
        # Worst errors first, over all classes.
        scores = [float(text) for text in page.locator("figcaption b").all_inner_texts()]
        cards = sorted((card for found in results for card in found.gallery), key=lambda card: -card.error)
        assert scores == pytest.approx([card.score for card in cards], abs=1e-4)
        # Nothing is wider than the screen.
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        browser.close()
    assert errors == []
    assert all(url.startswith(("file:", "data:")) for url in requests)
