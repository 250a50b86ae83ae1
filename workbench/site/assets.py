"""Style sheets, scripts and fonts that all pages share, and the one copy of plotly.js."""

from __future__ import annotations

import base64
import hashlib
from importlib import metadata, util
from importlib.metadata import PackageNotFoundError
from pathlib import Path

HERE = Path(__file__).parent / "assets"
FOLDER = "assets"

# (package, file in it, name in the site, family, style and weight in CSS); each package holds one
# family under the SIL Open Font License, whose notice is in the font files themselves.
FONTS = (
    ("ziamath", "fonts/STIXTwoMath-Regular.ttf", "stix-two-math.woff", "WB Math", ""),
    ("font_source_serif_pro", "files/SourceSerifPro-Regular.ttf", "source-serif.woff",
     "WB Serif", ""),
    ("font_source_serif_pro", "files/SourceSerifPro-It.ttf", "source-serif-italic.woff",
     "WB Serif", "font-style: italic; "),
    ("font_source_serif_pro", "files/SourceSerifPro-Semibold.ttf", "source-serif-bold.woff",
     "WB Serif", "font-weight: 600 700; "),
    ("font_source_sans_pro", "files/SourceSansPro-Regular.ttf", "source-sans.woff",
     "WB Sans", ""),
    ("font_source_sans_pro", "files/SourceSansPro-Semibold.ttf", "source-sans-bold.woff",
     "WB Sans", "font-weight: 600 700; "),
)  # fmt: skip


def write(out: Path, *, explorers: bool) -> list[str]:
    """Write the shared files below ``out``; returns warnings.

    Args:
        explorers: whether a page has explorers; without one plotly.js (5 MB) stays behind.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for file in HERE.iterdir():
        if file.suffix in {".css", ".js", ".svg"}:
            (folder / file.name).write_bytes(file.read_bytes())
    warnings = _fonts(folder)
    if explorers:
        from workbench.plots import export

        (folder / "plotly.min.js").write_bytes(plotly_js())
        for name in ("explorer.js", "explorer.css"):
            (folder / name).write_bytes((export.ASSETS / name).read_bytes())
    return warnings


def plotly_js() -> bytes:
    """plotly.js as the installed plotly package ships it, checked against the package's record.

    Raises:
        RuntimeError: the file is missing or is not the one that was published.
    """
    spec = util.find_spec("plotly")
    file = Path(spec.origin or "").parent / "package_data" / "plotly.min.js" if spec else None
    if file is None or not file.is_file():
        raise RuntimeError("the plotly package, which ships plotly.min.js, is not installed")
    content = file.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    if published() not in {"", digest}:
        raise RuntimeError(
            "plotly.min.js is not the file that the installed plotly package published: "
            "reinstall plotly"
        )
    return content


def published() -> str:
    """The sha256 that plotly's installation record states for its plotly.js, "" if it has none."""
    try:
        files = metadata.files("plotly") or []
    except PackageNotFoundError:
        files = []
    hashes = [f.hash for f in files if f.as_posix() == "plotly/package_data/plotly.min.js"]
    return next((h.value.rstrip("=") for h in hashes if h and h.mode == "sha256"), "")


def _fonts(folder: Path) -> list[str]:
    """Fonts from the installed packages, compressed; a missing package costs only looks."""
    from fontTools.ttLib import TTFont

    missing, faces = [], []
    for package, inside, name, family, style in FONTS:
        spec = util.find_spec(package)
        source = Path(spec.origin).parent / inside if spec and spec.origin else None
        if source is None or not source.exists():
            missing.append(package)
            continue
        with TTFont(source, lazy=True, recalcBBoxes=False, recalcTimestamp=False) as font:
            font.flavor = "woff"
            font.save(folder / name, reorderTables=None)
        faces.append(
            f'@font-face {{ font-family: "{family}"; {style}src: url({name}) format("woff"); '
            "font-display: swap; }\n"
        )
    (folder / "fonts.css").write_text("".join(faces), encoding="utf8")
    return [
        f"the font package {package} is not installed: pages fall back to the reader's own fonts"
        for package in dict.fromkeys(missing)
    ]
