"""Writing a run down: the ledger, the timings, and the outputs stored in the notebooks."""

from __future__ import annotations

import base64
import copy
import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat

from workbench.cli import parameters
from workbench.cli.runner import Job
from workbench.lab import catalogue, ledger, paths
from workbench.lab.show import EXPLORER

if TYPE_CHECKING:
    import pandas as pd

TIMINGS = ["family", "scale", "device", "seconds", "peak_mb", "disk_mb", "cores", "date"]
STORED_SCALE = "laptop"  # the scale whose outputs stand in the notebooks
_CARD = re.compile(r'<div class="workbench-paper" data-paper="(\w+)"')


def record(job: Job, *, device: str, fresh: bool) -> list[str]:
    """Write down one finished notebook.

    Returns:
        Remarks for the user: what was not stored in the notebook, and why.
    """
    ledger.record(job.claims)
    record_timing(job, device=device, fresh=fresh)
    if job.scale not in (STORED_SCALE, ""):
        return []
    source = nbformat.read(job.source, as_version=4)
    defaults = {p.name: p.default for p in parameters.read(source).values()}
    changed = [
        name for name, value in job.parameters.items()
        if name != "device" and value != defaults.get(name)
    ]  # fmt: skip
    if changed:
        listed = ", ".join(changed)
        return [
            f"{job.family}: run with another {listed}; its stored outputs are left as they were"
        ]
    return store_outputs(nbformat.read(job.output, as_version=4), source, job.source)


def store_outputs(
    executed: nbformat.NotebookNode, source: nbformat.NotebookNode, file: Path
) -> list[str]:
    """Copy outputs into the notebook they came from, cell by cell, and write it if it changed.

    The injected cell, timestamps and the runner's metadata stay behind, cells are numbered as
    without them, and citation cards are drawn again so that they show the verdict just recorded.

    Returns:
        Remarks: cells edited during the run, cells that wrote to stderr.
    """
    remarks, before, count = [], copy.deepcopy(source), 0
    ran = {cell["id"]: cell for cell in executed.cells if cell.cell_type == "code"}
    for cell in source.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        done = ran.get(cell["id"])
        if done is None or done.source != cell.source:
            remarks.append(f"{file.stem}: cell {cell['id']} was edited during the run; not stored")
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = [_clean(output, count) for output in done.outputs]
        if any(o.output_type == "stream" and o.name == "stderr" for o in cell.outputs):
            remarks.append(f"{file.stem}: cell {cell['id']} wrote to stderr")
    source.metadata.pop("papermill", None)
    source.metadata.pop("widgets", None)
    if source != before:
        ledger.replace_text(file, nbformat.writes(source) + "\n")
    return remarks


def _clean(output: nbformat.NotebookNode, count: int) -> nbformat.NotebookNode:
    output = copy.deepcopy(output)
    if "execution_count" in output:
        output.execution_count = count
    html = output.get("data", {}).get("text/html")
    if html and (card := _CARD.match(html)):
        output.data["text/html"] = catalogue.paper_html(card[1])
        output.data["text/plain"] = catalogue.paper_text(card[1])
    if "image/png" in output.get("data", {}):
        from workbench.plots import picture

        drawn = base64.b64decode(output.data["image/png"])
        output.data["image/png"] = base64.b64encode(picture.smaller(drawn)).decode()
    if EXPLORER in output.get("data", {}):  # as text: a notebook puts each number on its own line
        output.data[EXPLORER] = json.dumps(output.data[EXPLORER], separators=(",", ":"))
    return output


def timings_file() -> Path:
    """File of the recorded costs."""
    return paths.root() / "data" / "timings.csv"


def timings() -> pd.DataFrame:
    """Recorded costs: one row a notebook, scale and device; seconds, MB, cores, date."""
    import pandas as pd

    if not timings_file().exists():
        return pd.DataFrame(columns=TIMINGS)
    return pd.read_csv(timings_file(), keep_default_na=False)


def record_timing(job: Job, *, device: str, fresh: bool) -> None:
    """Note what a notebook cost.

    A run that found results in the cache was cheaper than the first one: it can raise the recorded
    cost, but only a fresh run lowers it.
    """
    import pandas as pd

    row: Mapping[str, Any] = {
        "family": job.family, "scale": job.scale, "device": device,
        "seconds": round(job.seconds, 1), "peak_mb": round(job.peak_mb),
        "disk_mb": round(job.disk_mb, 1), "cores": job.cores,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip
    with ledger.locked(timings_file()):
        known = timings()
        same = (known[["family", "scale", "device"]] == [job.family, job.scale, device]).all(axis=1)
        if not fresh and (known.loc[same, "seconds"] > row["seconds"]).any():
            return
        parts = [part for part in (known[~same], pd.DataFrame([row])) if len(part)]
        frame = pd.concat(parts)[TIMINGS].sort_values(TIMINGS[:3], kind="stable")
        ledger.write_csv(frame, timings_file())
