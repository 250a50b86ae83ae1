"""The house in order: floors, style, types, pins, and what may be imported where."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FAMILIES = sorted(
    p.parent.name
    for p in ROOT.glob("workbench/*/__init__.py")
    if p.parent.name not in {"lab", "plots", "cli", "site"}
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_imports_point_downward() -> None:
    done = run(
        "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("workbench.optics.lens", "workbench.plots"),
        ("workbench.optics.experiments.lens", "matplotlib"),
        ("workbench.optics.lens", "workbench.optics.figures"),
        ("workbench.optics.lens", "workbench.optics.experiments.lens"),
        ("workbench.optics.lens", "workbench.calibration.measures"),
        ("workbench.lab.train", "workbench.calibration"),
        ("workbench.lab.data", "plotly"),
        ("workbench.optics.figures", "workbench.cli"),
    ],
)
def test_the_contract_notices_a_broken_floor(importer: str, imported: str) -> None:
    from tests.floors import broken

    assert broken(importer, imported)


def test_style() -> None:
    for command in (["check"], ["format", "--check"]):
        done = run("-m", "ruff", *command, "workbench", "tests")
        assert done.returncode == 0, done.stdout


def test_types() -> None:
    done = run("-m", "mypy")
    assert done.returncode == 0, done.stdout


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.\-]+==[\w.\-]+", line) for line in lines), "only exact pins"
    return {Requirement(line).name.lower().replace("_", "-"): line.split("==")[1] for line in lines}


def test_every_requirement_has_one_pin_that_satisfies_it() -> None:
    project, exact = PYPROJECT["project"], pins()
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        assert name in exact, f"{name} has no pin"
        assert requirement.specifier.contains(exact[name]), f"{requirement} is pinned {exact[name]}"
    assert exact["torch"] == "2.13.0"


def test_conda_takes_the_same_pins_and_extras() -> None:
    text = (ROOT / "environment.yml").read_text()
    [installed] = re.findall(r"-e '(\.\[.*test\])'", (ROOT / "Makefile").read_text())
    assert "- -c constraints.txt" in text and f"- -e {installed}" in text
    assert not re.search(r"==", text), "versions belong into constraints.txt alone"


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names!r}:
            raise ModuleNotFoundError(name + ' is blocked')
sys.meta_path.insert(0, Blocked())
import importlib, pkgutil
import workbench
from workbench import lab
for family in {families!r}:
    package = importlib.import_module('workbench.' + family)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):
        if '.figures' not in module.name:
            importlib.import_module(module.name)
for name in ('data', 'models', 'train', 'run', 'claims', 'catalogue', 'ledger', 'checks', 'show'):
    importlib.import_module('workbench.lab.' + name)
from workbench.calibration import measures, recalibrate
import numpy as np
run = lab.start('smoke', jobs=1)
run.identity('paper', 'one is one', 1.0, 1.0)
scaled = recalibrate.TemperatureScaling().fit(np.eye(3)[[0, 1, 2, 0]] * 2, [0, 1, 2, 1])
print('ece', measures.ece(np.eye(3) * .7 + .1, [0, 1, 2]))
"""


def test_methods_run_without_jupyter_plotly_or_matplotlib() -> None:
    names = [
        "IPython",
        "ipykernel",
        "jupyterlab",
        "ipywidgets",
        "plotly",
        "matplotlib",
        "anywidget",
    ]
    names += ["papermill", "nbconvert", "nbformat", "dask", "pyarrow"]
    done = run("-c", BLOCKED.format(names=names, families=FAMILIES))
    assert done.returncode == 0, done.stderr
    assert "ece 0.2" in done.stdout


def test_import_is_light() -> None:
    done = run("-X", "importtime", "-c", "import workbench")
    modules = re.findall(r"\| +([\w.]+)$", done.stderr, flags=re.MULTILINE)
    assert not {"torch", "numpy", "pandas", "workbench.lab"} & set(modules)


def test_no_machine_paths_and_nothing_left_to_do() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.toml", "*.yml", "*.js", "*.csv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    path = re.compile(r"(?<![\w.])/(?:root|home|Users|tmp)/\w")
    todo = re.compile(r"\b(TO" + "DO|FIX" + "ME|X" + r"XX)\b")
    for name in listed.stdout.split():
        text = (ROOT / name).read_text(encoding="utf8")
        assert not path.search(text), name
        assert not (name.endswith(".py") and todo.search(text)), name
