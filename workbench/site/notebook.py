"""A notebook as the body of a page: nbconvert walks the cells, our template lays them out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from markupsafe import Markup
from nbconvert.exporters.templateexporter import TemplateExporter
from traitlets.config import Config

from workbench.site.outputs import Outputs
from workbench.site.prose import Heading, Prose

if TYPE_CHECKING:
    from pygments.formatter import Formatter
    from pygments.lexer import Lexer

TEMPLATES = Path(__file__).parent / "templates"
_REMOVED = frozenset({"remove-cell", "remove_cell", "injected-parameters", "hidden"})
_NO_INPUT = frozenset({"remove-input", "remove_input", "hide_input"})
_NO_OUTPUT = frozenset({"remove-output", "remove_output"})


@dataclass
class Content:
    """What a notebook contributes to its page."""

    title: str
    body: str
    headings: list[Heading]
    claims: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


class SiteExporter(TemplateExporter):
    """nbconvert's walk over cells with the site's template: no CDN, no widgets, no mermaid."""

    @property
    def default_config(self) -> Config:
        """The site's template and no preprocessors: cells come as they are stored."""
        return Config(
            {
                "TemplateExporter": {
                    "template_name": "workbench",
                    "extra_template_basedirs": [str(TEMPLATES)],
                },
                "TagRemovePreprocessor": {"enabled": False},
                "RegexRemovePreprocessor": {"enabled": False},
            }
        )

    def _template_name_default(self) -> str:
        return "workbench"

    def _file_extension_default(self) -> str:
        return ".html"


def content(
    file: Path,
    *,
    place: Callable[[dict[str, Any], str], str],
    resolve: Callable[[str], str | None],
    warn: Callable[[str], None],
) -> Content:
    """Convert a notebook.

    Args:
        file: the notebook, with its stored outputs.
        place: puts an explorer into the page, see :class:`~workbench.site.outputs.Outputs`.
        resolve: maps a link's address to the site's, or None to take the link away.
        warn: receives what could not be shown.
    """
    notebook = nbformat.reads(file.read_text(encoding="utf8"), as_version=4)
    _forget_widgets(notebook, warn)
    prose = Prose(str(file.parent), resolve, warn)
    outputs = Outputs(
        file.stem,
        place,
        prose.render,
        lambda tex: prose.mathematics(tex, display=True),
        resolve,
        warn,
    )

    def section() -> str:
        return prose.outline.headings[-1].text if prose.outline.headings else ""

    def shown(output: dict[str, Any]) -> Markup:
        outputs.section = section()
        return Markup(outputs.render(output))

    exporter = SiteExporter()
    exporter.register_filter(
        "prose",
        lambda cell: Markup(prose.render(cell["source"], cell.get("attachments"))),
    )
    exporter.register_filter("shown", shown)
    exporter.register_filter("code", lambda source: Markup(highlight(source)))
    notebook.cells = [cell for cell in notebook.cells if _kept(cell)]
    body, _ = exporter.from_notebook_node(
        notebook, resources={"no_input": _NO_INPUT, "no_output": _NO_OUTPUT}
    )
    headings = prose.outline.headings
    title = next((h.text for h in headings if h.level == 1), file.stem.replace("_", " "))
    return Content(title, body, headings, outputs.claims, outputs.files)


def highlight(source: str, language: str = "python") -> str:
    """Source code with its words in classes that the style sheet colours."""
    import pygments

    lexer, formatter = _pygments(language)
    return str(pygments.highlight(source.rstrip(), lexer, formatter))


@cache
def _pygments(language: str) -> tuple[Lexer, Formatter[str]]:
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    if language == "python":
        from ipython_pygments_lexers import IPython3Lexer

        return IPython3Lexer(), HtmlFormatter(cssclass="highlight")
    try:
        return get_lexer_by_name(language), HtmlFormatter(cssclass="highlight")
    except ClassNotFound:
        return get_lexer_by_name("text"), HtmlFormatter(cssclass="highlight")


def _kept(cell: dict[str, Any]) -> bool:
    tags = set(cell.get("metadata", {}).get("tags", []))
    has = re.search(r"\S", cell["source"]) or cell.get("outputs")
    return bool(has) and cell["cell_type"] != "raw" and not tags & _REMOVED


def _forget_widgets(notebook: nbformat.NotebookNode, warn: Callable[[str], None]) -> None:
    if notebook.metadata.pop("widgets", None):
        warn("the notebook stores widgets' state, which no page can use")
