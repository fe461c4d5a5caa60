"""The page as people see it, in a real Chromium: on a phone, in the dark, printed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, chromium
from fake_comparison import SUPPORT, write_comparison
from PIL import Image

from dmoe.report.page import build

pytestmark = pytest.mark.skipif(chromium() is None, reason="there is no Chromium here: apt-get install chromium")

WHITE, BLACK = 250, 40

TABLE = """[...document.querySelectorAll('#methods tbody tr')].map(
    row => [row.querySelector('th').firstChild.textContent, ...[...row.querySelectorAll('td')].map(cell => cell.textContent)])"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_comparison(tmp_path_factory.mktemp("browser") / "comparison")
    (folder / "report.html").write_text(build(folder), encoding="utf-8")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def brightness(picture: Path) -> float:
    """Of the upper left corner, where there is paper only."""
    return float(np.asarray(Image.open(picture).convert("L"))[:8, :8].mean())


def test_nothing_is_told_to_the_console(browser: Browser, page: Path) -> None:
    browser.told.clear()
    browser.open(page)
    assert browser.evaluate("document.title") == "Meta-DMoE on digits"
    assert not browser.told


def test_a_fault_would_be_told(browser: Browser, page: Path, tmp_path: Path) -> None:
    """So that the silence above means something: a script, which the page's own policy forbids, and a picture from elsewhere."""
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</body>", "<script>1</script><img src='file:///nowhere.png'></body>"))
    browser.told.clear()
    browser.open(copy)
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    assert len(browser.told) >= 2
    assert all("Content Security Policy" in told for told in browser.told)


def test_every_picture_is_there(browser: Browser, page: Path) -> None:
    browser.open(page)
    sizes = browser.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.naturalHeight])))")
    assert sizes == [[14, 14]] * 48
    charts = browser.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].map(c => c.getBoundingClientRect()).map(b => [b.width, b.height])"
    )
    assert len(charts) == 7
    assert all(width > 100 and height > 100 for width, height in charts)


def test_the_table_on_the_screen_is_that_of_the_rows(browser: Browser, page: Path) -> None:
    rows = [json.loads(line) for line in (page.parent / "results.jsonl").read_text().splitlines()]
    browser.open(page)
    shown: list[list[Any]] = browser.evaluate(TABLE)
    main = {"kind": "test", "protocol": "per domain", "support_size": SUPPORT, "score_support": True, "predict": "after"}
    kept = [row for row in rows if all(row.get(key) == value for key, value in main.items())]
    assert {row[0] for row in shown} == {row["method"] for row in kept}
    for method, mean, worst, *_ in shown:
        for cell, key in ((mean, "mean"), (worst, "worst")):
            values = [100 * row[key] for row in kept if row["method"] == method]
            assert [float(part) for part in cell.split(" ± ")] == pytest.approx(
                [np.mean(values), np.std(values, ddof=1)], abs=0.051
            )


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_only_tables_scroll_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    beyond = f"""[...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll, pre, svg')
        && one.getBoundingClientRect().right > {width} + 0.5).map(one => one.outerHTML.slice(0, 100))"""
    assert browser.evaluate(beyond) == []
    if width == 360:
        scrolls = (
            "(t => [getComputedStyle(t).overflowX, t.scrollWidth > t.clientWidth])(document.querySelector('#methods .scroll'))"
        )
        assert browser.evaluate(scrolls) == ["auto", True]


def test_names_of_methods_stay_in_sight_while_a_table_scrolls(browser: Browser, page: Path) -> None:
    browser.open(page, width=360)
    left = "document.querySelector('#methods tbody th').getBoundingClientRect().left"
    before = browser.evaluate(left)
    browser.evaluate("document.querySelector('#methods .scroll').scrollLeft = 200")
    assert browser.evaluate(left) == before


def test_text_of_figures_can_be_read_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, width=360)
    heights = browser.evaluate("[...document.querySelectorAll('svg[role=img] text')].map(t => t.getBoundingClientRect().height)")
    assert min(heights) > 9


def test_figures_keep_their_text_inside(browser: Browser, page: Path) -> None:
    for width in (360, 1280):
        browser.open(page, width=width)
        outside = """[...document.querySelectorAll('svg[role=img] text')].filter(text => {
            const a = text.getBoundingClientRect(), b = text.closest('svg').getBoundingClientRect();
            return a.left < b.left - 3 || a.right > b.right + 3 || a.top < b.top - 3 || a.bottom > b.bottom + 3;
        }).map(text => text.textContent)"""
        assert browser.evaluate(outside) == []


def test_it_follows_the_reader_into_the_dark(browser: Browser, page: Path, tmp_path: Path) -> None:
    found = {}
    for dark in (False, True):
        browser.open(page, dark=dark)
        browser.screenshot(tmp_path / "picture.png")
        found[dark] = brightness(tmp_path / "picture.png")
    assert found[False] > WHITE
    assert found[True] < BLACK


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_paper(browser: Browser, page: Path, dark: bool) -> None:
    """Contrast of at least 4.5, as WCAG 2.1 (1.4.3) asks for."""
    browser.open(page, dark=dark)
    contrasts = browser.evaluate(
        """(() => {
        const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const paper = light(getComputedStyle(document.body).backgroundColor);
        return ['p', 'a', 'small', 'thead th', 'td', 'summary', '.right', '.wrong', 'footer'].map(name => {
            const ink = light(getComputedStyle(document.querySelector(name)).color);
            return [name, (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05)]; });
        })()"""
    )
    assert [name for name, contrast in contrasts if contrast < 4.5] == []


def test_it_prints_on_white_with_all_tables_open(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, dark=True)
    browser.print(tmp_path / "page.pdf")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") <= 20
