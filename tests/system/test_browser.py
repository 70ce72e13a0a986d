"""The pages as a browser opens them: on a phone and on a desk, light and dark, on paper, and by axe-core's rules."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pretrain.datasets.dataset import array_dataset
from pretrain.shards.write import write_shards
from tests.page.browser import AXE, CHROMIUM, Browser, page_count

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian package chromium), or its path in CHROMIUM"),
    pytest.mark.skipif(not AXE.exists(), reason="needs axe-core (npm package axe-core), or axe.min.js's path in AXE"),
]

SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder that keeps them, and the PDFs
PHONE, DESK, PAPER = 360, 1400, 718  # CSS pixels; A4 between margins of 14 mm is 688

HOSTILE = (
    "<script>document.title = 'taken'</script>",
    '"><img src=http://127.0.0.1/x onerror=alert(1)>',
    "$x^2$ $\\frac{1$",
    "\x1b[31mred\x1b]0;title\x07",
    "abc\u202efed",
    "חתול",
    "قطة سوداء 12",
    "zero\u200bwidth\ufeff",
    "long" * 60,
    "👩\u200d💻\n\ttab \udce9 고양이",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module", params=["plain", "hostile"])
def pages(request, tmp_path_factory, tiny_config, run):
    """Every page of a small run on scikit-learn's digits, by name; the classes and folders may have hostile names."""
    hostile = request.param == "hostile"
    folder = tmp_path_factory.mktemp(request.param) / ('<b>$x$ "חתול" 12\u202e' if hostile else "runs")
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels.reshape(-1, 8, 8) * 15).astype(np.uint8)
    names = HOSTILE if hostile else [f"digit {number}" for number in range(10)]
    for split, part in (("train", slice(900)), ("test", slice(900, None))):
        write_shards(array_dataset("digits", split, pixels[part], labels[part], names), folder / split)
    train, test = str(folder / "train"), str(folder / "test")
    written: dict[str, Path] = {}

    def make(script, *words):
        done = run(script, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not set("\x1b\x07\u202e\u200b") & set(done.stdout + done.stderr)

    make("launch/shards.py", "stats", train, "--html", folder / "stats.html")
    written["stats"] = folder / "stats.html"

    config = tiny_config(
        folder / "run.json", data={"train": train, "eval": test, "audit": True}, train={"steps": 30, "eval_every": 10}
    )
    make("launch/pretrain.py", "--config", config, "--out", folder / "run")
    make("launch/report.py", folder / "run")
    written["run"] = folder / "run" / "report" / "run.html"

    (folder / "eval.json").write_text(json.dumps({"name": "<i>$x$", "data": {"eval": test, "workers": 1}}))
    trained = ("--init", folder / "run")
    make("launch/evaluate.py", "--config", folder / "eval.json", *trained, "--out", folder / "evaluation")
    written["evaluation"] = folder / "evaluation" / "evaluation" / "report.html"

    make("launch/visualize.py", *trained, "--images", test, "--out", folder / "inside")
    written["inside"] = folder / "inside" / "index.html"

    shots = {"shots": [1, 5], "features": ["cls", "untrained", "pixels"], "probes": ["ridge", "knn10", "logistic"]}
    data = {"support": train, "query": test, "workers": 1}
    (folder / "shots.json").write_text(json.dumps({"name": "$x$ <b>", "data": data, "fewshot": shots}))
    make("launch/fewshot.py", "--config", folder / "shots.json", *trained, "--out", folder / "fewshot")
    written["fewshot"] = folder / "fewshot" / "report" / "report.html"
    return written


@pytest.mark.parametrize("name", ["stats", "run", "evaluation", "inside", "fewshot"])
def test_a_page_in_a_browser(name, pages, browser, request):
    kept = Path(SCREENSHOTS) / request.node.callspec.params["pages"] if SCREENSHOTS else None
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
    page = pages[name]
    for width in (PHONE, DESK):
        for dark in (False, True):
            opened = browser.open(page, width=width, dark=dark)
            if kept:
                (kept / f"{name}-{width}{'-dark' * dark}.png").write_bytes(browser.screenshot())
            faults = browser.faults()
            print(f"{name}, {width} px{', dark' * dark}:", *(faults or ["no fault"]), sep="\n  ")
            assert opened.complaints == []
            assert [url for url in opened.requests if not url.startswith("data:image/")] == [page.as_uri()]
            assert opened.image_widths
            assert min(opened.image_widths) > 0
            assert opened.content_width <= opened.window_width == width
            assert [fault for fault in faults if fault.startswith(("serious", "critical"))] == []

    opened = browser.open(page, width=PAPER, media="print")
    assert opened.content_width <= PAPER
    browser.open(page, width=DESK, dark=True)
    assert browser.charts_on_paper() == {"light"}
    pdf = browser.pdf()
    assert page_count(pdf) > 0
    if kept:
        (kept / f"{name}.pdf").write_bytes(pdf)
