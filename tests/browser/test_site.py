"""The built site in a browser, opened from the file system as a reader would."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbconvert")
pytest.importorskip("plotly")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The report of a small site."""
    from workbench.lab import ledger
    from workbench.site import build

    file = Path(__file__).parents[1] / "site" / "small.py"
    spec = importlib.util.spec_from_file_location("small", file)
    assert spec is not None and spec.loader is not None
    small = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(small)
    folder = small.home(tmp_path_factory.mktemp("browser") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(folder))
        ledger.record([small.claim()])
        report = build(folder / "site")
    yield report


@pytest.fixture
def inside(page: Any, site: Any) -> Any:
    """A page that also notes requests for files outside the site."""
    home = site.folder.as_uri() + "/"

    def asked(request: Any) -> None:
        if request.url.startswith("file:") and not request.url.startswith(home):
            page.problems.append(f"left the folder: {request.url}")

    page.on("request", asked)
    page.on("requestfailed", lambda r: page.problems.append(f"failed: {r.url}"))
    return page


def open_page(page: Any, site: Any, name: str) -> None:
    page.goto((site.folder / name).as_uri())


def see_everything(page: Any) -> None:
    """Scroll to the end, so that everything that waits to be seen is drawn."""
    page.evaluate("""async () => {
        for (let y = 0; y < document.body.scrollHeight; y += 400) {
            window.scrollTo(0, y);
            await new Promise(resolve => setTimeout(resolve, 20));
        }
    }""")


@pytest.mark.parametrize("width", [1366, 900, 390])
def test_no_page_complains_asks_the_network_or_overflows(
    inside: Any, site: Any, width: int
) -> None:
    inside.set_viewport_size({"width": width, "height": 900})
    for name in site.pages:
        open_page(inside, site, name)
        see_everything(inside)
        spill = inside.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert spill <= 0, f"{name} is {spill} px wider than {width}"
    assert inside.problems == []


def test_a_slider_of_an_exported_explorer_moves_the_figure(inside: Any, site: Any) -> None:
    open_page(inside, site, "calibration.html")
    host = inside.locator("[data-explorer]")
    host.scroll_into_view_if_needed()
    host.locator(".js-plotly-plot").wait_for()
    assert host.locator("img").count() == 0  # the still has made room

    def drawn() -> list[float]:
        found: list[float] = inside.evaluate(
            "Array.from(document.querySelector('.js-plotly-plot').data[0].y)"
        )
        return found

    before, said = drawn(), host.inner_text()
    assert before[10] == pytest.approx(0.5)
    box = host.locator("input[type=range]").bounding_box()
    middle = box["y"] + box["height"] / 2
    inside.mouse.move(box["x"] + box["width"] * 0.17, middle)
    inside.mouse.down()
    inside.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=5)
    inside.mouse.up()
    inside.wait_for_function(
        "document.querySelector('.js-plotly-plot').data[0].y[10] < 0.3", timeout=5000
    )
    assert drawn()[0] == before[0] and drawn()[-1] == before[-1]  # the ends of a power stay
    assert host.inner_text() != said  # the number beside it moved too
    assert inside.problems == []


def test_typing_in_the_search_leaves_the_papers_that_match(inside: Any, site: Any) -> None:
    open_page(inside, site, "papers.html")
    rows = inside.locator("table.papers tbody tr:visible")
    assert rows.count() == 5
    inside.fill("#query", "calib one")
    assert rows.count() == 1 and rows.first.get_attribute("id") == "temperature"
    assert inside.inner_text("#found") == "1"
    inside.fill("#query", "no such paper")
    assert rows.count() == 0 and inside.is_visible("#nothing")
    inside.click("#clear")
    assert rows.count() == 5
    inside.select_option("#verdict", "holds")
    assert rows.count() == 1
    inside.select_option("#family", "losses")
    assert rows.count() == 0
    assert inside.problems == []


def test_a_search_can_be_linked_to(inside: Any, site: Any) -> None:
    inside.goto((site.folder / "papers.html").as_uri() + "?q=focal")
    assert inside.locator("table.papers tbody tr:visible").count() == 1


def test_code_opens_cell_by_cell_and_all_at_once(inside: Any, site: Any) -> None:
    open_page(inside, site, "calibration.html")
    shown = inside.locator("details.code .highlight:visible")
    assert shown.count() == 0
    inside.locator("details.code summary").first.click()
    assert shown.count() == 1
    inside.click(".all-code")
    assert shown.count() == inside.locator("details.code").count() > 1
    inside.click(".all-code")
    assert shown.count() == 0


def test_the_contents_follow_the_reader_and_fold_on_a_phone(inside: Any, site: Any) -> None:
    open_page(inside, site, "calibration.html")
    inside.click(".contents a[href='#beta_cal']")
    inside.wait_for_selector(".contents a.current[href='#beta_cal']")
    assert inside.evaluate("location.hash") == "#beta_cal"
    inside.set_viewport_size({"width": 390, "height": 844})
    inside.wait_for_function("!document.querySelector('.contents').open")


def test_mathematics_is_drawn_by_the_browser_itself(inside: Any, site: Any) -> None:
    open_page(inside, site, "calibration.html")
    block = inside.locator("math[display=block]").first
    limit = block.locator("munder > *").nth(1).bounding_box()
    word = block.locator("munder > *").nth(0).bounding_box()
    assert limit["y"] > word["y"] + word["height"] / 2  # T > 0 stands below "min"
    centre = limit["x"] + limit["width"] / 2
    assert word["x"] <= centre <= word["x"] + word["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(inside: Any, site: Any, scheme: str) -> None:
    """Contrast of running text, quiet text and links is at least 4.5 to 1 (WCAG AA)."""
    inside.emulate_media(color_scheme=scheme)
    open_page(inside, site, "papers.html")
    contrast = """selector => {
        const light = css => {
            const [r, g, b] = css.match(/[\\d.]+/g).slice(0, 3).map(v => {
                v /= 255;
                return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
            });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const element = document.querySelector(selector);
        const own = getComputedStyle(element).backgroundColor;
        const back = /, 0\\)$/.test(own) ? getComputedStyle(document.body).backgroundColor : own;
        const two = [light(getComputedStyle(element).color), light(back)].sort();
        return (Math.max(...two) + 0.05) / (Math.min(...two) + 0.05);
    }"""
    for selector in ("body", ".summary", "td a", ".badge", ".found"):
        assert inside.evaluate(contrast, selector) >= 4.5, selector


class _Strict(http.server.SimpleHTTPRequestHandler):
    """Serves the site under a policy that allows only its own script files."""

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", "script-src 'self'; object-src 'none'")
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_pages_work_under_a_policy_without_inline_scripts(page: Any, site: Any) -> None:
    handler = functools.partial(_Strict, directory=str(site.folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        page.goto(f"{address}/calibration.html")
        see_everything(page)
        page.locator(".js-plotly-plot").wait_for()
        page.goto(f"{address}/papers.html")
        page.fill("#query", "gabor")
        assert page.locator("table.papers tbody tr:visible").count() == 1
        assert page.problems == []
        server.shutdown()


def test_without_scripts_a_page_still_shows_everything(browser: Any, site: Any) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((site.folder / "calibration.html").as_uri())
    still = page.locator("[data-explorer] img")
    assert still.is_visible() and still.get_attribute("alt") == "A power bends the line"
    page.goto((site.folder / "papers.html").as_uri())
    assert page.locator("table.papers tbody tr:visible").count() == 5
    assert not page.is_visible("form.filters")  # controls that would be dead are not shown
    context.close()
