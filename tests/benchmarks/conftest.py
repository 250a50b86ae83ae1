"""The benchmark harness: ours and a peer side by side in one process, as a ratio.

`make bench` collects what is marked `bench`; the ordinary test run leaves it out. Each measurement
becomes a row of `data/benchmarks.csv` and of the table printed at the end.
"""

from __future__ import annotations

import datetime
import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from workbench.lab import ledger, paths
from workbench.lab.claims import hardware

COLUMNS = [
    "operation", "peer", "ours_s", "peer_s", "ratio", "bar", "memory_mb", "input_mb", "machine",
    "date",
]  # fmt: skip
ROWS: list[dict[str, Any]] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "bench" in (config.getoption("markexpr") or ""):
        return
    left_out = [item for item in items if item.get_closest_marker("bench")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@dataclass
class Bench:
    """Measures and records; `quiet` repeats count only the best time."""

    repeat: int = 3

    def side_by_side(
        self,
        operation: str,
        peer: str,
        ours: Callable[[], Any],
        theirs: Callable[[], Any] | float,
        *,
        bar: float | None = None,
        input_mb: float = math.nan,
        repeat: int | None = None,
    ) -> dict[str, Any]:
        """Best wall time of each, run in turn, and the extra memory that ours needed.

        `theirs` may be a number of seconds: a limit rather than a peer. `bar` is the least ratio of
        peer to ours that is asked for; it is asserted.
        """
        memory = extra_memory_mb(ours)  # the first call also bears imports, which do not count
        seconds: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(repeat or self.repeat):
            seconds["ours"].append(_timed(ours))
            seconds["peer"].append(_timed(theirs) if callable(theirs) else theirs)
        best = {who: min(times) for who, times in seconds.items()}
        row = {
            "operation": operation,
            "peer": peer,
            "ours_s": best["ours"],
            "peer_s": best["peer"],
            "ratio": best["peer"] / best["ours"],
            "bar": bar,
            "memory_mb": memory,
            "input_mb": input_mb,
            "machine": hardware(),
            "date": datetime.date.today().isoformat(),
        }
        ROWS.append(row)
        if bar is not None:
            assert row["ratio"] >= bar, f"{operation}: {row['ratio']:.1f}x {peer}, bar {bar}x"
        return row


def _timed(run: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def extra_memory_mb(run: Callable[[], Any]) -> float:
    """Peak resident memory during `run` beyond what was resident before; NaN off Linux."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and os.access(reset, os.W_OK)):
        return math.nan
    gc.collect()
    try:
        reset.write_text("5")  # lets the high-water mark start again
    except OSError:
        return math.nan
    before = _kilobytes("VmRSS")
    run()
    return max(0.0, (_kilobytes("VmHWM") - before) / 1024)


def _kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise LookupError(field)


@pytest.fixture
def bench() -> Bench:
    """The harness."""
    return Bench()


@pytest.fixture
def every_core() -> Iterator[None]:
    """Threads as in a reader's session; other tests run on one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not ROWS:
        return
    file = paths.root() / "data" / "benchmarks.csv"
    table = pd.DataFrame(ROWS, columns=COLUMNS)
    if file.exists():
        table = pd.concat([pd.read_csv(file), table]).drop_duplicates(
            ["operation", "peer"], keep="last"
        )
    for name in ("ours_s", "peer_s", "ratio", "memory_mb", "input_mb"):
        table[name] = [float(f"{value:.3g}") for value in table[name].astype(float)]
    table = table.sort_values(["operation", "peer"])
    ledger.write_csv(table, file)
    _write_readme(table)


def _write_readme(table: pd.DataFrame) -> None:
    """Put the table between README's marks."""
    readme = paths.root() / "README.md"
    text = readme.read_text(encoding="utf8")
    begin, end = "<!-- bench:begin -->", "<!-- bench:end -->"
    lines = ["| Operation | Against | Ours | Peer | Ratio | Bar |", "|---|---|---|---|---|---|"]
    for row in table.to_dict("records"):
        bar = "" if math.isnan(row["bar"]) else f"{row['bar']:.3g}x"
        ours, peer = _seconds(row["ours_s"]), _seconds(row["peer_s"])
        ratio = f"**{row['ratio']:.3g}x**"
        lines.append(f"| {row['operation']} | {row['peer']} | {ours} | {peer} | {ratio} | {bar} |")
    machine = ", ".join(sorted(table["machine"].unique()))
    body = "\n".join([*lines, "", f"Machine: {machine}."])
    head, tail = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    ledger.replace_text(readme, f"{head}\n{body}\n{tail}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    terminalreporter.section("side by side")
    form = "{:<52} {:<24} {:>9} {:>9} {:>8} {:>6} {:>9}"
    terminalreporter.line(
        form.format("operation", "peer", "ours", "peer", "ratio", "bar", "memory")
    )
    for row in ROWS:
        terminalreporter.line(
            form.format(
                row["operation"], row["peer"], _seconds(row["ours_s"]), _seconds(row["peer_s"]),
                f"{row['ratio']:.1f}x", "" if row["bar"] is None else f"{row['bar']:.3g}x",
                "" if math.isnan(row["memory_mb"]) else f"{row['memory_mb']:.0f} MB",
            )
        )  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
