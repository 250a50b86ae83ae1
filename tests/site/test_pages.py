"""The built site, read as a reader would: every page whole, nothing asked from outside."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

VOID = {"img", "link", "meta", "input", "br", "hr", "source", "wbr", "mspace", "area", "col"}


class Page(HTMLParser):
    """Elements of a page, with complaints about tags that do not match."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.problems: list[str] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf8"))
        self.problems += [f"{tag} is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes something else")

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="session")
def pages(built: Any) -> dict[str, Page]:
    return {name: Page(built.folder / name) for name in built.pages}


def test_there_is_a_page_for_each_notebook_and_each_table(built: Any) -> None:
    assert built.ok and built.explorers == 1
    assert {"index.html", "papers.html", "status.html", "disagreements.html"} <= set(built.pages)
    assert {"calibration.html", "losses.html"} <= set(built.pages)
    assert "convolution.html" not in built.pages  # it has no notebook


def test_tags_match_and_anchors_are_unique_on_every_page(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert not page.problems, (name, page.problems)
        ids = [a["id"] for _, a in page.elements if "id" in a]
        assert len(ids) == len(set(ids)), name
        assert len(page.all("h1")) == 1 and len(page.all("title")) == 1, name


def test_nothing_is_loaded_from_outside_and_no_script_is_inline(
    built: Any, pages: dict[str, Page]
) -> None:
    for name, page in pages.items():
        for tag, attributes in page.elements:
            for attribute in ("src", "srcset", "data", "poster", "action", "background"):
                assert not attributes.get(attribute, "").startswith(("http:", "https:", "//")), name
            if tag == "link":
                assert not attributes["href"].startswith(("http:", "https:", "//")), name
            assert not [a for a in attributes if a.startswith("on")], (name, tag, attributes)
        inline = [s for s in page.all("script") if "src" not in s]
        assert all(s.get("type") == "application/json" for s in inline), name
    outside = re.compile(
        r"""(?:src|href)\s*=\s*["'](?:https?:)?//|@import|\bimport\s*\(|url\(\s*["']?(?:https?:)?//"""
    )
    ours = [f for f in (built.folder / "assets").iterdir() if f.suffix in {".css", ".js", ".svg"}]
    assert len(ours) >= 6
    for file in ours:
        if file.name != "plotly.min.js":  # its map layers name servers; none is asked without a map
            assert not outside.search(file.read_text(encoding="utf8")), file.name


def test_every_link_and_file_named_on_a_page_exists(built: Any, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        for tag, attributes in page.elements:
            address = attributes.get("href" if tag in {"a", "link"} else "src", "")
            parts = urlsplit(address)
            if not address or parts.scheme in {"http", "https", "mailto", "data"}:
                continue
            target = (built.folder / name).parent / unquote(parts.path)
            file = target if parts.path else built.folder / name
            assert file.resolve().is_file(), (name, address)
            if parts.fragment:
                inside = pages[file.resolve().relative_to(built.folder).as_posix()]
                assert parts.fragment in {a.get("id") for _, a in inside.elements}, (name, address)


def test_no_page_names_the_folders_of_the_machine_it_was_built_on(built: Any) -> None:
    for name in built.pages:
        text = (built.folder / name).read_text(encoding="utf8")
        assert str(built.folder.parent) not in text and str(Path.home()) not in text, name


def test_a_section_has_its_papers_anchor_and_the_contents_lead_there(
    pages: dict[str, Page],
) -> None:
    page = pages["calibration.html"]
    headings = [a.get("id") for tag, a in page.elements if tag == "h2"]
    assert headings == ["temperature", "beta_cal"]
    contents = [a["href"] for a in page.all("a") if a.get("href", "").startswith("#")]
    assert {"#temperature", "#beta_cal"} <= set(contents)
    assert "1. Temperature scaling" in page.text
    # Two sections of one name have two anchors.
    assert [a.get("id") for t, a in pages["losses.html"].elements if t == "h2"] == [
        "focal-loss", "focal-loss-2",
    ]  # fmt: skip


def test_code_is_folded_and_cells_that_are_tagged_away_are_gone(
    built: Any, pages: dict[str, Page]
) -> None:
    page = pages["calibration.html"]
    assert all("open" not in a for a in page.all("details") if a.get("class") == "code")
    assert "hidden_check" not in page.text
    assert "show code" in page.text


def test_an_explorer_has_its_script_its_still_and_plotly(
    built: Any, pages: dict[str, Page]
) -> None:
    page = pages["calibration.html"]
    hosts = [a["data-explorer"] for _, a in page.elements if "data-explorer" in a]
    scripts = [a["src"] for a in page.all("script") if "src" in a]
    assert scripts[1:] == ["assets/plotly.min.js", "assets/explorer.js", f"explorers/{hosts[0]}.js"]
    # Pages without explorers do not load the 5 MB.
    assert [a["src"] for a in pages["losses.html"].all("script")] == ["assets/site.js"]


def test_every_picture_has_a_description_and_a_size(built: Any, pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        for picture in page.all("img"):
            assert "alt" in picture, name
    shown = [a for a in pages["calibration.html"].all("img") if a["src"].startswith("pictures/")]
    assert [a["alt"] for a in shown] == ["A power bends the line", 'ECE "falls" with T']
    assert (shown[1]["width"], shown[1]["height"]) == ("64", "48")


def test_what_needs_a_kernel_is_left_out_with_a_warning(built: Any, pages: dict[str, Page]) -> None:
    page = pages["losses.html"]
    assert "IntSlider" not in page.text and "alert(1)" not in page.text.replace(
        "<img src=x onerror=alert(1)>", ""
    )
    assert not [a for a in page.all("button") if "all-code" not in a.get("class", "")]
    assert "kept" in page.text
    said = "\n".join(built.warnings)
    for words in (
        "a live widget is left out", "a script is left out", "<button> in an output",
        "<script> in an output", "the attribute onclick", "a picture that lies elsewhere",
        "unknown command \\unknowncommand", "link to 'nowhere.ipynb'", "no description",
        "stores widgets' state",
    ):  # fmt: skip
        assert words in said, words


def test_mathematics_is_mathml_and_what_cannot_be_set_is_shown_as_source(
    pages: dict[str, Page],
) -> None:
    maths = pages["calibration.html"].all("math")
    assert maths[1] == {"display": "block", "alttext": r"T^\star=\arg\min_{T>0} L(T)"}
    assert r"\unknowncommand{x}" in pages["losses.html"].text


def test_a_folded_answer_keeps_its_text_inside(built: Any) -> None:
    html = (built.folder / "calibration.html").read_text(encoding="utf8")
    answer = html[html.index("<summary>Question</summary>") :].split("</details>")[0]
    assert "When" in answer and "<math" in answer and "After" not in answer


def test_linked_modules_are_shown_as_source(pages: dict[str, Page]) -> None:
    page = pages["source/workbench.calibration.temperature.py.html"]
    assert "return z / t" in page.text and "# <T>" in page.text
    assert "../assets/site.css" in [a["href"] for a in page.all("link")]


def test_strings_from_tables_are_escaped_everywhere(built: Any, pages: dict[str, Page]) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    for name in ("index.html", "papers.html", "losses.html", "disagreements.html"):
        assert all(a.get("src") != "x" for a in pages[name].all("img")), name
    assert hostile in pages["papers.html"].text and hostile in pages["disagreements.html"].text
    data = re.search(
        r'id="papers-data">(.*?)</script>',
        (built.folder / "papers.html").read_text(encoding="utf8"),
        re.DOTALL,
    )
    assert data is not None and "<" not in data[1]
    assert json.loads(data[1])[3]["text"].startswith(hostile)


def test_the_papers_page_lists_all_with_verdict_status_and_links(pages: dict[str, Page]) -> None:
    page = pages["papers.html"]
    rows = [a["id"] for a in page.all("tr") if "id" in a]
    assert rows == ["temperature", "beta_cal", "focal", "dice", "gabor"]
    hrefs = [a["href"] for a in page.all("a")]
    assert "calibration.html#temperature" in hrefs and "https://arxiv.org/abs/1706.04599" in hrefs
    assert "holds" in page.text and "[0.3,\u00a00.5]" in page.text


def test_the_entrance_counts_verdicts_and_maps_the_families(pages: dict[str, Page]) -> None:
    page = pages["index.html"]
    assert "1 of 5 papers have been judged" in page.text
    squares = [(t, a["class"]) for t, a in page.elements if "square " in a.get("class", "")]
    assert len(squares) == 5
    # The judged paper's square is a link in its verdict's colour; one without a section is not.
    assert squares[0] == ("a", "square holds") and squares[4][0] == "i"


def test_the_status_page_says_what_left_the_recorded_interval(pages: dict[str, Page]) -> None:
    text = " ".join(pages["status.html"].text.split())
    assert "2026-11-01 scale laptop, cpu" in text
    assert "laptop on cpu: 312 s, 900 MB" in text
    assert "effect 0.04 left the recorded interval 0.3 to 0.5" in text
    assert "numpy 2.4.6" in text


def test_families_lead_to_the_one_before_and_the_one_after(pages: dict[str, Page]) -> None:
    assert "Next family" in pages["calibration.html"].text
    assert "Previous family" not in pages["calibration.html"].text
    assert "Previous family" in pages["losses.html"].text
