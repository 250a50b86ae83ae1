"""The small repository and the site built from it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

for package in ("nbconvert", "plotly"):
    if importlib.util.find_spec(package) is None:
        collect_ignore_glob = ["test_*.py"]  # the site belongs to the extra `lab`


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small() -> ModuleType:
    """The module that makes the small repository."""
    return load("small")


@pytest.fixture
def home(small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository of this test's own, where the workbench now looks for its files."""
    folder: Path = small.home(tmp_path / "home")
    monkeypatch.setenv("WORKBENCH_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def built(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The report of one build, for tests that only look at the pages."""
    from workbench.lab import ledger
    from workbench.site import build

    folder = small.home(tmp_path_factory.mktemp("site") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(folder))
        ledger.record([small.claim(effect=0.4, low=0.3, high=0.5)])
        report = build(folder / "site")
    yield report  # the variable is gone again: other tests of this worker look at the repository
