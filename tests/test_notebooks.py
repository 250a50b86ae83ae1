"""Every notebook runs, headless and at smoke scale, and what is stored in it is fit to be read.

The papermill pass executes each notebook as ``workbench run`` does. The nbval pass executes it once
more, with the same cache but without the authors' data, and compares the cells tagged
``nbval-check-output``. With pytest-xdist the notebooks spread over the workers; without it, those
of the papermill pass run at the same time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from workbench.cli import kernels, parameters, runner
from workbench.lab import catalogue, paths

NOTEBOOKS = runner.notebooks()
MOST_BYTES, MOST_JSON = 1_500_000, 300_000
MACHINE = re.compile(r"(?<![\w.])/(?:work|farm|root|tmp|home|Users)/|[A-Z]:\\\\Users")
RANDOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f-]+)?")
WIDGET = "application/vnd.jupyter.widget-view+json"
IPC = """from jupyter_client.manager import KernelManager

KernelManager.transport.default_value = "ipc"
"""
every_notebook = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.xdist_group(f"notebook-{f}")) for f in NOTEBOOKS]
)


def plain(family: str) -> dict[str, Any]:
    return dict(json.loads(NOTEBOOKS[family].read_text(encoding="utf8")))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


# --- what is stored -----------------------------------------------------------------------------


@every_notebook
def test_it_is_valid_with_stable_readable_cell_ids(family: str) -> None:
    notebook = plain(family)
    nbformat.validate(nbformat.from_dict(notebook))
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids))
    assert [i for i in ids if RANDOM_ID.fullmatch(i)] == [], "give cells ids that say what they are"
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@every_notebook
def test_it_is_small_and_free_of_widgets(family: str) -> None:
    assert NOTEBOOKS[family].stat().st_size < MOST_BYTES
    notebook = plain(family)
    assert "widgets" not in notebook["metadata"]
    for output in outputs(notebook):
        data = output.get("data", {})
        assert WIDGET not in data
        for kind in (k for k in data if k.startswith("application/vnd.workbench")):
            assert "text/plain" in data or "text/html" in data, f"{kind} travels alone"
            assert len(json.dumps(data[kind])) < MOST_JSON


@every_notebook
def test_it_says_nothing_of_the_machine_it_ran_on(family: str) -> None:
    notebook = plain(family)
    for output in outputs(notebook):
        for kind in [k for k in output.get("data", {}) if k.startswith("image/")]:
            del output["data"][kind]
    text = json.dumps(notebook)
    found = [text[max(0, m.start() - 40) : m.end() + 40] for m in MACHINE.finditer(text)]
    assert found == []
    assert str(Path.home()) == "/" or str(Path.home()) not in text


@every_notebook
def test_it_is_stored_as_executed_from_top_to_bottom(family: str) -> None:
    notebook = plain(family)
    assert not [c["id"] for c in notebook["cells"] if not "".join(c["source"]).strip()], (
        "empty cells"
    )
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    cure = f"workbench run {family} --scale laptop --record"
    assert counts == list(range(1, len(counts) + 1)), cure
    assert not [o for o in outputs(notebook) if o["output_type"] == "error"], cure
    assert not [o for o in outputs(notebook) if o.get("name") == "stderr"], cure


@every_notebook
def test_nothing_of_the_runner_is_stored(family: str) -> None:
    notebook = plain(family)
    assert "papermill" not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert not {"papermill", "execution"} & set(cell["metadata"]), cell["id"]
        assert "injected-parameters" not in cell["metadata"].get("tags", []), cell["id"]


@every_notebook
def test_it_has_the_three_parameters(family: str) -> None:
    known = parameters.read(plain(family))
    assert {name: known[name].default for name in ("scale", "device", "seed")} == {
        "scale": "laptop",
        "device": "auto",
        "seed": 0,
    }


# --- that it runs -------------------------------------------------------------------------------


def job(family: str, folder: Path) -> runner.Job:
    options = {"scale": "smoke", "device": "cpu", "seed": 0}
    values = parameters.settle(parameters.read(plain(family)), options, [])
    return runner.Job(family, NOTEBOOKS[family], folder / f"{family}.ipynb", values)


@pytest.fixture(scope="session")
def smoke(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], runner.Job]:
    """Gives a notebook's finished run; each notebook is run once a session."""
    folder, done = tmp_path_factory.mktemp("smoke"), dict[str, runner.Job]()
    alone = not hasattr(request.config, "workerinput")
    chosen = {
        item.callspec.params["family"] for item in request.session.items
        if "smoke" in getattr(item, "fixturenames", ())
    }  # fmt: skip

    def result(family: str) -> runner.Job:
        if family not in done:
            wanted = [f for f in NOTEBOOKS if f in chosen] if alone else [family]
            settings = runner.Settings(jobs=kernels.cores() if alone else 1)
            for finished in runner.run([job(f, folder) for f in wanted], settings, lambda _: None):
                done[finished.family] = finished
        return done[family]

    return result


@every_notebook
def test_it_runs_at_smoke_scale(family: str, smoke: Callable[[str], runner.Job]) -> None:
    done = smoke(family)
    assert done.state == "ok", f"cell {done.cell_id}: {done.error}\n{done.traceback}"
    executed = json.loads(done.output.read_text(encoding="utf8"))
    assert "widgets" not in executed["metadata"]
    assert not any(WIDGET in output.get("data", {}) for output in outputs(executed))
    warned = ["".join(o["text"]) for o in outputs(executed) if o.get("name") == "stderr"]
    assert warned == [], "a reader would have to explain this away"


@every_notebook
def test_its_claims_are_stated_and_its_identities_hold(
    family: str, smoke: Callable[[str], runner.Job]
) -> None:
    claims = smoke(family).claims
    assert {c["verdict"] for c in claims if c["kind"] == "claim"} <= {"not judged"}
    failed = [c["statement"] for c in claims if c["kind"] == "identity" and c["verdict"] != "holds"]
    assert failed == []
    listed = set(catalogue.papers().query("family == @family")["slug"])
    sections = listed & set(catalogue.anchors(family))
    assert {c["paper"] for c in claims if c["central"]} == sections, "one central claim a section"


@every_notebook
def test_its_checked_cells_say_what_is_stored(
    family: str, smoke: Callable[[str], runner.Job], tmp_path: Path
) -> None:
    """nbval on a copy with smoke parameters; the first pass has filled the cache."""
    values = smoke(family).parameters
    copy = parameterize_notebook(load_notebook_node(str(NOTEBOOKS[family])), values)
    nbformat.write(copy, tmp_path / f"{family}.ipynb")
    if sys.platform != "win32":
        (tmp_path / "conftest.py").write_text(IPC)
    environment = kernels.environment(tmp_path, 1, None, None)
    environment.pop("WORKBENCH_DATA", None)
    environment["XDG_DATA_HOME"] = str(tmp_path / "data")
    for name in [n for n in environment if n.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), "-c", os.devnull,
         "-p", "no:xdist", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env",
         "--nbval-cell-timeout", "300", f"{family}.ipynb"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{len(code_cells(copy))} passed" in done.stdout


def test_there_is_an_index() -> None:
    assert runner.INDEX in NOTEBOOKS and paths.root().joinpath("notebooks", "README.md").exists()
