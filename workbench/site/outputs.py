"""Outputs of code cells as HTML: pictures become files, explorers live figures, scripts go."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from workbench.lab.show import CLAIM, EXPLORER

_COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PLAIN_REPR = re.compile(r"^<[\w.]+( |>|object).*>$|^Figure\(", re.DOTALL)
_NEEDS_CARE = re.compile(
    r"<(script|img|table|a|button|input|select|textarea|iframe|link|form|video|object|embed)\b"
    r"|\son\w+\s*=|javascript:",
    re.IGNORECASE,
)
_LEFT_OUT = {
    "application/vnd.jupyter.widget-view+json": "a live widget",
    "application/javascript": "a script",
    "application/vnd.plotly.v1+json": "a plotly figure without a picture",
    "text/vnd.mermaid": "a mermaid diagram",
}


@dataclass
class Outputs:
    """Renders the outputs of one page and collects what must be written beside it.

    Args:
        name: the page's name, also the folder of its pictures.
        place: puts an explorer's payload into the page and returns its HTML, given the still.
        prose: renders markdown found in outputs.
        resolve: maps a link's address to the site's, or None to take the link away.
        warn: receives what could not be shown.
    """

    name: str
    place: Callable[[dict[str, Any], str], str]
    prose: Callable[[str], str]
    formula: Callable[[str], str]
    resolve: Callable[[str], str | None]
    warn: Callable[[str], None]
    section: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)

    def render(self, output: dict[str, Any]) -> str:
        """One output of a cell."""
        kind = output["output_type"]
        if kind == "stream":
            text = _COLOUR_CODES.sub("", output["text"]).rstrip()
            if output.get("name") == "stderr":
                self.warn(f"a cell wrote to stderr: {text.splitlines()[-1][:80] if text else ''}")
                return f'<pre class="text stderr">{escape(text)}</pre>' if text else ""
            return f'<pre class="text">{escape(text)}</pre>' if text else ""
        if kind == "error":
            trace = _COLOUR_CODES.sub("", "\n".join(output.get("traceback", [])))
            self.warn(f"a cell ended in {output.get('ename')}: {output.get('evalue', '')[:80]}")
            return f'<pre class="text error">{escape(trace)}</pre>'
        return self.bundle(output.get("data", {}), output.get("metadata", {}))

    def bundle(self, data: dict[str, Any], metadata: dict[str, Any]) -> str:
        """The best of a bundle's representations that works without a kernel."""
        if CLAIM in data:
            self.claims.append(_json(data[CLAIM]))
        if EXPLORER in data:
            payload = _json(data[EXPLORER])
            still = ""
            if "image/png" in data:
                title = str(payload.get("title") or "Interactive figure")
                still = self.picture(data["image/png"], metadata, title)
            return self.place(payload, still)
        if "image/svg+xml" in data:
            return self.drawing(_text(data["image/svg+xml"]), metadata)
        for mime in ("image/png", "image/jpeg"):
            if mime in data:
                label = _text(data.get("text/plain", ""))
                alt = "" if _PLAIN_REPR.match(label.strip()) else label.strip()
                return f"<figure>{self.picture(data[mime], metadata, alt, mime)}</figure>"
        if "text/html" in data:
            return f'<div class="html">{self.html(_text(data["text/html"]))}</div>'
        if "text/markdown" in data:
            return f'<div class="prose">{self.prose(_text(data["text/markdown"]))}</div>'
        if "text/latex" in data:
            tex = re.sub(r"^\$+(?:\\displaystyle)?|\$+$", "", _text(data["text/latex"]).strip())
            return f'<div class="prose"><p>{self.formula(tex)}</p></div>'
        for mime, what in _LEFT_OUT.items():
            if mime in data:
                self.warn(f"{what} is left out: it does not work without a kernel")
                return ""
        text = _text(data.get("text/plain", "")).rstrip()
        return "" if not text else f'<pre class="text">{escape(text)}</pre>'

    # -- pictures -------------------------------------------------------------------------
    def picture(
        self, encoded: str, metadata: dict[str, Any], alt: str, mime: str = "image/png"
    ) -> str:
        """A picture, written as a file of its own, with its size and a description."""
        content = base64.b64decode("".join(encoded))
        suffix = mime.rpartition("/")[2].replace("jpeg", "jpg")
        digest = hashlib.sha256(content).hexdigest()[:12]
        file = f"pictures/{self.name}/{digest}.{suffix}"
        self.files[file] = content
        own = metadata.get(mime) or {}
        size: tuple[Any, ...] = (own.get("width"), own.get("height"))
        if not all(size) and content[:8] == b"\x89PNG\r\n\x1a\n":
            size = struct.unpack(">II", content[16:24])
        shape = f' width="{int(size[0])}" height="{int(size[1])}"' if all(size) else ""
        described = self.describe(own.get("alt") or metadata.get("alt") or alt)
        return f'<img src="{file}" alt="{escape(described)}"{shape} loading="lazy">'

    def describe(self, alt: str) -> str:
        """A picture's description; the section's title, with a warning, where it has none."""
        alt = " ".join(str(alt).split())
        if alt:
            return alt
        self.warn("a figure has no description (alt text)")
        return f"Figure: {self.section}" if self.section else "Figure"

    def drawing(self, svg: str, metadata: dict[str, Any]) -> str:
        """An SVG output, inline, with its description."""
        svg = svg[svg.find("<svg") :] if "<svg" in svg else svg
        own = metadata.get("image/svg+xml") or {}
        alt = self.describe(own.get("alt") or metadata.get("alt") or "")
        return f'<figure role="img" aria-label="{escape(alt)}">{self.html(svg)}</figure>'

    # -- our own HTML ---------------------------------------------------------------------
    def html(self, source: str) -> str:
        """HTML of an output without what is dead or unwanted on a page without a kernel."""
        if not _NEEDS_CARE.search(source):
            return source
        from bs4 import BeautifulSoup

        soup = BeautifulSoup(source, "html.parser")
        for tag in soup.find_all(["script", "iframe", "link", "object", "embed"]):
            if tag.name != "script" or tag.get("type") != "application/json":
                self.warn(f"<{tag.name}> in an output is left out")
            tag.decompose()
        for tag in soup.find_all(["button", "input", "select", "textarea", "form"]):
            self.warn(f"<{tag.name}> in an output is left out: it needs a kernel")
            tag.decompose()
        for tag in soup.find_all(True):
            for name in [n for n in tag.attrs if n.lower().startswith("on")]:
                self.warn(f"the attribute {name} in an output is left out")
                del tag.attrs[name]
        for tag in soup.find_all("a", href=True):
            target = self.resolve(str(tag["href"]))
            if target is None:
                tag.unwrap()
            else:
                tag["href"] = target
        for tag in soup.find_all("img"):
            if not str(tag.get("src", "")).startswith("data:"):
                self.warn("a picture that lies elsewhere is left out of an output")
                tag.decompose()
            elif not tag.get("alt"):
                tag["alt"] = self.describe("")
        for tag in soup.find_all("table"):
            if not tag.find_parent("table"):
                tag.wrap(soup.new_tag("div", attrs={"class": "scroll"}))
        return str(soup)


def _text(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def _json(value: Any) -> dict[str, Any]:
    return dict(json.loads(value)) if isinstance(value, str) else dict(value)
