from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest

from workbench.cli import recording
from workbench.cli.runner import Job

pytestmark = pytest.mark.xdist_group("cli-record")  # one worker: shared fixtures


def ledger(home: Any) -> dict[tuple[str, str], dict[str, str]]:
    rows = csv.DictReader((home.root / "data" / "ledger.csv").open())
    return {(row["claim"], row["scale"]): row for row in rows}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, tools: SimpleNamespace) -> dict[str, Any]:
    """Three runs in one repository: as it stands, with other values, and not recorded."""
    root = tmp_path_factory.mktemp("record") / "home"
    home = tools.build(root)
    home.put(
        "index",
        ("parameters", "scale: str = 'laptop'"),
        ("table", "from workbench.lab import ledger\nprint(len(ledger.read()), 'rows')"),
    )
    (root / "README.md").write_text(
        "# Here\n\n<!-- status:begin -->\nstale text\n<!-- status:end -->\n\nend\n"
    )
    seen: dict[str, Any] = {"home": home, "before": home.read("optics")}
    with tools.at_home(root):
        seen["first"] = tools.type_command("run", "optics", "--record")
        seen["laptop"] = home.read("optics")
        seen["ledger"] = ledger(home)
        seen["index"] = home.read("index")
        other = ("-p", "effect", "0.2", "-p", "wrong", "0.1")
        seen["second"] = tools.type_command("run", "optics", "--record", "--strict", *other)
        seen["ledger again"] = ledger(home)
        seen["after"] = home.read("optics")
        seen["third"] = tools.type_command("run", "optics", "--strict")
    return seen


def test_claims_become_ledger_rows(recorded: dict[str, Any]) -> None:
    assert recorded["first"][0] == 0
    row = recorded["ledger"]["main", "laptop"]
    assert row["verdict"] == "holds" and float(row["effect"]) == 1.0 and row["seeds"] == "0 1 2 3 4"
    assert row["hardware"] == "here" and row["versions"] == "numpy=2" and row["date"]
    assert set(recorded["ledger"]) == {("main", "laptop"), ("identity", "laptop")}


def test_outputs_are_written_back_by_cell_id(recorded: dict[str, Any]) -> None:
    before, after = recorded["before"], recorded["laptop"]
    assert [c["id"] for c in after.cells] == [c["id"] for c in before.cells]
    assert [c.source for c in after.cells] == [c.source for c in before.cells]
    outputs = {c["id"]: c.outputs for c in after.cells if c.cell_type == "code"}
    assert len(outputs["claim"]) == 2 and outputs["kernel"]


def test_nothing_of_the_runner_is_stored(recorded: dict[str, Any]) -> None:
    after = recorded["laptop"]
    assert "papermill" not in after.metadata and "widgets" not in after.metadata
    assert not any("papermill" in c.metadata or "execution" in c.metadata for c in after.cells)
    assert not any("injected-parameters" in c.metadata.get("tags", []) for c in after.cells)
    counts = [c.execution_count for c in after.cells if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    nbformat.validate(after)


def test_the_stored_citation_shows_the_verdict_just_recorded(recorded: dict[str, Any]) -> None:
    card = next(c for c in recorded["laptop"].cells if c["id"] == "card").outputs[0]
    assert "holds" in card.data["text/html"] and "effect 1 points" in card.data["text/html"]
    assert "[holds]" in card.data["text/plain"]


def test_index_catalogue_and_readme_follow(recorded: dict[str, Any]) -> None:
    index = next(c for c in recorded["index"].cells if c["id"] == "table")
    assert index.outputs[0].text == "2 rows\n"
    papers = recorded["home"].table("papers.csv")
    assert papers[1].endswith(",partial") and papers[2].endswith(",planned")
    readme = (recorded["home"].root / "README.md").read_text()
    assert "| [Optics](notebooks/optics.ipynb) | 2 | 0 | 1 | 0 | 0 | 1 |" in readme
    assert "stale text" not in readme and readme.startswith("# Here") and readme.endswith("end\n")


def test_a_second_run_replaces_its_rows(recorded: dict[str, Any]) -> None:
    again = recorded["ledger again"]
    assert set(again) == set(recorded["ledger"])
    assert again["main", "laptop"]["verdict"] == "inconclusive"
    assert float(again["main", "laptop"]["effect"]) == 0.2


def test_flips_and_failed_identities_are_reported(recorded: dict[str, Any]) -> None:
    code, said = recorded["second"]
    assert code == 3
    assert "flipped (was holds)" in said and "2 flipped" in said
    assert "identity failed lens: one is one" in said


def test_other_parameters_leave_the_stored_outputs_alone(recorded: dict[str, Any]) -> None:
    assert "run with another effect, wrong" in recorded["second"][1]
    assert recorded["after"] == recorded["laptop"]


def test_strict_makes_a_flip_a_failure_without_recording_it(recorded: dict[str, Any]) -> None:
    code, said = recorded["third"]
    assert code == 3 and "flipped (was inconclusive)" in said
    assert ledger(recorded["home"]) == recorded["ledger again"]


def test_costs_are_recorded_and_dry_run_shows_them(
    recorded: dict[str, Any], tools: SimpleNamespace
) -> None:
    lines = recorded["home"].table("timings.csv")
    assert lines[0] == "family,scale,device,seconds,peak_mb,disk_mb,cores,date"
    assert [line.split(",")[:3] for line in lines[1:]] == [
        ["index", "laptop", "cpu"],
        ["optics", "laptop", "cpu"],
    ]
    runs = len(recorded["home"].runs)
    with tools.at_home(recorded["home"].root):
        code, said = tools.type_command("run", "--dry-run", "--device", "cpu", "--jobs", "2")
        wrong = tools.type_command("run", "--dry-run", "-p", "typo", "1")[0]
    assert code == 0 and len(recorded["home"].runs) == runs
    assert f"measured {lines[1].split(',')[-1]}" in said
    assert "acoustics" in said and "not measured yet: its budget" in said
    assert "12 min" in said and "4000 MB" in said and "This machine:" in said
    assert wrong == 2


def job(family: str, seconds: float) -> Job:
    return Job(family, Path("a"), Path("b"), {"scale": "laptop"}, seconds=seconds, peak_mb=100)


def test_a_warm_run_never_lowers_the_recorded_cost(home: Any) -> None:
    def cost() -> float:
        return float(recording.timings().iloc[0]["seconds"])

    recording.record_timing(job("optics", 60), device="cpu", fresh=False)
    recording.record_timing(job("optics", 5), device="cpu", fresh=False)
    assert cost() == 60
    recording.record_timing(job("optics", 70), device="cpu", fresh=False)
    assert cost() == 70
    recording.record_timing(job("optics", 50), device="cpu", fresh=True)
    assert cost() == 50
    recording.record_timing(job("optics", 9), device="cuda", fresh=False)
    assert len(recording.timings()) == 2


def test_a_cell_edited_during_the_run_keeps_its_old_output(home: Any) -> None:
    file = home.put("optics", ("one", "print(1)"), ("two", "print(2)"))
    executed = home.read("optics")
    for cell in executed.cells:
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="new\n")]
    executed.cells[1].source = "print(3)"
    remarks = recording.store_outputs(executed, home.read("optics"), file)
    stored = home.read("optics")
    assert stored.cells[0].outputs[0].text == "new\n" and stored.cells[1].outputs == []
    assert remarks == ["optics: cell two was edited during the run; not stored"]


def test_stderr_is_remarked(home: Any) -> None:
    file = home.put("optics", ("one", "print(1)"))
    executed = home.read("optics")
    executed.cells[0].outputs = [nbformat.v4.new_output("stream", name="stderr", text="careful\n")]
    assert recording.store_outputs(executed, home.read("optics"), file) == [
        "optics: cell one wrote to stderr"
    ]


def test_claims_with_one_key_fail_the_notebook(command: Callable[..., Any], home: Any) -> None:
    cells = home.read("optics").cells
    claim = next(c.source for c in cells if c["id"] == "claim")
    home.put("optics", ("parameters", cells[0].source), ("claim", claim), ("again", claim))
    done = command("run", "optics", "--record")
    assert done.code == 1 and "give one of the two another name" in done.said
    assert not (home.root / "data" / "ledger.csv").exists()
