from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from workbench.cli import doctor
from workbench.lab import ledger


def judge(paper: str, verdict: str) -> None:
    ledger.record([{
        "paper": paper, "claim": "main", "scale": "laptop", "device": "cpu", "data": "toy",
        "kind": "claim", "central": True, "verdict": verdict, "effect": 1, "low": 0, "high": 2,
        "ours": 1, "baseline": 0, "margin": 0, "n": 5, "seed": 0, "date": "2026-01-01",
    }])  # fmt: skip


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ((), {"lens", "prism", "echo"}),
        (("--family", "optics"), {"lens", "prism"}),
        (("--status", "planned"), {"prism"}),
        (("--verdict", "refuted"), {"lens"}),
        (("--verdict", "none"), {"prism", "echo"}),
        (("light SPLITS",), {"prism"}),
        (("2201.",), {"echo"}),
        (("nothing like it",), set()),
        (("--family", "optics", "--verdict", "none", "on"), {"prism"}),
    ],
)
def test_papers_are_filtered(
    command: Callable[..., Any], words: tuple[str, ...], shown: set[str]
) -> None:
    judge("lens", "refuted")
    done = command("papers", *words)
    assert done.code == 0
    assert {slug for slug in ("lens", "prism", "echo") if f" {slug} " in done.said} == shown
    assert f"{len(shown)} of 3 papers" in done.said


def test_titles_are_shown_as_they_are(command: Callable[..., Any]) -> None:
    assert "On <Prisms>" in command("papers").said


def test_an_unknown_family_or_word_is_refused(command: Callable[..., Any]) -> None:
    done = command("papers", "--family", "optic")
    assert done.code == 2 and "no family is called 'optic'; there is optics" in done.said
    assert command("papers", "--status", "ready").code == 2


def test_update_writes_the_derived_status_once(command: Callable[..., Any], home: Any) -> None:
    assert "Changed: data/papers.csv" in command("papers", "--update").said
    assert [line.rsplit(",", 1)[1] for line in home.table("papers.csv")[1:]] == [
        "partial", "planned", "partial",
    ]  # fmt: skip
    assert "All up to date." in command("papers", "--update").said


def test_data_list_and_get(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from workbench.lab import data

    row = {"name": "stars", "kind": "authors", "present": False, "files": 2, "bytes": 1_500_000,
           "licence": "MIT", "what": "of [all] nights", "origin": "x", "sha256": "0"}  # fmt: skip
    monkeypatch.setattr(data, "listing", lambda: pd.DataFrame([row]))
    listed = command("data", "list").said
    assert "stars" in listed and "1.50 MB" in listed and "of [all] nights" in listed

    def get(name: str, progress: Any = None) -> Path:
        if name != "stars":
            raise KeyError(f"no data source is named {name!r}")
        progress(1, 2)
        return tmp_path / name

    monkeypatch.setattr(data, "get", get)
    done = command("data", "get", "stars")
    assert done.code == 0 and str(tmp_path / "stars") in done.said.replace("\n", "")
    done = command("data", "get", "moons")
    assert done.code == 1 and "moons: no data source is named 'moons'" in done.said


def test_site_reports_and_fails_loudly(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, home: Any
) -> None:
    class Report:
        ok = True

        def __str__(self) -> str:
            return "3 pages [here]"

    asked = []
    fake = types.ModuleType("workbench.site")
    fake.build = lambda out: asked.append(out) or Report()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "workbench.site", fake)
    done = command("site")
    assert done.code == 0 and "3 pages [here]" in done.said and asked == [home.root / "site"]
    Report.ok = False
    assert command("site", "--out", "elsewhere").code == 1


def test_doctor_finds_this_environment_sound() -> None:
    findings = list(doctor.examine())
    assert {f.subject for f in findings} >= {
        "Python", "torch", "JupyterLab server", "notebook kernel", "versions", "Chromium",
        "catalogue", "data sources", "result cache",
    }  # fmt: skip
    assert [f for f in findings if f.state == "missing"] == []


def test_doctor_names_the_environment_that_lacks_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTENSIONS", ("anywidget", "no-such-extension"))
    monkeypatch.setattr(doctor, "KERNEL_PACKAGES", ("ipykernel", "no-such-package"))
    server, kernel = doctor._jupyter()
    assert server.state == "missing" and "front-end extension no-such-extension" in server.said
    assert kernel.state == "missing" and "lacks no-such-package" in kernel.said
    assert sys.prefix in kernel.said and "pip install" in kernel.cure


def test_doctor_sees_two_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    monkeypatch.setattr(doctor, "kernel_python", lambda: str(other))
    said = [f for f in doctor._jupyter() if f.subject == "environments"]
    assert len(said) == 1 and str(other) in said[0].said


def test_doctor_compares_versions_with_the_pins(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text(f"pandas=={pd.__version__}\nnumpy==0.0.1 # old\nnot-installed==1\n\n-e .\n")
    finding = doctor._versions(file)
    assert finding.state == "note" and "numpy" in finding.said and "0.0.1" in finding.said
    assert "pandas" not in finding.said and "not-installed" not in finding.said


def test_doctor_notes_a_read_only_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    finding = doctor._writable("result cache", tmp_path / "not" / "yet")
    assert finding.state == "note" and "Permission denied" in finding.said


def test_doctor_exits_with_the_worst_finding(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [doctor.Finding("one", "ok", "[fine]"), doctor.Finding("two", "note", "odd", "mend")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(found))
    done = command("doctor")
    assert done.code == 0 and "one: [fine]" in done.said and "mend" in done.said
    found.append(doctor.Finding("three", "missing", "gone"))
    assert command("doctor").code == 1


def test_without_its_libraries_the_command_line_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['typer'] = None; from workbench.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "paper-workbench[lab]" in done.stderr
    assert "Traceback" not in done.stderr


def test_listing_papers_needs_no_jupyter_and_no_torch(home: Any) -> None:
    blocked = ["torch", "papermill", "nbformat", "IPython", "matplotlib", "plotly", "psutil"]
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
        "sys.argv = ['workbench', 'papers']\nfrom workbench.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "WORKBENCH_HOME": str(home.root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 of 3 papers" in done.stdout


def test_the_probe_answers_in_json() -> None:
    found = doctor.probe(sys.executable, ("pandas", "none-such"), ("none-such",))
    assert json.dumps(found) and found["versions"] == {"pandas": pd.__version__, "none-such": ""}
    assert found["extensions"] == []
