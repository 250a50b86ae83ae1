"""Markdown cells as HTML: mathematics as MathML, headings with the sections' own anchors."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape, unescape
from typing import Any

from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from workbench.site.tex import TexError, convert

_ANCHOR_BEFORE = re.compile(
    r'^[ \t]*<a id="([\w-]+)">\s*</a>[ \t]*\n+(#{1,6} [^\n]*)', re.MULTILINE
)
_ANCHOR_IN = re.compile(r'\s*<a id="([\w-]+)">\s*</a>\s*')
_LINK = re.compile(r"""(<a\s(?:[^>]*?\s)?)href=["']([^"']*)["']""", re.IGNORECASE)
_IMAGE = re.compile(r"""(<img\s(?:[^>]*?\s)?)src=["']([^"']*)["']""", re.IGNORECASE)
_SCRIPT = re.compile(r"<script\b.*?(?:</script>|\Z)|</script>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[^>]+>")


@dataclass
class Heading:
    """An entry of a page's table of contents."""

    level: int
    anchor: str
    html: str

    @property
    def text(self) -> str:
        """The heading without markup."""
        return unescape(_TAG.sub("", self.html))


@dataclass
class Outline:
    """Headings of a page so far; keeps anchors unique."""

    headings: list[Heading] = field(default_factory=list)
    taken: set[str] = field(default_factory=set)

    def add(self, level: int, html: str, anchor: str = "") -> Heading:
        """Enter a heading; without an anchor of its own it gets one made of its words."""
        words = re.findall(r"\w+", unescape(_TAG.sub("", html)).lower())
        wanted = anchor or "-".join(words)[:60] or "section"
        unique, number = wanted, 2
        while unique in self.taken:
            unique, number = f"{wanted}-{number}", number + 1
        self.taken.add(unique)
        self.headings.append(Heading(level, unique, html))
        return self.headings[-1]


class _Renderer(IPythonRenderer):
    def __init__(self, prose: Prose, **options: Any) -> None:
        super().__init__(
            escape=not prose.trusted,
            allow_harmful_protocols=prose.trusted,
            embed_images=prose.trusted,
            exclude_anchor_links=True,
            **options,
        )
        self.prose = prose

    def inline_math(self, body: str) -> str:
        return self.prose.mathematics(body, display=False)

    def block_math(self, body: str) -> str:
        return self.prose.mathematics(body, display=True)

    def latex_environment(self, name: str, body: str) -> str:
        return self.prose.mathematics(f"\\begin{{{name}}}{body}\\end{{{name}}}", display=True)

    def paragraph(self, text: str) -> str:
        return "" if not text.strip() else f"<p>{text}</p>\n"

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        anchor = ""
        if found := _ANCHOR_IN.search(text):
            anchor, text = found[1], _ANCHOR_IN.sub(" ", text).strip()
        entry = self.prose.outline.add(level, text, anchor)
        mark = f'<a class="anchor" href="#{entry.anchor}" aria-label="Link to this section">#</a>'
        return f'<h{level} id="{entry.anchor}">{text}{mark if level > 1 else ""}</h{level}>\n'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        target = self.prose.resolve(url)
        if target is None:
            return text
        return super().link(text, target, title)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        html = super().image(text, url, title)
        if not text:
            self.prose.warn(f"picture {url!r} in the text has no description")
        if 'src="data:' not in html:
            self.prose.warn(f"picture {url!r} in the text was not found and is left out")
            return f"<em>{text}</em>"
        return html

    def table(self, text: str) -> str:
        return f'<div class="scroll"><table>\n{text}</table></div>\n'

    def block_html(self, html: str) -> str:
        return self.prose.raw(super().block_html(html))

    def inline_html(self, html: str) -> str:
        return self.prose.raw(super().inline_html(html))

    def _html_embed_images(self, html: str) -> str:
        """Embed pictures without parsing: a block may hold an opening tag and not its closing."""

        def embed(found: re.Match[str]) -> str:
            return f'{found[1]}src="{self._src_to_base64(found[2]) or found[2]}"'

        return _IMAGE.sub(embed, html)

    def block_mermaidjs(self, code: str) -> str:
        self.prose.warn("a mermaid diagram is shown as its source")
        return f"<pre>{escape(code)}</pre>\n"


@dataclass
class Prose:
    """Turns the markdown of one page into HTML.

    Args:
        folder: where the notebook lies; pictures named in the text are looked for below it.
        resolve: maps a link's address to the site's; None takes the link away and keeps its text.
        warn: receives what could not be shown.
        trusted: whether HTML in the text is ours; otherwise it is escaped.
    """

    folder: str
    resolve: Callable[[str], str | None]
    warn: Callable[[str], None]
    trusted: bool = True
    outline: Outline = field(default_factory=Outline)

    def render(self, source: str, attachments: dict[str, dict[str, str]] | None = None) -> str:
        """Markdown, with HTML and mathematics in it, as HTML."""
        # An anchor on the line before a heading belongs to the heading.
        source = _ANCHOR_BEFORE.sub(r'\2 <a id="\1"></a>', source)
        renderer = _Renderer(self, path=self.folder, attachments=attachments)
        return MarkdownWithMath(renderer=renderer).render(source)

    def raw(self, html: str) -> str:
        """HTML that stands in the text: its links are the site's, scripts are left out."""

        def link(found: re.Match[str]) -> str:
            target = self.resolve(unescape(found[2]))
            return f'{found[1]}href="{escape(target)}"' if target else found[1]

        if _SCRIPT.search(html):
            self.warn("<script> in the text is left out")
            html = _SCRIPT.sub("", html)
        return _LINK.sub(link, html)

    def mathematics(self, tex: str, *, display: bool) -> str:
        """A formula as MathML; as its source, with a warning, where it cannot be converted."""
        try:
            return convert(tex, display=display)
        except TexError as error:
            self.warn(f"mathematics shown as source, {error}: {' '.join(tex.split())[:80]}")
            code = f'<code class="tex">{escape(tex.strip())}</code>'
            return f'<span class="equation">{code}</span>' if display else code
