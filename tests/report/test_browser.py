"""The page in a browser: nothing is asked for, nothing complains, keys walk, it fits screens, and it can be read."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.long import long_except

sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs Chromium on the PATH")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
WIDTHS = (380, 1000, 1600)
PAGES = ("healthy", "diverged", "axes", "sweep", "sweep/1")
SOME = long_except(PAGES, "healthy", "sweep")  # of a run, of jobs

# The least contrast of a text with what lies behind it, in sRGB as WCAG 2 defines it, and the worst text.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const parse = (text) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour[3] > 0.99) return colour;
    }
    return [255, 255, 255, 1];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.textContent.trim() || !element.checkVisibility() || element.closest("script, style, title")) continue;
    const style = getComputedStyle(element), drawn = element instanceof SVGElement;
    const fore = light(parse(drawn ? style.fill : style.color)), back = light(behind(element));
    found.push([(Math.max(fore, back) + 0.05) / (Math.min(fore, back) + 0.05), drawn, node.textContent.trim()]);
  }
  return found.sort((a, b) => a[0] - b[0]).slice(0, 5);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield found
        found.close()


def look(browser: Any, path: Path, width: int = 1000, **options: Any) -> tuple[Any, list[str]]:
    """The page in a window, and what it complains about or asks for."""
    heard: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 800}, **options)
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda asked: heard.append(asked.url))
    page.goto((path / "report.html").as_uri())
    assert heard.pop(0) == (path / "report.html").as_uri()
    heard[:] = [one for one in heard if not one.startswith("data:")]
    return page, heard


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_asked_for_and_nothing_complains(browser: Any, runs: Path, name: str) -> None:
    page, heard = look(browser, runs / name)
    for key in ("Tab", "ArrowRight", "End", "Home"):
        page.keyboard.press(key)
    for option in range(page.locator("#walk-view option").count()):
        page.select_option("#walk-view", index=option)
        assert page.locator("#walk-table tbody tr").count() > 0
        assert page.locator("#walk-pictures svg").count() > 0
    for button in page.locator("button.copy").all():
        button.click()
        assert button.text_content() in ("Copied", "Selected", "Copy")
    assert heard == []
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", SOME)
def test_it_fits_every_screen(browser: Any, runs: Path, name: str, width: int) -> None:
    page, _ = look(browser, runs / name, width)
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0
    small = page.evaluate(
        "[...document.querySelectorAll('main :is(p, td, th, dd, dt, li, code, figcaption)')]"
        ".filter((one) => one.checkVisibility() && parseFloat(getComputedStyle(one).fontSize) < 13).length"
    )
    assert small == 0
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", SOME)
def test_every_text_can_be_told_from_its_ground(browser: Any, runs: Path, name: str, scheme: str) -> None:
    page, _ = look(browser, runs / name, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    worst = page.evaluate(CONTRAST)
    assert worst[0][0] >= 4.5, worst
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) < 60) == (scheme == "dark")
    cards = page.evaluate("[...document.querySelectorAll('.card')].map((one) => getComputedStyle(one).backgroundColor)")
    assert set(cards) == {"rgb(255, 255, 255)"}
    page.close()


def layer_shown(page: Any) -> str:
    return str(page.locator("#walk-place").text_content())


def test_keys_walk_through_layers_and_steps(browser: Any, runs: Path) -> None:
    page, heard = look(browser, runs / "healthy")
    assert layer_shown(page).startswith("Layer 1 of the stack")
    page.keyboard.press("ArrowRight")  # wherever one reads
    assert layer_shown(page).startswith("Layer 2 ")
    page.focus("#walk-layer")
    for key, layer in (("ArrowRight", 3), ("End", 12), ("ArrowRight", 12), ("ArrowLeft", 11), ("Home", 0)):
        page.keyboard.press(key)
        assert layer_shown(page).startswith(f"Layer {layer} "), key
    page.select_option("#walk-view", index=1)
    assert layer_shown(page).startswith("Layer 1, step 0 of the training")
    page.focus("#walk")
    page.keyboard.press("ArrowUp")
    assert "step 1 " in layer_shown(page)
    page.focus("#walk-step")
    page.keyboard.press("ArrowRight")
    assert "step 2 " in layer_shown(page) and page.get_attribute("#walk-step", "aria-valuetext") == "step 2"
    rows = page.locator("#walk-table tbody th").all_text_contents()
    assert {"weight", "gradient of the weight", "preactivation"} <= set(rows)
    assert page.locator("#walk-pictures rect").count() > 20  # histograms were recorded
    page.focus("#walk-view")
    before = layer_shown(page)
    page.keyboard.press("Shift+ArrowRight")
    assert layer_shown(page) == before and heard == []
    page.close()


def test_the_walk_shows_the_numbers_of_its_place(browser: Any, runs: Path) -> None:
    page, _ = look(browser, runs / "sweep/1")  # which dies: nothing is left of it in the last layer
    page.focus("#walk")
    page.keyboard.press("End")
    cells = page.locator("#walk-table tbody tr").first.locator("td").all_text_contents()
    heads = page.locator("#walk-table thead th").all_text_contents()[1:]
    shown = dict(zip(heads, cells, strict=True))
    assert shown["std"] == "0" and shown["share zero"] == "1"
    assert page.locator("#walk-pictures rect").count() == 0
    assert "histograms=true" in str(page.locator("#walk-note").text_content())
    page.close()


def test_every_figure_has_a_name_for_those_who_do_not_see(browser: Any, runs: Path) -> None:
    page, _ = look(browser, runs / "healthy")
    names = page.evaluate(
        "[...document.querySelectorAll('svg[role=img], img')].map((one) => one.getAttribute('alt')"
        " || one.getAttribute('aria-label')"
        " || document.getElementById(one.getAttribute('aria-labelledby')).textContent)"
    )
    assert len(names) > 6 and all(len(name) > 15 for name in names)
    outside = page.evaluate(
        "[...document.querySelectorAll('input, select')].filter((one) => !one.labels.length).length"
    )
    assert outside == 0
    page.close()


def test_it_is_whole_without_a_script_and_on_paper(browser: Any, runs: Path) -> None:
    page, heard = look(browser, runs / "healthy", java_script_enabled=False)
    assert not page.locator("#walk-controls").is_visible() and not page.locator("button.copy").first.is_visible()
    assert page.get_by_text("The first, the middle and the last layer").is_visible() and heard == []
    page.close()
    page, _ = look(browser, runs / "sweep", 700, color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible() and not page.locator("#walk-controls").is_visible()
    assert page.evaluate(CONTRAST)[0][0] >= 4.5
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
