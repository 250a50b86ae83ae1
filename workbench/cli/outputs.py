"""What a run leaves in its folder besides the executed notebooks, and what it prints at the end."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.cli.runner import Job
from workbench.lab import digest, ledger
from workbench.lab.claim_card import number

if TYPE_CHECKING:
    import pandas as pd

STYLES = {
    "ok": "green", "failed": "bold red", "died": "bold red", "interrupted": "yellow",
    "running": "cyan", "waiting": "dim",
    "holds": "green", "refuted": "red", "inconclusive": "yellow", "not judged": "dim",
    "flipped": "bold red", "drifted": "yellow", "gone": "yellow", "new": "cyan", "same": "dim",
}  # fmt: skip


def failed_identities(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Equalities proved in a paper that did not hold in this run."""
    return [
        claim for job in jobs for claim in job.claims
        if claim.get("kind") == "identity" and claim.get("verdict") != "holds"
    ]  # fmt: skip


def write(folder: Path, jobs: list[Job], changes: pd.DataFrame) -> None:
    """Write ``junit.xml``, ``claims.json`` and ``summary.json`` into the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    claims = [claim for job in jobs for claim in job.claims]
    _json(folder / "claims.json", claims)
    (folder / "junit.xml").write_bytes(junit(jobs))
    summary = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": digest.versions(),
        "notebooks": [_line(job) for job in jobs],
        "changes": json.loads(changes[changes["change"] != "same"].to_json(orient="records")),
    }
    _json(folder / "summary.json", summary)


def _finite(data: Any) -> Any:
    """The same without infinities and NaN, which JSON cannot hold."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _json(file: Path, data: Any) -> None:
    data = _finite(data)
    ledger.replace_text(file, json.dumps(data, indent=1, ensure_ascii=False, default=str) + "\n")


def _line(job: Job) -> dict[str, Any]:
    hidden = {"claims", "kernel", "started", "source", "output", "traceback", "last_words"}
    fields = (f.name for f in dataclasses.fields(job) if f.name not in hidden)
    line = {name: getattr(job, name) for name in fields}
    line["verdicts"] = {c["paper"]: c["verdict"] for c in job.claims if c.get("central")}
    return line


def junit(jobs: Iterable[Job]) -> bytes:
    """JUnit report: a case for each notebook and for each identity it checked."""
    jobs = list(jobs)
    top = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(top, "testsuite", name="workbench run")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for job in jobs:
        counts["tests"] += 1
        case = ElementTree.SubElement(
            suite, "testcase", classname="notebooks", name=job.family, time=f"{job.seconds:.2f}"
        )
        where = f"family {job.family}, cell {job.cell} of {job.cells} (id {job.cell_id})"
        where += f", paper {job.paper}" if job.paper else ""
        if job.broken:
            kind = "error" if job.state == "died" else "failure"
            counts[f"{kind}s"] += 1
            node = ElementTree.SubElement(case, kind, message=_xml(f"{where}: {job.error}"))
            node.text = _xml(job.traceback)
        elif job.state != "ok":
            counts["skipped"] += 1
            ElementTree.SubElement(case, "skipped", message=job.state)
        for claim in (c for c in job.claims if c.get("kind") == "identity"):
            counts["tests"] += 1
            name = f"{claim['paper']}.{claim['claim']}"
            case = ElementTree.SubElement(suite, "testcase", classname="identities", name=name)
            if claim.get("verdict") != "holds":
                counts["failures"] += 1
                said = f"largest difference {claim.get('ours')}, tolerance {claim.get('margin')}"
                node = ElementTree.SubElement(case, "failure", message=said)
                node.text = _xml(str(claim.get("statement")))
    for name, count in counts.items():
        suite.set(name, str(count))
    suite.set("time", f"{sum(job.seconds for job in jobs):.2f}")
    return ElementTree.tostring(top, encoding="utf-8", xml_declaration=True)


def _xml(text: str) -> str:
    """Text without the control characters that XML cannot hold."""
    return "".join(c for c in text if c in "\t\n" or ord(c) >= 32)


def board(jobs: Iterable[Job]) -> Table:
    """Where each notebook is."""
    table = Table(box=None, pad_edge=False)
    table.add_column("notebook")
    table.add_column("cell", justify="right")
    table.add_column("time", justify="right")
    table.add_column("state")
    for job in jobs:
        share = f"{job.cell}/{job.cells}" if job.started else ""
        clock = f"{job.elapsed():.0f} s" if job.started else ""
        said = f"[{STYLES[job.state]}]{job.state}[/]"
        if job.state == "running" and job.paper:
            said += f" [dim]{escape(job.paper)}[/]"
        table.add_row(escape(job.family), share, clock, said)
    return table


def report(console: Console, jobs: list[Job], changes: pd.DataFrame, folder: Path) -> None:
    """Print failures, verdicts, and what changed against the ledger."""
    for job in jobs:
        if job.broken:
            section = f", section {job.paper}" if job.paper else ""
            console.print(
                f"[bold red]{escape(job.family)}[/] {job.state} in cell {job.cell} of {job.cells} "
                f"(id {escape(job.cell_id)}{escape(section)}): {escape(job.error)}"
            )
    if len(changes):
        console.print(_verdict_table(jobs, changes))
        counts = changes["change"].value_counts()
        console.print(
            "Against the ledger: "
            + ", ".join(f"[{STYLES[str(name)]}]{count} {name}[/]" for name, count in counts.items())
        )
    for claim in failed_identities(jobs):
        console.print(
            f"[bold red]identity failed[/] {escape(claim['paper'])}: {escape(claim['statement'])}"
        )
    console.print(f"Executed notebooks and reports: [bold]{escape(str(folder))}[/]")


def _verdict_table(jobs: list[Job], changes: pd.DataFrame) -> Table:
    table = Table(title="Verdicts", title_justify="left", box=None, pad_edge=False)
    for name in ("paper", "claim", "verdict", "effect and 95% interval", "n", "against the ledger"):
        table.add_column(name, justify="right" if name == "n" else "left")
    stated = {tuple(row[k] for k in ledger.KEY): row for _, row in _rows(jobs).iterrows()}
    for _, change in changes.iterrows():
        row = stated.get(tuple(change[k] for k in ledger.KEY))
        size, n = "", ""
        if row is not None and row["kind"] == "identity":
            size, n = f"largest difference {number(row['ours'])}", str(row["n"])
        elif row is not None:
            unit = f" {row['unit']}" if row["unit"] else ""
            span = f" ({number(row['low'])} to {number(row['high'])})" if row["n"] > 1 else ""
            size, n = f"{number(row['effect'])}{span}{unit}", str(row["n"])
        verdict = change["verdict"] or "not stated"
        table.add_row(
            escape(change["paper"]), escape(change["claim"]),
            f"[{STYLES.get(verdict, 'dim')}]{verdict}[/]", escape(size), n, _against(change),
        )  # fmt: skip
    return table


def _rows(jobs: Iterable[Job]) -> pd.DataFrame:
    return ledger.rows(claim for job in jobs for claim in job.claims)


def _against(change: pd.Series) -> str:
    said = f"[{STYLES[change['change']]}]{change['change']}[/]"
    if change["change"] in ("flipped", "gone"):
        said += f" (was {escape(change['was'])})"
    elif change["change"] == "drifted":
        span = f"{number(change['low_was'])} to {number(change['high_was'])}"
        said += f" (recorded {span})"
    return said
