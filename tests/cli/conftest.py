"""A small repository of its own for the command line: three families, three notebooks, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from typer.testing import CliRunner

PARAMETERS = """scale: str = "laptop"  # smoke, laptop or gpu
device: str = "auto"
seed: int = 0
effect: float = 1.0
wrong: float = 0.0"""
CLAIM = """from IPython.display import display
holds = effect > 0.5
base = {"scale": scale, "device": "cpu", "seed": seed, "data": "toy", "unit": "points",
        "versions": {"numpy": "2"}, "hardware": "here", "date": "2026-01-02", "digest": "d"}
claim = {"paper": "lens", "claim": "main", "statement": "ours beats theirs", "kind": "claim",
         "verdict": "holds" if holds else "inconclusive", "effect": effect, "low": effect - 0.5,
         "high": effect + 0.5, "ours": 2.0, "baseline": 1.0, "published": None, "n": 5,
         "seeds": [0, 1, 2, 3, 4], "better": "higher", "margin": 0.0, "interval": "t",
         "protocol": "split", "central": True, **base}
identity = {**claim, "claim": "identity", "statement": "one is one", "kind": "identity",
            "verdict": "holds" if wrong <= 1e-6 else "refuted", "effect": -wrong, "low": -wrong,
            "high": -wrong, "ours": wrong, "margin": 1e-6, "central": False}
kind = "application/vnd.workbench.claim+json"
for one in (claim, identity):
    display({"text/plain": one["verdict"], kind: one}, raw=True)"""
KERNEL = """import json, os, sys
names = ["IPYTHONDIR", "MPLCONFIGDIR", "OMP_NUM_THREADS", "WORKBENCH_JOBS", "WORKBENCH_HEADLESS",
         "WORKBENCH_EXECUTOR"]
print(json.dumps({name: os.environ.get(name) for name in names} | {"python": sys.executable}))"""
WIDGET = "import ipywidgets\nipywidgets.IntSlider()"
CARD = "from workbench import lab\nlab.show.bundle('card', html=lab.catalogue.paper_html('lens'))"
PAPERS = """family,order,slug,title,year,arxiv,code,summary,seeds,status
optics,1,lens,On Lenses,2020,2001.00001,owner/lens,Bends light,000,planned
optics,2,prism,On <Prisms>,2021,2101.00002,,Splits light,000 001,planned
acoustics,1,echo,On Echoes,2022,2201.00003,,Comes back,002,planned
"""
FAMILIES = """slug,order,title,description
optics,1,Optics,What light does.
acoustics,2,Acoustics,What sound does.
"""


def notebook(*cells: tuple[str, str]) -> nbformat.NotebookNode:
    """A notebook of (id, source) cells; an id that begins with ``text`` makes it markdown."""
    made = []
    for name, source in cells:
        if name.startswith("text"):
            made.append(nbformat.v4.new_markdown_cell(source, id=name))
        else:
            tags = {"tags": ["parameters"]} if name == "parameters" else {}
            made.append(nbformat.v4.new_code_cell(source, id=name, metadata=tags))
    out = nbformat.v4.new_notebook(cells=made)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    out.metadata.update(kernelspec=kernel, language_info={"name": "python"})
    return out


@dataclass
class Home:
    """A repository in a temporary folder."""

    root: Path

    def put(self, family: str, *cells: tuple[str, str]) -> Path:
        """Write a notebook."""
        file = self.root / "notebooks" / f"{family}.ipynb"
        nbformat.write(notebook(*cells), file)
        return file

    def read(self, name: str) -> nbformat.NotebookNode:
        """Read a notebook, by family or by path below the root."""
        file = self.root / (name if "/" in name else f"notebooks/{name}.ipynb")
        return nbformat.read(file, as_version=4)

    def table(self, name: str) -> list[str]:
        """Lines of a table in data/."""
        return (self.root / "data" / name).read_text().splitlines()

    @property
    def runs(self) -> list[Path]:
        """Folders that runs have left, the newest last."""
        return sorted((self.root / "runs").glob("*")) if (self.root / "runs").exists() else []


def build(root: Path) -> Home:
    """The repository: optics works, acoustics fails in its second section."""
    for name in ("notebooks", "data"):
        (root / name).mkdir(parents=True)
    (root / "data" / "papers.csv").write_text(PAPERS)
    (root / "data" / "families.csv").write_text(FAMILIES)
    module = root / "workbench" / "optics" / "lens.py"
    module.parent.mkdir(parents=True)
    module.write_text('"""A lens."""\n')
    home = Home(root)
    home.put(
        "optics",
        ("parameters", PARAMETERS),
        ("text-lens", '<a id="lens"></a>\n\n## 1. Lens'),
        ("card", CARD),
        ("claim", CLAIM),
        ("kernel", KERNEL),
        ("widget", WIDGET),
    )
    home.put(
        "acoustics",
        ("parameters", PARAMETERS),
        ("before", "print('so far')"),
        ("text-echo", '<a id="echo"></a>\n\n## 1. Echo'),
        ("broken", "raise ValueError('no sound <here>')"),
        ("after", "print('never')"),
    )
    return home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A fresh repository that the command line works on."""
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return build(tmp_path / "home")


@dataclass
class Ran:
    """What one command did."""

    code: int
    said: str
    home: Home

    def json(self, name: str) -> Any:
        """A report of the newest run."""
        return json.loads((self.home.runs[-1] / name).read_text())


def type_command(*words: str) -> tuple[int, str]:
    """Run the command line in this process."""
    from workbench.cli.app import app

    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """For fixtures that keep one repository over several commands."""
    return SimpleNamespace(build=build, type_command=type_command, at_home=at_home)


@pytest.fixture
def command(home: Home) -> Callable[..., Ran]:
    """Type a command in the fresh repository."""
    return lambda *words: Ran(*type_command(*words), home)


@contextmanager
def at_home(root: Path) -> Iterator[None]:
    """The command line works on this repository, and on no other, inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(root))
        patch.setenv("WORKBENCH_CACHE", str(root.parent / "cache"))
        patch.delenv("OMP_NUM_THREADS", raising=False)
        yield


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One run of three notebooks, two at once; shared by the tests that look at what it left."""
    home = build(tmp_path_factory.mktemp("shared") / "home")
    end = "import os; os.write(2, b'farewell'); os._exit(9)"
    home.put("mortal", ("parameters", PARAMETERS), ("die", end))
    with at_home(home.root):
        words = ("run", "--scale", "smoke", "--jobs", "2", "--executor", "sequential")
        return Ran(*type_command(*words), home)
