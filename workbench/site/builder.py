"""Building the site: convert the notebooks, write the pages, then swap the folders."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from workbench.lab import paths
from workbench.site import assets, pages, sources
from workbench.site.notebook import Content, content
from workbench.site.report import Report
from workbench.site.sources import Family, Paper, Sources

MARKER = ".workbench-site"
INDEX = "index"
_SHOWN_AS_SOURCE = {
    ".py": "python", ".md": "markdown", ".toml": "toml", ".csv": "text", ".tsv": "text",
    ".txt": "text", ".yml": "yaml", ".yaml": "yaml", ".json": "json",
}  # fmt: skip
_ID = re.compile(r'\bid="([^"]+)"')
_SECTION_LINK = re.compile(r'<a\s[^>]*?href="([\w.-]*)#([^"]+)"')
_LARGEST_SOURCE = 400_000  # bytes; larger files are named, not shown


def build(
    out: Path | str,
    *,
    notebooks: Iterable[str | Path] | None = None,
    run: Path | str | None = None,
) -> Report:
    """Build the static site.

    The new site is made in a temporary folder beside ``out`` and then takes its place, so a
    reader never meets half a site and a build that dies leaves the old one. A notebook that
    cannot be converted is named in the report, and its page says so; the others are not affected.

    Args:
        out: folder of the site; it must be new, empty, or an earlier site.
        notebooks: families (``"calibration"``) or files to build; default: all in ``notebooks/``.
        run: folder of a run whose outcome the status page shows; default: the newest in ``runs/``.

    Raises:
        ValueError: ``out`` holds something that is not a site, or a notebook does not exist.
    """
    started = time.perf_counter()
    out = Path(out).expanduser().resolve()
    _check_target(out)
    files = _files(notebooks)
    out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        report = _Builder(fresh, files, sources.load(Path(run) if run else None)).build()
        (fresh / MARKER).write_text("made by `workbench site`; replaced at the next build\n")
        mask = os.umask(0)
        os.umask(mask)
        fresh.chmod(0o777 & ~mask)
        _swap(fresh, out)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    report.folder = out
    report.seconds = time.perf_counter() - started
    return report


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).exists():
        raise ValueError(f"out: {out} holds files that are not a site; name another folder")


def _files(notebooks: Iterable[str | Path] | None) -> list[Path]:
    folder = paths.root() / "notebooks"
    if notebooks is None:
        return [file for file in sorted(folder.glob("*.ipynb")) if file.stem != INDEX]
    files = []
    for name in notebooks:
        file = Path(name) if str(name).endswith(".ipynb") else folder / f"{name}.ipynb"
        if not file.is_file():
            known = ", ".join(sorted(f.stem for f in folder.glob("*.ipynb"))) or "none"
            raise ValueError(f"notebooks: there is no {str(name)!r}; there are: {known}")
        files.append(file)
    return files


def _swap(fresh: Path, out: Path) -> None:
    """Put the new folder in the old one's place; two renames, the old one is then removed."""
    if not out.exists():
        fresh.rename(out)
        return
    old = fresh.with_name(f"{fresh.name}-old")
    out.rename(old)
    try:
        fresh.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


@dataclass
class _Builder:
    out: Path
    files: list[Path]
    sources: Sources
    report: Report = field(init=False)
    shown_sources: dict[str, Path] = field(default_factory=dict)

    def build(self) -> Report:
        self.report = Report(self.out, warnings=list(self.sources.warnings))
        names = {file.stem for file in self.files}
        made = {file.stem: self.convert(file, names) for file in self.files}
        self.link(made)
        self.check_anchors(made)
        render = pages.Renderer(self.sources)
        order = [family for family in self.sources.families if family.page]
        for i, family in enumerate(order):
            before, after = (order[i - 1] if i else None), next(iter(order[i + 1 :]), None)
            page, scripts = made[family.slug]
            if page is None:
                html = render.failed(family, self.report.failures[family.slug], before, after)
            else:
                html = render.notebook(family, page, scripts, before, after)
                for name, data in page.files.items():
                    self.write(name, data)
            self.write(f"{family.slug}.html", html)
        claims = {name: page.claims if page else [] for name, (page, _) in made.items()}
        self.write("index.html", render.index())
        self.write("papers.html", render.papers())
        self.write("status.html", render.status(claims, self.report.failures))
        self.write("disagreements.html", render.disagreements(self.section))
        for name, file in sorted(self.shown_sources.items()):
            language = _SHOWN_AS_SOURCE.get(file.suffix, "text")
            shown = file.relative_to(paths.root()).as_posix()
            self.write(name, render.source(shown, file.read_text("utf8", "replace"), language))
        self.report.warnings += assets.write(self.out, explorers=self.report.explorers > 0)
        return self.report

    def write(self, name: str, content: str | bytes) -> None:
        file = self.out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        if name.endswith(".html"):
            self.report.pages.append(name)

    # -- notebooks ------------------------------------------------------------------------
    def convert(self, file: Path, names: set[str]) -> tuple[Content | None, list[str]]:
        """One notebook's content and the scripts of its explorers; None where it fails."""
        scripts: list[str] = []
        heard: dict[str, int] = {}

        def warn(text: str) -> None:
            heard[text] = heard.get(text, 0) + 1

        try:
            page = content(
                file,
                place=partial(self.place, scripts=scripts, warn=warn),
                resolve=partial(self.resolve, folder=file.parent, names=names, warn=warn),
                warn=warn,
            )
        except Exception as error:  # one broken notebook must not take the others down
            self.report.failures[file.stem] = f"{type(error).__name__}: {error}"
            return None, []
        for text, times in heard.items():
            often = f" ({times} times)" if times > 1 else ""
            self.report.warnings.append(f"{file.stem}: {text}{often}")
        self.report.explorers += len(scripts)
        return page, scripts

    def place(self, payload: dict[str, Any], still: str, *, scripts: list[str], warn: Any) -> str:
        """Put an explorer into a page: its script in ``explorers/``, its still as the fallback."""
        from workbench.plots import export

        title = escape(str(payload.get("title", "")))
        picture = f"<figure>{still}</figure>" if still else f"<p>{title}</p>"
        try:
            if not payload.get("controls"):
                warn(
                    f"explorer {payload.get('name')!r} has no exported controls: shown as a picture"
                )
                return picture
            written = export.write(payload, self.out / "explorers")
        except (ValueError, KeyError, TypeError) as error:
            warn(f"an explorer is shown as a picture: {error}")
            return picture
        if not still:
            warn(f"explorer {payload.get('name')!r} has no still picture")
        name = f"explorers/{written.path.name}"
        if name not in scripts:
            scripts.append(name)
        return export.element(written.id, picture)

    def resolve(self, url: str, *, folder: Path, names: set[str], warn: Any) -> str | None:
        """The site's address for a link in a notebook; None where the site has no such page."""
        parts = urlsplit(url)
        if parts.scheme in {"http", "https", "mailto"} or (not parts.path and parts.fragment):
            return url
        if parts.scheme or parts.netloc or not parts.path:
            warn(f"link to {url!r} is taken away")
            return None
        fragment = f"#{parts.fragment}" if parts.fragment else ""
        target = PurePosixPath(unquote(parts.path))
        if target.suffix == ".ipynb":
            if target.stem in names | {INDEX}:
                return f"{target.stem}.html{fragment}"
            warn(f"link to {url!r} is taken away: the site has no such page")
            return None
        file = (folder / target).resolve()
        inside = file.is_relative_to(paths.root()) and file.is_file()
        if inside and file.suffix in _SHOWN_AS_SOURCE and file.stat().st_size < _LARGEST_SOURCE:
            flat = file.relative_to(paths.root()).as_posix().replace("/", ".")
            self.shown_sources[f"source/{flat}.html"] = file
            return f"source/{flat}.html"
        if not file.exists():
            warn(f"link to {url!r} is taken away: there is no such file")
        return None

    # -- addresses ------------------------------------------------------------------------
    def link(self, made: dict[str, tuple[Content | None, list[str]]]) -> None:
        """Note which families and papers have a page, and families the catalogue lacks."""
        known = {family.slug: family for family in self.sources.families}
        for name, (page, _) in made.items():
            if name not in known:
                title = page.title if page else name
                known[name] = Family(name, len(known) + 1, title, "")
                self.sources.families.append(known[name])
            family = known[name]
            family.page = f"{name}.html"
            for paper in family.papers:
                if page and f'id="{paper.slug}"' in page.body:
                    paper.section = f"{name}.html#{paper.slug}"

    def check_anchors(self, made: dict[str, tuple[Content | None, list[str]]]) -> None:
        """Warn of links between notebooks that lead to a section which is not there."""
        bodies = {f"{name}.html": page.body for name, (page, _) in made.items() if page}
        ids = {name: set(_ID.findall(body)) for name, body in bodies.items()}
        for name, body in bodies.items():
            for page, anchor in _SECTION_LINK.findall(body):
                target = page or name
                if target in ids and anchor not in ids[target] | {"content"}:
                    self.report.warnings.append(
                        f"{name.removesuffix('.html')}: link to {target}#{anchor}: "
                        "that page has no such section"
                    )

    def section(self, slug: str) -> Paper | None:
        """The paper of this slug."""
        return next((paper for paper in self.sources.papers if paper.slug == slug), None)
